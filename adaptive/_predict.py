"""``predict``: answers of a classifier under a policy; rows that stop leave the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptive._classifier_exits import ClassifierExits
from adaptive._encoder_stages import EncoderStages
from adaptive._encoders import encoder_family, is_classifier
from adaptive._rows import Batch, count_rows, row_integers, take_rows
from adaptive._stages import AbstractStages, StageOutput, staged
from adaptive.calibration import (
    Certificate,
    CertificateMismatchError,
    InvalidArgumentError,
    InvalidTypeError,
)
from adaptive.calibration._validation import check_count, check_seed
from adaptive.policies import Features, Policy, State, keyed_noise

if TYPE_CHECKING:
    import pandas as pd

#: What `hidden`-like features a staged classifier can hand to a score.
_OFFERED = frozenset({"logits", "answer", "hidden", "previous", "probe", "noise"})


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers for the rows of a batch, in the order of the batch.

    Parameters
    ----------
    logits : Tensor, float32 [rows, classes]
        Of the stage where each row stopped.
    exit_stages : Tensor, int64 [rows]
        That stage; the last one is full computation.
    scores : Tensor, float32 [rows]
        Score at the last stage where the row was asked; NaN where it was not.
    depths : ndarray of float64 [rows]
        Cost of each row in layers run (models passed, stages run).
    certified : bool
        Whether the run was inside what the policy's certificate promises.
    mismatches : tuple of str
        Why not, if it was not.
    certificate : Certificate, optional
        The policy's; outside its conditions, one that says it no longer holds.
    """

    logits: Tensor
    exit_stages: Tensor
    scores: Tensor
    depths: NDArray[np.float64]
    certified: bool
    mismatches: tuple[str, ...] = ()
    certificate: Certificate | None = None

    @property
    def labels(self) -> Tensor:
        """Index of the largest logit, int64 [rows]."""
        return self.logits.argmax(dim=-1)

    @property
    def mean_depth(self) -> float:
        """Mean number of layers (models, stages) behind a row."""
        return float(self.depths.mean())

    def __len__(self) -> int:
        return int(self.logits.shape[0])

    def to_frame(self) -> pd.DataFrame:
        """One row per row of the batch: label, exit stage, score, depth."""
        import pandas as pd

        columns = {"label": self.labels, "exit_stage": self.exit_stages, "score": self.scores}
        table = {name: value.cpu().numpy() for name, value in columns.items()}
        return pd.DataFrame(table | {"depth": self.depths})


@torch.no_grad()
def predict(
    model: Any,
    batch: Batch,
    *,
    policy: Policy | None = None,
    certified: bool = True,
    batch_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    units: Tensor | None = None,
    seed: int = 0,
) -> Prediction:
    """Classify a batch, stopping each row where the policy says so.

    A row that stops leaves the batch: later stages are run for the others only. Who else is in
    the batch does not change a row's values beyond rounding.

    Parameters
    ----------
    model
        A Hugging Face classifier with exits (BERT, ALBERT, RoBERTa, DistilBERT, ViT; see
        :func:`~adaptive.classifiers.train_classifier_exits`); a module with a method
        ``stages(batch)``, or a function, that yields the logits ``[rows, classes]`` of one stage
        after another; or a list of models from small to large (callables that return logits,
        estimators with ``predict_proba``).
    batch
        What the model takes, with one row per unit: a tensor, an array, a mapping of these, a
        pandas DataFrame, a list; texts for a Hugging Face text encoder.
    policy : Policy, optional
        When to stop; without one every row gets full computation.
    certified : bool
        ``True`` refuses to run outside what the policy's certificate was earned under. ``False``
        goes on, and the result says that the certificate does not apply.
    batch_size : int, optional
        Rows run together; all of them by default.
    tokenizer : PreTrainedTokenizerBase, optional
        For texts; by default the one saved beside the model.
    units : Tensor, int64 [rows], optional
        Number of each row's unit, for rules that draw at random; 0, 1, 2, ... if not given.
    seed : int
        Seed for rules that draw at random, in [0, 2**64).

    Returns
    -------
    Prediction

    Raises
    ------
    CertificateMismatchError
        If ``certified`` and the certificate does not apply; the message says why.
    InvalidArgumentError, InvalidTypeError, UnsupportedError
        If an argument or the model is of the wrong kind; the message names it.

    Notes
    -----
    The host waits for the device once per asked stage, to learn which rows go on.

    Examples
    --------
    >>> from adaptive.policies import MaxProbability, Threshold
    >>> def stages(x):  # two stages: a guess, then the truth
    ...     keep = yield torch.stack([x, -x], dim=1)
    ...     x = x if keep is None else x[keep]
    ...     yield torch.stack([10 * x, -10 * x], dim=1)
    >>> policy = Policy(MaxProbability(), Threshold(0.9), stages=(0,))
    >>> found = predict(stages, torch.tensor([3.0, 0.1, -4.0]), policy=policy)
    >>> found.labels.tolist(), found.exit_stages.tolist(), found.mean_depth
    ([0, 0, 1], [0, 1, 0], 1.3333333333333333)
    """
    if policy is not None and not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    seed = check_seed("seed", seed)
    stages = stages_of(model, tokenizer=tokenizer)
    mismatches = () if policy is None else certificate_mismatches(policy, stages)
    if mismatches and certified:
        raise CertificateMismatchError(
            f"the policy's certificate does not apply here: {'; '.join(mismatches)}. Calibrate "
            "for this model, or pass certified=False to go on without the certificate"
        )
    run = predict_rows(stages, batch, policy, batch_size=batch_size, units=units, seed=seed)
    certificate = None if policy is None else policy.certificate
    if certificate is not None and mismatches:
        outside = f"Outside the certificate's conditions: {'; '.join(mismatches)}."
        certificate = replace(certificate, holds=False, notes=(*certificate.notes, outside))
    holds = certificate is not None and certificate.holds
    return replace(run, certified=holds, mismatches=mismatches, certificate=certificate)


