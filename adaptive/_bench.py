"""What a calibration of a language model runs on: its texts, its trace, its path, its clock."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._distributed import from_first
from adaptive._evidence import Facts, none_run
from adaptive._exits import Exits
from adaptive._fastest import Fastest, fastest
from adaptive._inputs import Units
from adaptive._losses import UnitLoss
from adaptive._path import Path, choose_path
from adaptive._run import Run
from adaptive._runs import full_depth, full_depth_texts, run_units
from adaptive._schedule_costs import schedule_costs
from adaptive._split import Split
from adaptive._tier import Tier
from adaptive._timing import seconds_per_token
from adaptive.calibration import Trace
from adaptive.policies import Policy, asked_at, choose_stages, expected_cost

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """Everything a calibration runs on.

    Parameters
    ----------
    model : PreTrainedModel
    exits : Exits
        Of the model.
    deployment : Deployment
        How text will be decoded.
    split : Split
        Its test units carry the clusters that the test counts, if it counts clusters.
    family : Policy
        Its rule's knob is what is calibrated.
    loss : UnitLoss
    tier : {"native", "generic"}, optional
    progress : bool
    schedule : dict, optional
        How the exits to ask at were chosen, for the certificate.
    """

    model: PreTrainedModel
    exits: Exits
    deployment: Deployment
    split: Split
    family: Policy
    loss: UnitLoss
    tier: Tier | None
    progress: bool
    schedule: dict[str, Any] | None = None

    @property
    def any_token(self) -> bool:
        """Whether a unit's loss is predicted by any disagreement, not by the share of tokens."""
        return self.loss.binary or self.loss.sequence is not None

    def run(
        self, units: Units, policy: Policy, description: str, *, labels: bool = True
    ) -> tuple[Run, ...]:
        """Generate units under a policy; units that decide together in the order given."""
        run = functools.partial(
            run_units,
            self.model,
            policy=policy,
            deployment=self.deployment,
            labels=labels,
            tier=self.tier,
            description=description,
        )
        if policy.scope == "row":
            return run(units, progress=self.progress)
        size = self.deployment.batch_size
        batches = (range(start, start + size) for start in range(0, len(units), size))
        return tuple(done for rows in batches for done in run(units.select(rows), progress=False))

    def full_texts(self, units: Units) -> list[tuple[int, ...]]:
        """Generate the full model's text of each unit."""
        return full_depth_texts(
            self.model,
            units,
            self.exits,
            deployment=self.deployment,
            tier=self.tier,
            progress=self.progress,
        )

    def trace(self) -> Trace | None:
        """Trace the model's own text on the fit split; none if every text ends with one token."""
        texts = self.full_texts(self.split.fit)
        if all(len(text) < 2 for text in texts):
            return None
        return collect(
            self.model,
            self.split.fit,
            texts,
            deployment=self.deployment,
            score=self.family.score,
            stages=self.family.stages,
            progress=self.progress,
            tier=self.tier,
        )

    def scheduled(self, trace: Trace, *, risk: float) -> tuple[Bench, Trace]:
        """Leave out the exits that are not worth asking at, on the fit split's trace."""
        costs = from_first(
            lambda: schedule_costs(self.model, self.exits, self.family, tier=self.tier)
        )
        timed = replace(trace, costs=costs.stages)
        settings: dict[str, Any] = {
            "risk": risk,
            "checks": costs.checks,
            "reduction": "any" if self.any_token else "mean",
            "seed": self.deployment.seed,
        }
        chosen = choose_stages(self.family, timed, **settings)
        schedule = {
            "stages": list(chosen.stages),
            "microseconds_per_check": [round(1e6 * float(check), 2) for check in costs.checks],
            "milliseconds_per_token": {
                name: round(1e3 * expected_cost(policy, timed, **settings), 4)
                for name, policy in (("chosen", chosen), ("everywhere", self.family))
            },
        }
        _log.info("the policy asks at exits %s of %s", chosen.stages, self.family.stages)
        bench = replace(self, family=chosen, schedule=schedule)
        return bench, asked_at(trace, chosen.stages)

    def path(self, trace: Trace | None, *, risk: float, members: int) -> Path:
        """Place the members; full depth alone where there is nothing to stop."""
        if trace is None:
            return Path((float("inf"),), np.zeros(1))
        return choose_path(
            self.family,
            trace,
            risk=risk,
            members=members,
            any_token=self.any_token,
            seed=self.deployment.seed,
            batch_size=self.deployment.batch_size,
        )

    def fastest(self, members: Sequence[Policy]) -> Fastest:
        """Choose among full depth, at index 0, and members, the last expected to be fastest.

        By seconds per token, one prompt at a time, or as many as decide together.
        """
        policies = [full_depth(self.exits), *members]
        rows = self.deployment.batch_size if self.family.scope == "batch" else 1
        few = self.split.fit.select(range(min(max(4, rows), len(self.split.fit))))
        round_of = functools.partial(
            seconds_per_token,
            self.model,
            few,
            policies,
            deployment=self.deployment,
            rows=rows,
            tier=self.tier,
        )
        return from_first(lambda: fastest(round_of, preferred=len(members)))

    def no_gain(self, path: Path, risk: float) -> str | None:
        """Say so if the member nearest to the promise is measured to be slower than full depth."""
        within = np.flatnonzero(path.predicted <= risk)
        nearest = self.family.member(path.knobs[max(1, int(within.max()))])
        choice = self.fastest([nearest])
        if choice.index == 1:
            return None
        full, early = choice.seconds
        return (
            f"In `{self.family.mode}` mode stopping early gains nothing on this machine "
            f"({1e3 * early:.3g} ms per token against {1e3 * full:.3g} at full depth): skipped "
            "layers are computed later, in batches, which pays where decoding is bound by memory. "
            "Pass mode='propagate' to skip them for good."
        )

    def nothing(self, facts: Facts, *, risk: float, delta: float, n: int, why: str) -> Policy:
        """Return full computation and a certificate that says why."""
        certificate = none_run(self.loss, risk=risk, delta=delta, unit=facts.unit, n=n, why=why)
        never = self.family.member(float("inf"))
        return replace(never, certificate=facts.completed(certificate))
