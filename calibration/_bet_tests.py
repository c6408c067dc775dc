"""Tests by betting as `control_risk` uses them; negative losses are welcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptive.calibration._betting import (
    agrapa_log_p,
    agrapa_upper_bound,
    star_log_p,
    star_upper_bound,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._mixture import LossHistogram, mixture_log_p, mixture_upper_bound
from adaptive.calibration._risk_test import INDEPENDENT, AbstractRiskTest, Array

_GRID_STEPS = 4096


@dataclass(frozen=True)
class TargetBets(AbstractRiskTest):
    """Bets that recalculate the distance to 1/delta after every unit (STaR-style)."""

    name: ClassVar[str] = "star"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return star_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion on a grid of 1000 steps."""
        return star_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


@dataclass(frozen=True)
class PredictableBets(AbstractRiskTest):
    """Predictable plug-in bets of Waudby-Smith and Ramdas."""

    name: ClassVar[str] = "wsr"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return wsr_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion in the level."""
        return wsr_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


@dataclass(frozen=True)
class GrowthBets(AbstractRiskTest):
    """Approximately growth-optimal bets (aGRAPA)."""

    name: ClassVar[str] = "agrapa"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return agrapa_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion on a grid of 1000 steps."""
        return agrapa_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


@dataclass(frozen=True)
class MixtureBets(AbstractRiskTest):
    """Uniform mixture of constant bets: the order of the units plays no part.

    Above 4096 units the losses are first rounded up to a grid of 4096 steps. Rounding up only
    weakens the evidence, so the test stays valid, and it costs no more than counting.
    """

    name: ClassVar[str] = "mixture"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the log of the mixture's e-value per column, at most 0."""
        if losses.shape[0] <= _GRID_STEPS:
            return mixture_log_p(losses, risk=risk, bound=bound)
        return _counted(losses, bound).log_p_values(risk=risk)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion in the level."""
        if losses.shape[0] <= _GRID_STEPS:
            return mixture_upper_bound(losses, delta=delta, bound=bound)
        return _counted(losses, bound).upper_bounds(delta=delta)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)[:2]


def _counted(losses: Array, bound: float) -> LossHistogram:
    low = max(-bound, min(0.0, float(losses.min())))
    return LossHistogram.of(losses, bins=_GRID_STEPS, low=low, bound=bound)


def _betting_assumptions(bound: float) -> tuple[str, ...]:
    return (
        INDEPENDENT,
        f"no loss exceeds {bound:g} (negative losses are allowed)",
        "the order of the units was fixed by a seed before the losses were looked at",
    )