def stages_of(model: Any, *, tokenizer: PreTrainedTokenizerBase | None = None) -> AbstractStages:
    """Return the stages of any supported classifier.

    Raises
    ------
    UnsupportedError
        If the model is of no supported kind.
    """
    if is_classifier(model):
        encoder_family(model)
        return EncoderStages(model, ClassifierExits.of(model), tokenizer)
    return staged(model)


@torch.no_grad()
def predict_rows(
    stages: AbstractStages,
    inputs: Batch,
    policy: Policy | None,
    *,
    batch_size: int | None = None,
    units: Tensor | None = None,
    seed: int = 0,
) -> Prediction:
    """Run rows in batches, in order, whatever certificate the policy has."""
    check_policy(policy, stages)
    total = count_rows(inputs)
    if total == 0:
        raise InvalidArgumentError("batch", "no rows", "a batch of at least one row")
    keys = torch.arange(total, device="cpu")
    if units is not None:
        keys = row_integers("units", units, rows=total).cpu()
    size = total if batch_size is None else batch_size
    parts = []
    for start in range(0, total, size):
        rows = torch.arange(start, min(total, start + size), device="cpu")
        part = inputs if len(rows) == total else take_rows(inputs, rows)
        parts.append(_run(stages, stages.prepared(part), policy, keys[rows], seed))
    found = _joined(parts)
    depths = stages.depths(found.stages.cpu().numpy())
    return Prediction(found.logits, found.stages, found.scores, depths, certified=False)


@dataclass(frozen=True)
class _Rows:
    """Outcome per row."""

    logits: Tensor
    stages: Tensor
    scores: Tensor


def _joined(parts: list[_Rows]) -> _Rows:
    return _Rows(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.stages for part in parts]),
        torch.cat([part.scores for part in parts]),
    )


def _run(
    stages: AbstractStages, batch: Batch, policy: Policy | None, keys: Tensor, seed: int
) -> _Rows:
    """Go through the stages of one batch."""
    asked = () if policy is None else policy.stages
    steps = stages.run(batch, asked=asked)
    walk: _Walk | None = None
    keep: Tensor | None = None
    stage = -1
    try:
        while True:
            try:
                output = steps.send(keep)
            except StopIteration:
                break
            keep, stage = None, stage + 1
            if output is None:
                continue
            walk = _Walk(policy, keys, seed, output) if walk is None else walk
            walk.answer(stage, output)
            if stage in asked:
                keep = walk.ask(stage, output)
                if len(walk.live) == 0:
                    return walk.rows
    finally:
        steps.close()
    if walk is None:
        raise InvalidArgumentError("model", "no stage", "one that yields at least one stage")
    if asked and asked[-1] >= stage:
        raise InvalidArgumentError(
            "policy",
            f"stages {asked}",
            f"stages below {stage}: the model has {stage + 1}, and the last is full computation",
        )
    return walk.rows


