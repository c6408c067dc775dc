"""What a calibration of a classifier runs on: its trace, its path, its answers, its clock."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive._classifier_losses import RowLoss
from adaptive._collect_classifier import StageTable, seconds_per_row, stage_table, trace_of
from adaptive._distributed import from_first, gathered, share
from adaptive._encoder_stages import EncoderStages
from adaptive._evidence import Facts, Roles, none_run
from adaptive._examples import Examples
from adaptive._fastest import Fastest, fastest
from adaptive._path import GRID, Path, place_members
from adaptive._predict import check_policy, predict_rows
from adaptive._rows import take_rows
from adaptive._stages import AbstractStages
from adaptive.calibration import Certificate, UnsupportedError
from adaptive.policies import (
    MaxProbability,
    Policy,
    ProbeScore,
    Threshold,
    exit_stages,
    unit_keys,
)

#: Batches on which policies are timed.
_TIMED_BATCHES = 4
#: Inputs of one call where only answers matter and they do not depend on the batch.
_AT_ONCE = 4096


@dataclass(frozen=True)
class ClassifierSplit(Roles[Examples]):
    """Units by role, and the stages they go with."""

    stages: AbstractStages


@dataclass(frozen=True)
class Answers:
    """Outcome of a run on the test split.

    Parameters
    ----------
    logits : Tensor, float [n_units, classes]
    stages : ndarray of int64 [n_units]
        Where each unit stopped.
    """

    logits: Tensor
    stages: NDArray[np.int64]


@dataclass(frozen=True)
class ClassifierBench:
    """Everything a calibration of a classifier runs on.

    Parameters
    ----------
    split : ClassifierSplit
        Its test units carry the clusters that the test counts, if it counts clusters.
    family : Policy
        Its rule's knob is what is calibrated.
    loss : RowLoss
    table : StageTable
        What every stage says of the fit split.
    batch_size : int
        Rows that are decided on together in use.
    seed : int
    progress : bool
    """

    split: ClassifierSplit
    family: Policy
    loss: RowLoss
    table: StageTable
    batch_size: int
    seed: int
    progress: bool

    @classmethod
    def of(
        cls,
        split: ClassifierSplit,
        policy: Policy | None,
        *,
        loss: RowLoss,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> ClassifierBench:
        """Trace the fit split; by default a threshold at every exit, on the probes if any.

        Raises
        ------
        UnsupportedError
            If the rows of the policy decide together.
        """
        stages = split.stages
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
        return cls(split, family, loss, table, batch_size, seed, progress)

    @property
    def stages(self) -> AbstractStages:
        """Stages of the model."""
        return self.split.stages

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

    def run(self, policy: Policy | None) -> Answers:
        """Run the test split as it will be run in use, batches shared by the processes."""
        test, keys = self.split.test, unit_keys(self.split.test.ids)
        size = _rows_of_run(self.stages, self.batch_size)
        own: dict[int, tuple[Tensor, Tensor]] = {}
        for start in share(range(0, len(test), size)):
            rows = torch.arange(start, min(len(test), start + size), device="cpu")
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
        return Answers(logits, stages.numpy())

    def fastest(self, members: Sequence[Policy]) -> Fastest:
        """Choose among full computation, at index 0, and members, the last expected fastest.

        By seconds per row in deployed batches.
        """
        count = min(len(self.split.fit), _TIMED_BATCHES * self.batch_size)
        rows = torch.arange(count, device="cpu")
        inputs = take_rows(self.split.fit.inputs, rows)
        round_of = functools.partial(
            seconds_per_row, self.stages, inputs, [None, *members], batch_size=self.batch_size
        )
        return from_first(lambda: fastest(round_of, preferred=len(members)))

    def nothing(self, facts: Facts, *, risk: float, delta: float, n: int, why: str) -> Policy:
        """Return full computation and a certificate that says why."""
        certificate = none_run(
            self.loss,
            risk=risk,
            delta=delta,
            unit=facts.unit,
            n=n,
            why=why,
            evidence={"full_computation_tested": not self.loss.relative},
        )
        never = self.family.member(math.inf)
        return replace(never, certificate=self.completed(certificate, facts))

    def completed(self, certificate: Certificate, facts: Facts) -> Certificate:
        """Add to a certificate what only this floor knows, and what it cannot know."""
        own = "the model" if isinstance(self.stages, EncoderStages) else "the model and its exits"
        assumed = f"no test input was used in making {own} (the caller knows)"
        certificate = facts.completed(certificate)
        return replace(certificate, assumptions=(*certificate.assumptions, assumed))


def _rows_of_run(stages: AbstractStages, batch_size: int) -> int:
    """Rows run together where only answers matter, not the time they take."""
    return max(batch_size, _AT_ONCE) if stages.rowwise else batch_size
