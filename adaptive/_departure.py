"""What one full-depth trace says about every member's own run (``exact`` mode)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._generate import generate
from adaptive._inputs import Units, batches, read_units
from adaptive._losses import LossName, SequenceLoss, unit_loss
from adaptive._output import AdaptiveOutput
from adaptive._run import Run
from adaptive._runs import full_depth_texts, require_same_work, run_units
from adaptive._settings import check_stages
from adaptive._tier import Tier
from adaptive.calibration import (
    InvalidArgumentError,
    InvalidTypeError,
    Trace,
    UnsupportedError,
    binomial_upper_bound,
)
from adaptive.calibration._validation import check_rng
from adaptive.policies import Policy, exit_stages


@dataclass(frozen=True)
class Departures:
    """Where each member's run first departs from the full model's text.

    Parameters
    ----------
    index : ndarray of int64 [n_units, n_members]
        Index, among the generated tokens, of the first that differs; -1 if none does.
    token : ndarray of int64 [n_units, n_members]
        The token the member emits there; -1 if none differs.
    """

    index: NDArray[np.int64]
    token: NDArray[np.int64]

    @property
    def losses(self) -> NDArray[np.float64]:
        """The 0/1 loss "the text departs at all", ``[n_units, n_members]``."""
        return (self.index >= 0).astype(np.float64)


def first_departures(
    policy: Policy, knobs: Sequence[float], trace: Trace, *, seed: int = 0
) -> Departures:
    r"""Derive every member's first departure from one trace of the full model's own text.

    Up to its first departure a run's text is the full model's text. In ``exact`` mode its keys
    and values are then the full model's too, so its scores and decisions are those of the trace:
    whether and where it departs follows without generating anything.

    Parameters
    ----------
    policy : Policy
        In ``exact`` mode, with a rule and a score that are functions of what the stages show and
        of their own memory.
    knobs : sequence of float
        Members of the path.
    trace : Trace
        From :func:`collect_trace`, on the model's own continuation under the deployed settings.
    seed : int
        Seed of the deployment (``rng`` of :func:`collect_trace`), for rules that read noise.

    Returns
    -------
    Departures

    Raises
    ------
    UnsupportedError
        If the policy's mode is not ``exact``: skipped layers then change the keys and values, and
        every loss must come from a real generation.

    Notes
    -----
    Real runs round differently: decisions within the last bits of a threshold, and near-ties of
    logits, may flip. Use derived losses to choose the path and where to start, or charge the
    test with :func:`flip_bound`.
    """
    _require_exact(policy)
    chosen = np.asarray(trace.columns.get("exit_choices", trace.columns["answers"]))
    choices = np.asarray(trace.columns["choices"])
    emitted = np.asarray(trace.columns["emitted"])
    positions = np.asarray(trace.columns["positions"])
    if not np.array_equal(choices, emitted):
        different = int((choices != emitted).sum())
        if different > 0.01 * emitted.size:
            raise InvalidArgumentError(
                "trace",
                f"{different} tokens that are not the full model's choice",
                "a trace of the model's own text",
            )
    table = np.concatenate([chosen, emitted[:, None]], axis=1)
    starts = np.concatenate(([0], np.cumsum(trace.lengths)[:-1]))
    rows = np.arange(trace.n_tokens)
    found, tokens = [], []
    for knob in knobs:
        rule = policy.rule.with_knob(knob)
        said = table[rows, exit_stages(rule, trace, stages=policy.stages, seed=seed)]
        # the row of a unit's first difference; rows behind all tokens stand for "none"
        place = np.where(said != emitted, rows, trace.n_tokens)
        first = np.minimum.reduceat(place, starts)
        none = first == trace.n_tokens
        at = np.where(none, 0, first)
        found.append(np.where(none, -1, positions[at]))
        tokens.append(np.where(none, -1, said[at]))
    return Departures(np.stack(found, axis=1), np.stack(tokens, axis=1).astype(np.int64))


def flip_bound(derived: NDArray[np.float64], real: NDArray[np.float64], *, delta: float) -> float:
    """Upper bound on P(real loss differs from derived loss), to be charged to the test.

    Testing derived 0/1 losses against ``risk - bound`` at ``delta_test`` certifies the real risk
    at ``risk`` with probability ``1 - delta_test - delta``.

    Parameters
    ----------
    derived, real : ndarray [n_units]
        0/1 losses of one member on units where both were computed, drawn independently.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        Clopper-Pearson bound at confidence ``1 - delta``.
    """
    flips = int((np.asarray(derived) != np.asarray(real)).sum())
    return float(binomial_upper_bound(flips, len(derived), delta=delta))


def regenerated(
    model: PreTrainedModel,
    units: Units,
    texts: Sequence[tuple[int, ...]],
    policy: Policy,
    *,
    departed: NDArray[np.int64],
    token: NDArray[np.int64],
    deployment: Deployment,
    tier: Tier | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Texts of one member, generated only from the points where they depart.

    Parameters
    ----------
    model : PreTrainedModel
    units : Units
    texts : sequence of tuple of int
        The full model's texts.
    policy : Policy
        The member.
    departed, token : ndarray of int64 [n_units]
        One column of :class:`Departures`.
    deployment : Deployment
    tier : {"native", "generic"}, optional

    Returns
    -------
    tuple of tuple of int
        Text of every unit: the full model's where nothing departs. Where the rule has memory or
        reads noise, or the decoding samples or has processors, departing units are generated from
        their start.
    """
    found = [tuple(text) for text in texts]
    moved = [int(i) for i in np.flatnonzero(departed >= 0)]
    if not moved:
        return tuple(found)
    if _has_memory(policy) or "noise" in policy.needs or not _is_plain(model, deployment):
        runs = run_units(
            model,
            units.select(moved),
            policy,
            deployment=deployment,
            labels=False,
            tier=tier,
            progress=False,
        )
        for i, run in zip(moved, runs, strict=True):
            found[i] = run.tokens
        return tuple(found)
    begun = [(*texts[i][: departed[i]], int(token[i])) for i in moved]
    ends = _ends(model, deployment)
    open_ = [
        k
        for k, text in enumerate(begun)
        if text[-1] not in ends and len(text) < deployment.new_tokens
    ]
    for k, text in enumerate(begun):
        found[moved[k]] = text
    if open_:
        tails = _continued(
            model,
            units,
            [moved[k] for k in open_],
            [begun[k] for k in open_],
            policy,
            deployment,
            tier,
        )
        for k, tail in zip(open_, tails, strict=True):
            found[moved[k]] = (*begun[k], *tail)[: deployment.new_tokens]
    return tuple(found)