class _Walk:
    """One batch on its way: which rows are still there, and what each has got so far."""

    def __init__(self, policy: Policy | None, keys: Tensor, seed: int, first: StageOutput) -> None:
        device = first.logits.device
        count, classes = len(keys), first.logits.shape[1]
        self.live = torch.arange(count, device=device)
        self.rows = _Rows(
            torch.empty(count, classes, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.full((count,), float("nan"), device=device),
        )
        self._policy, self._keys, self._seed = policy, keys.to(device), seed
        self._previous: Tensor | None = None
        if policy is not None:
            self._state: State = policy.init(count, device=device)
            self._own = row_entries(policy, device)

    def answer(self, stage: int, output: StageOutput) -> None:
        """Write down what the rows that are there have got; a later stage replaces it."""
        expected = (len(self.live), self.rows.logits.shape[1])
        if output.logits.shape != expected:
            raise InvalidArgumentError(
                "model",
                f"logits of shape {tuple(output.logits.shape)} at stage {stage}",
                f"one that yields {expected} there",
            )
        self.rows.logits[self.live] = output.logits.float()
        self.rows.stages[self.live] = stage

    def ask(self, stage: int, output: StageOutput) -> Tensor | None:
        """Let rows stop; return the places of those that go on, None if all do."""
        assert self._policy is not None
        position = torch.zeros_like(self._keys)
        noise = None
        if "noise" in self._policy.needs:
            noise = keyed_noise(self._keys, position, seed=self._seed)
        found = features(self._policy.needs, stage, output, position, noise, self._previous)
        stop, score, self._state = self._policy.update(found, self._state)
        self.rows.scores[self.live] = score
        self._previous = output.hidden
        going = torch.nonzero(~stop).squeeze(1)  # here the host waits for the device
        if len(going) == len(self.live):
            return None
        self.live, self._keys = self.live[going], self._keys[going]
        self._previous = None if self._previous is None else self._previous[going]
        self._state = {
            key: value[going] if key in self._own else value for key, value in self._state.items()
        }
        return going


def features(
    needs: frozenset[str],
    stage: int,
    output: StageOutput,
    position: Tensor,
    noise: Tensor | None,
    previous: Tensor | None,
) -> Features:
    """Hand a policy what it asked for."""
    if needs & {"hidden", "previous"} and output.hidden is None:
        raise InvalidArgumentError(
            "policy",
            "a score that reads hidden states",
            "one that reads logits: the model's "
            f"stage {stage} yields no hidden state (see StageOutput)",
        )
    if "probe" in needs and output.probe is None:
        raise InvalidArgumentError(
            "policy",
            "a score that reads probes",
            "one that reads logits, such as "
            f"MaxProbability: the model's stage {stage} yields no probe (see StageOutput)",
        )
    return Features(
        stage=stage,
        position=position,
        probe=output.probe if "probe" in needs else None,
        hidden=output.hidden if "hidden" in needs else None,
        previous=previous if "previous" in needs else None,
        logits=output.logits if "logits" in needs else None,
        answer=output.logits.argmax(dim=-1) if "answer" in needs else None,
        noise=noise,
    )


def row_entries(policy: Policy, device: torch.device) -> frozenset[str]:
    """Return the entries of a policy's state that have one row per row of the batch."""
    one, two = (policy.init(rows, device=device) for rows in (1, 2))
    return frozenset(key for key in one if one[key].shape != two[key].shape)


def check_policy(policy: Policy | None, stages: AbstractStages) -> None:
    """Refuse a policy that the model has no exits or features for.

    Raises
    ------
    InvalidArgumentError
        Naming what is missing.
    """
    if policy is None:
        return
    missing = policy.needs - _OFFERED
    if missing:
        raise InvalidArgumentError(
            "policy", f"a policy that reads {sorted(missing)}", f"one that reads {sorted(_OFFERED)}"
        )
    if isinstance(stages, EncoderStages):
        exits = 0 if stages.exits is None else len(stages.exits.layers)
        if exits == 0:
            raise InvalidArgumentError(
                "model",
                "a classifier without exits",
                "one with exits: `train_classifier_exits(model, dataset)`, or let "
                "`calibrate(model, dataset)` do it",
            )
        if policy.stages[-1] >= exits:
            raise InvalidArgumentError(
                "policy",
                f"stages {policy.stages}",
                f"stages among this model's exits 0..{exits - 1}",
            )


def certificate_mismatches(policy: Policy, stages: AbstractStages) -> tuple[str, ...]:
    """Say in which respects a run is outside what the policy's certificate was earned under."""
    certificate = policy.certificate
    if certificate is None:
        return ()
    found = []
    if certificate.decoding.get("task") != "classification":
        found.append("another task: certified for generation, running as classification")
    here = stages.fingerprints()
    for name in ("model", "code", "exits", "tokenizer"):
        earned = certificate.fingerprints.get(name)
        if name == "tokenizer" and None in (earned, here.get(name)):
            continue  # token ids alone do not show the tokenizer
        if earned != here.get(name):
            found.append(f"another {name}: certified on {earned}, running on {here.get(name)}")
    settings: dict[str, Any] = {"dtype": stages.dtype, "stages": list(policy.stages)}
    for name, value in settings.items():
        earned = certificate.decoding.get(name)
        if earned != value:
            found.append(f"other {name}: certified with {earned!r}, running with {value!r}")
    return tuple(found)
