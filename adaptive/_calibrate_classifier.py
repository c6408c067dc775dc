"""``calibrate`` for classifiers: the same promises as for text, on answers instead of tokens."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptive._classifier_losses import ClassLoss, ClassLossName, RowLoss, row_loss
from adaptive._collect_classifier import StageTable, seconds_per_row, stage_table, trace_of
from adaptive._distributed import from_first, gathered, require_equal, share
from adaptive._encoder_stages import EncoderStages
from adaptive._evidence import FIT_SHARE, TRAIN_SHARE, Facts, Roles, booked, parted, total_units
from adaptive._examples import Examples, read_examples
from adaptive._fastest import Fastest, fastest
from adaptive._path import GRID, Path, place_members
from adaptive._predict import check_policy, predict_rows, stages_of
from adaptive._progress import bar
from adaptive._rows import take_rows
from adaptive._stages import AbstractStages
from adaptive._train_classifier import ClassifierTraining, train_classifier_exits
from adaptive.calibration import (
    Certificate,
    DeltaLedger,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
    control_risk,
    minimum_units,
)
from adaptive.policies import (
    MaxProbability,
    Policy,
    ProbeScore,
    Threshold,
    exit_stages,
    unit_keys,
)

_log = logging.getLogger(__name__)
#: Batches on which policies are timed.
_TIMED_BATCHES = 4
#: Inputs of one call where only answers matter and they do not depend on the batch.
_AT_ONCE = 4096


def calibrate_classifier(
    model: Any,
    dataset: Any,
    risk: float,
    delta: float,
    *,
    policy: Policy | None,
    loss: ClassLossName | ClassLoss,
    bound: float | None,
    method: str,
    groups: Sequence[Any] | str | None,
    pool: str | None,
    batch_size: int,
    members: int,
    column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    training: object,
    device: torch.device | str | None,
    ledger: DeltaLedger | None,
    rng: int,
    progress: bool,
) -> Policy:
    """Certify a policy for a classifier; parameters and promises as :func:`calibrate` has them."""
    if training is not None and not isinstance(training, ClassifierTraining):
        raise InvalidTypeError("training", training, "a ClassifierTraining")
    measured = row_loss(loss, bound=bound)
    needed = minimum_units(risk, delta, **_test_of(measured, method))
    if device is not None:
        if not hasattr(model, "to"):
            raise InvalidArgumentError("device", device, "None: this model has no `to`")
        model.to(device)
    stages = stages_of(model, tokenizer=tokenizer)
    units = read_examples(dataset, stages=stages, column=column, groups=groups)
    if measured.needs_labels and units.labels is None:
        raise InvalidArgumentError(
            "dataset", "no labels", f"inputs with labels for loss={loss!r}: (inputs, labels)"
        )
    require_equal(stages.fingerprints() | {"data": units.ids})
    split = _split(stages, units, training=training, rng=rng, progress=progress)
    stages = split.stages
    clustered = groups is not None and pool is None
    n_test = len(np.unique(split.test.groups)) if clustered else len(split.test)  # type: ignore[arg-type]
    _log.info("this promise needs at least %d units; the test split has %d", needed, n_test)
    facts = Facts(
        fingerprints=stages.fingerprints()
        | {"data": hashlib.sha256("".join(sorted(units.ids)).encode()).hexdigest()[:24]},
        decoding={"task": "classification", "dtype": stages.dtype, "batch_size": batch_size},
        split=split.record(rng),
        pool=pool,
        unit="cluster" if clustered else "input",
        noun="input",
    )
    bench = _Bench.of(stages, split, policy, measured, batch_size, rng, progress)
    stages_asked = {"stages": list(bench.family.stages)}
    facts = replace(facts, decoding=facts.decoding | stages_asked)
    if n_test < needed:
        why = (
            f"Too few units: the test split has {n_test}, and this promise needs at least "
            f"{needed} in the test even if every loss is zero (about {total_units(needed)} inputs "
            "in all)."
        )
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    path = bench.path(risk=risk, members=members)
    if len(path.knobs) == 1 and measured.relative:
        why = "No member stops early on the fit split within 1.2 times the promised risk."
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    if ledger is not None:
        data = facts.fingerprints["data"]
        purpose = f"calibrate {measured.name} at {risk:g}"
        account = from_first(lambda: booked(ledger, delta, purpose=purpose, data=data))
        facts = replace(facts, split=facts.split | {"ledger": account})
    found = bench.certify(path, facts, risk=risk, delta=delta, method=method, clustered=clustered)
    return replace(found, certificate=from_first(lambda: found.certificate))


@dataclass(frozen=True)
class _Split(Roles[Examples]):
    """Units by role, and the stages they go with."""

    stages: AbstractStages


def _split(
    stages: AbstractStages,
    units: Examples,
    *,
    training: ClassifierTraining | None,
    rng: int,
    progress: bool,
) -> _Split:
    """Train exits if an encoder has none; keep what shaped them out; part the rest."""
    distinct = units.distinct()
    repeated, trained, shaped = len(units) - len(distinct), 0, set[str]()
    if isinstance(stages, EncoderStages):
        exits = stages.exits
        if exits is None:
            if len(distinct) < 12:
                raise InvalidArgumentError(
                    "dataset", f"{len(distinct)} distinct inputs", "more: exits have to be trained"
                )
            shaping, distinct = parted(distinct, TRAIN_SHARE, rng)
            trained = len(shaping)
            given = shaping.inputs if shaping.labels is None else (shaping.inputs, shaping.labels)
            exits = train_classifier_exits(
                stages.model,
                given,
                training=training,
                tokenizer=stages.tokenizer,
                rng=rng,
                progress=progress,
            )
            stages = replace(stages, exits=exits)
        shaped = set(exits.record.units)
    kept = [i for i, name in enumerate(distinct.ids) if name not in shaped]
    overlapping = len(distinct) - len(kept)
    if overlapping:
        _log.info("%d inputs shaped the exits and are left out", overlapping)
    if len(kept) < 2:
        raise InvalidArgumentError(
            "dataset", f"{len(kept)} distinct inputs that did not shape the exits", "at least 2"
        )
    fit, test = parted(distinct.select(kept), FIT_SHARE, rng + 1)
    return _Split(fit, test, trained, overlapping, repeated, stages)


@dataclass(frozen=True)
class _Answers:
    """Outcome of a run on the test split."""

    logits: Tensor
    stages: NDArray[np.int64]


@dataclass(frozen=True)
class _Bench:
    """Everything a calibration runs on."""

    stages: AbstractStages
    split: _Split
    family: Policy
    loss: RowLoss
    table: StageTable
    batch_size: int
    seed: int
    progress: bool

    @classmethod
    def of(
        cls,
        stages: AbstractStages,
        split: _Split,
        policy: Policy | None,
        loss: RowLoss,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> _Bench:
        """Trace the fit split; by default a threshold at every exit, on the probes if any."""
        probed = isinstance(stages, EncoderStages)
        score = (ProbeScore() if probed else MaxProbability()) if policy is None else policy.score
        if policy is not None:
            check_policy(policy, stages)
            if policy.scope == "batch":
                raise UnsupportedError(
                    "rules whose rows decide together cannot be calibrated per input: the batch "
                    "would be the unit. Use a rule that decides per row"
                )
        table = stage_table(
            stages,
            split.fit,
            score=score,
            asked=None if policy is None else policy.stages,
            batch_size=_rows_of_run(stages, batch_size),
            seed=seed,
            progress=progress,
        )
        asked = tuple(range(len(table.logits) - 1))
        family = Policy(score, Threshold(), stages=asked) if policy is None else policy
        family = replace(family, certificate=None)
        return cls(stages, split, family, loss, table, batch_size, seed, progress)

    def path(self, *, risk: float, members: int) -> Path:
        """Place the members by what they would have lost on the fit split."""
        trace = trace_of(self.table, self.split.fit, {"loss": self.loss})
        knobs = self.family.rule.knobs(trace, size=GRID)
        full = self.loss.of(self.table.full, self.table.full, self.split.fit.labels)
        table = np.concatenate([trace.losses["loss"], full[:, None]], axis=1)
        found = []
        for knob in knobs:
            rule = self.family.member(knob).rule
            stops = exit_stages(rule, trace, stages=self.family.stages, seed=self.seed)
            found.append(float(table[np.arange(len(stops)), stops].mean()))
        return place_members(knobs, np.array(found), risk=risk, members=members)

    def run(self, policy: Policy | None) -> _Answers:
        """Run the test split as it will be run in use, batches shared by the processes."""
        test, keys = self.split.test, unit_keys(self.split.test.ids)
        size = _rows_of_run(self.stages, self.batch_size)
        own: dict[int, tuple[Tensor, Tensor]] = {}
        for start in share(range(0, len(test), size)):
            rows = torch.arange(start, min(len(test), start + size))
            run = predict_rows(
                self.stages,
                take_rows(test.inputs, rows),
                policy,
                units=keys[rows],
                seed=self.seed,
            )
            own[start] = run.logits.cpu(), run.exit_stages.cpu()
        parts = [part for _, part in sorted(gathered(own).items())]
        logits, stages = (torch.cat(column) for column in zip(*parts, strict=True))
        return _Answers(logits, stages.numpy())

    def certify(
        self, path: Path, facts: Facts, *, risk: float, delta: float, method: str, clustered: bool
    ) -> Policy:
        """Walk the path on the test split and return the certified member that pays most."""
        test = self.split.test
        groups = test.groups if clustered else None
        # an error rate of its own is tested for full computation too, as column 1
        first = 0 if self.loss.relative else 1
        knobs = (*path.knobs[:first], *path.knobs)
        shown = bar(total=len(knobs), desc="testing", unit="member", progress=self.progress)
        whole = self.run(None)
        depth = self.stages.depths(np.arange(len(self.table.logits)))
        depths = {str(first): float(depth[-1])}
        counts: dict[str, list[int]] = {}
        visited: dict[int, NDArray[np.float64]] = {}

        @functools.cache  # the upper bound reads the last certified member a second time
        def losses(column: int) -> NDArray[np.float64]:
            shown.update(1)
            run = whole if column == first else self.run(self.family.member(knobs[column]))
            depths[str(column)] = float(depth[run.stages].mean())
            counts[str(column)] = np.bincount(run.stages, minlength=len(depth)).tolist()
            visited[column] = self.loss.of(run.logits, whole.logits, test.labels)
            return visited[column]

        settings: dict[str, Any] = {
            "risk": risk,
            "delta": delta,
            "bound": self.loss.bound,
            "loss_type": "binary" if self.loss.binary else "bounded",
            "method": method,
            "groups": groups,
            "rng": self.seed,
            "loss": self.loss.name,
            "unit": "input",
        }
        result = control_risk(losses, n_columns=len(knobs), **settings)
        shown.close()
        evidence = {
            "mean_depth": depths,
            "exit_layers": [int(value) for value in depth],
            "exit_counts": counts,
            "steps": self.stages.steps,
            "knobs": [str(knob) for knob in knobs],
            "predicted": [float(value) for value in (*path.predicted[:first], *path.predicted)],
            "full_computation_tested": not self.loss.relative,
        }
        certificate = _with_evidence(self._completed(result.certificate, facts), evidence)
        never = self.family.member(math.inf)
        if result.index is None:
            return replace(never, certificate=certificate)
        columns = [first, *(int(j) for j in np.flatnonzero(result.certified) if j > first)]
        choice = self.fastest([None, *(self.family.member(knobs[j]) for j in columns[1:])])
        costs = choice.seconds
        timing = {str(j): round(1e3 * float(c), 6) for j, c in zip(columns, costs, strict=True)}
        index = columns[choice.index]
        certificate = replace(
            _with_evidence(certificate, {"milliseconds_per_input": timing}),
            cost=float(costs[choice.index]),
        )
        if index == first:
            note = (
                f"Members {columns[1:]} are certified, but none is faster than full computation "
                f"on this machine in batches of {self.batch_size}, so full computation is used."
            )
            notes = (*certificate.notes, *([note] if columns[1:] else []))
            place = index if index else None
            certificate = replace(certificate, holds=index > 0, index=place, notes=notes)
        else:
            certificate = replace(certificate, index=index, knob=float(knobs[index]))
        if index and index != result.index:
            column = np.stack([np.zeros_like(visited[index]), visited[index]], axis=1)
            again = control_risk(column, **settings).certificate.evidence["upper_bound"]
            certificate = _with_evidence(certificate, {"upper_bound": again})
        member = never if index == first else self.family.member(knobs[index])
        return replace(member, certificate=certificate)

    def fastest(self, policies: Sequence[Policy | None]) -> Fastest:
        """Choose by seconds per row in deployed batches; None, the first, is full computation.

        Policies are given from the safest to the one expected to be fastest.
        """
        rows = torch.arange(min(len(self.split.fit), _TIMED_BATCHES * self.batch_size))
        inputs = take_rows(self.split.fit.inputs, rows)
        round_of = functools.partial(
            seconds_per_row, self.stages, inputs, policies, batch_size=self.batch_size
        )
        return from_first(lambda: fastest(round_of, preferred=len(policies) - 1))

    def nothing(self, facts: Facts, *, risk: float, delta: float, n: int, why: str) -> Policy:
        """Return full computation and a certificate that says why."""
        certificate = Certificate(
            holds=False,
            risk=risk,
            delta=delta,
            loss=self.loss.name,
            unit=facts.unit,
            method="none run",
            procedure="fixed-sequence",
            n=n,
            index=None,
            evidence={"full_computation_tested": not self.loss.relative},
            bound=self.loss.bound,
            assumptions=(),
            split={},
            notes=(why,),
        )
        never = self.family.member(math.inf)
        return replace(never, certificate=self._completed(certificate, facts))

    def _completed(self, certificate: Certificate, facts: Facts) -> Certificate:
        """Add what only this floor knows, and what it cannot know."""
        own = "the model" if isinstance(self.stages, EncoderStages) else "the model and its exits"
        assumed = f"no test input was used in making {own} (the caller knows)"
        certificate = facts.completed(certificate)
        return replace(certificate, assumptions=(*certificate.assumptions, assumed))


def _rows_of_run(stages: AbstractStages, batch_size: int) -> int:
    """Rows run together where only answers matter, not the time they take."""
    return max(batch_size, _AT_ONCE) if stages.rowwise else batch_size


def _with_evidence(certificate: Certificate, more: dict[str, Any]) -> Certificate:
    return replace(certificate, evidence=certificate.evidence | more)


def _test_of(loss: RowLoss, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "loss_type": "binary" if loss.binary else "bounded",
        "bound": loss.bound,
    }