def derived_sequence_losses(
    model: PreTrainedModel,
    units: Units,
    texts: Sequence[tuple[int, ...]],
    policy: Policy,
    knobs: Sequence[float],
    trace: Trace,
    *,
    loss: SequenceLoss,
    deployment: Deployment,
    tier: Tier | None = None,
) -> NDArray[np.float64]:
    """Any sequence loss for the whole path, generating from departure points only.

    Parameters
    ----------
    model, units, deployment, tier
        As for :func:`regenerated`; the units are those of the trace, in its order.
    texts : sequence of tuple of int
        The full model's texts, of two tokens or more.
    policy, knobs, trace
        As for :func:`first_departures`.
    loss : callable
        ``loss(early, full, reference)`` on token ids.

    Returns
    -------
    ndarray of float64 [n_units, n_members]
    """
    departures = first_departures(policy, knobs, trace, seed=deployment.seed)
    columns = []
    for column, knob in enumerate(knobs):
        early = regenerated(
            model,
            units,
            texts,
            policy.member(knob),
            departed=departures.index[:, column],
            token=departures.token[:, column],
            deployment=deployment,
            tier=tier,
        )
        columns.append(
            [loss(a, b, r) for a, b, r in zip(early, texts, units.references, strict=True)]
        )
    return np.array(columns, dtype=np.float64).T


def path_losses(
    model: PreTrainedModel,
    dataset: Any,
    policy: Policy,
    knobs: Sequence[float],
    *,
    loss: LossName | SequenceLoss = "departure",
    new_tokens: int = 64,
    batch_size: int = 8,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tier: Tier | None = None,
    rng: int = 0,
    progress: bool = True,
    **generation: Any,
) -> NDArray[np.float64]:
    """Losses between texts for a whole path from one trace (``exact`` mode).

    The full model's text is generated and traced once. ``"departure"`` follows from the trace;
    for other losses a member generates only from the point where it departs.

    Parameters
    ----------
    model : PreTrainedModel
        With exits.
    dataset
        Prompts, as for :func:`calibrate`; equal prompts count once.
    policy : Policy
        The family.
    knobs : sequence of float
        Its members.
    loss : str or callable
        ``"departure"``, ``"token_f1"``, ``"rouge_l"``, ``"edit"`` or
        ``loss(early, full, reference)``.
    new_tokens, batch_size, column, tokenizer, tier, rng, progress, **generation
        As for :func:`calibrate`.

    Returns
    -------
    ndarray of float64 [n_units, n_members]
        Derived, not observed: see the notes of :func:`first_departures` before testing on them.

    Raises
    ------
    NoExitsError
        If the model has no exits.
    UnsupportedError
        If the policy's mode is not ``exact``.
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind; the message names it.
    """
    if loss == "disagreement":
        raise InvalidArgumentError(
            "loss", loss, "a loss between texts: what follows a departure is not in the trace"
        )
    measure = loss if callable(loss) else unit_loss(loss, bound=None).sequence
    if not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    _require_exact(policy)
    exits = require_exits(model)
    check_stages(policy, exits)
    deployment = Deployment.of(
        generation, new_tokens=new_tokens, batch_size=batch_size, seed=check_rng(rng)
    )
    units = read_units(dataset, model=model, tokenizer=tokenizer, column=column).distinct()
    require_same_work(model, units)
    texts = full_depth_texts(
        model, units, exits, deployment=deployment, tier=tier, progress=progress
    )
    # a text of one token is read off the prompt at full depth: no member departs from it
    long = [i for i, text in enumerate(texts) if len(text) > 1]
    found = np.zeros((len(units), len(knobs)))
    if not long:
        return found
    kept, own = units.select(long), [texts[i] for i in long]
    trace = collect(
        model,
        kept,
        own,
        deployment=deployment,
        score=policy.score,
        stages=policy.stages,
        progress=progress,
        tier=tier,
    )
    if loss == "departure":
        found[long] = first_departures(policy, knobs, trace, seed=deployment.seed).losses
        return found
    assert measure is not None
    found[long] = derived_sequence_losses(
        model, kept, own, policy, knobs, trace, loss=measure, deployment=deployment, tier=tier
    )
    return found


def compare_with_real(
    departures: Departures, column: int, texts: Sequence[Sequence[int]], runs: Sequence[Run]
) -> NDArray[np.int64]:
    """Where real runs of one member depart, beside where the trace says they do.

    Parameters
    ----------
    departures : Departures
    column : int
        The member's place in it.
    texts : sequence of sequence of int
        The full model's texts.
    runs : sequence of Run
        Real generations of the member, in the same order.

    Returns
    -------
    ndarray of int64 [n_units, 2]
        Derived and real index of the first departure, -1 for none.
    """
    real = [_first_difference(text, run.tokens) for text, run in zip(texts, runs, strict=True)]
    return np.stack([departures.index[:, column], np.array(real)], axis=1)


def _require_exact(policy: Policy) -> None:
    if policy.mode != "exact":
        raise UnsupportedError(
            f"departures can be derived in `exact` mode only, not in `{policy.mode}`: there every "
            "loss comes from a real generation"
        )


def _first_difference(full: Sequence[int], early: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(full, early, strict=False)):
        if a != b:
            return index
    return -1 if len(full) == len(early) else min(len(full), len(early))


def _continued(
    model: PreTrainedModel,
    units: Units,
    index: list[int],
    begun: list[tuple[int, ...]],
    policy: Policy,
    deployment: Deployment,
    tier: Tier | None,
) -> list[tuple[int, ...]]:
    """Go on with begun texts; a text begun later may run over its length and is cut."""
    rows = Units(
        prompts=tuple((*units.prompts[i], *text) for i, text in zip(index, begun, strict=True)),
        ids=tuple(units.ids[i] for i in index),
        references=(None,) * len(index),
    )
    tails: dict[int, tuple[int, ...]] = {}
    bare = replace(policy, certificate=None)
    for chosen, ids, mask in batches(rows, size=deployment.batch_size, pad=0, device=model.device):
        counts = torch.tensor([len(begun[k]) for k in chosen])
        output = generate(
            model,
            ids,
            attention_mask=mask,
            policy=bare,
            tier=tier,
            resumed=counts,
            return_dict_in_generate=True,
            **dict(deployment.generation),
            max_new_tokens=deployment.new_tokens - int(counts.min()),
        )
        assert isinstance(output, AdaptiveOutput)
        assert output.exit_stages is not None
        lengths = (output.exit_stages >= 0).sum(dim=1).tolist()
        for row, k in enumerate(chosen):
            tail = output.sequences[row, ids.shape[1] :].tolist()
            tails[int(k)] = tuple(tail[: lengths[row]])
    return [tails[k] for k in range(len(index))]


def _has_memory(policy: Policy) -> bool:
    """Whether the policy carries something from token to token: a state with a batch dimension."""
    state = policy.init(2, device=torch.device("cpu"))
    return any(value.ndim > 0 for value in state.values())


def _is_plain(model: PreTrainedModel, deployment: Deployment) -> bool:
    settings = deployment.settings(model)
    return not settings["sampling"] and not settings["processors"]


def _ends(model: PreTrainedModel, deployment: Deployment) -> frozenset[int]:
    return frozenset(deployment.settings(model)["eos_token_id"])
