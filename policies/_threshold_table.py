"""Thresholds per stage looked up by knob: what budgets and target agreements come down to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._statistic import comparable, thinned


@dataclass(frozen=True)
class ThresholdTable(AbstractRule):
    """Stop at the first asked stage with ``score >= thresholds[knob][stage]``.

    A family that a fit split has fixed beforehand: the knob (a budget, a target agreement) picks
    one row. Built by `budget_thresholds`, `agreement_thresholds` and the like.

    Parameters
    ----------
    levels : tuple of float
        Values of the knob, strictly descending, from safest to cheapest; finite.
    thresholds : tuple of tuple of float [n_levels, n_exits]
        ``inf`` where a stage never stops.
    level : float
        The row in force: one of ``levels``, or ``inf`` to never stop early.

    Raises
    ------
    InvalidArgumentError
        If the table is ragged, a threshold is NaN, or ``level`` is not in the table.
    """

    per_exit: ClassVar[tuple[str, ...]] = ("row",)

    levels: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    level: float = math.inf

    def __post_init__(self) -> None:
        if not self.levels or any(b >= a for a, b in pairwise((math.inf, *self.levels))):
            raise InvalidArgumentError("levels", self.levels, "finite and strictly descending")
        widths = {len(row) for row in self.thresholds}
        nan = any(math.isnan(value) for row in self.thresholds for value in row)
        if len(self.thresholds) != len(self.levels) or len(widths) != 1 or nan:
            raise InvalidArgumentError("thresholds", self.thresholds, "one full row per level")
        if self.level not in (math.inf, *self.levels):
            raise InvalidArgumentError("level", self.level, f"inf or one of {self.levels}")

    @property
    def nested(self) -> bool:  # type: ignore[override]
        """Whether no threshold rises from a level to the next cheaper one."""
        rows = pairwise(self.thresholds)
        return all(b <= a for safe, cheap in rows for a, b in zip(safe, cheap, strict=True))

    @property
    def row(self) -> tuple[float, ...]:
        """Thresholds in force, one per exit."""
        if math.isinf(self.level):
            return (math.inf,) * len(self.thresholds[0])
        return self.thresholds[self.levels.index(self.level)]

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Put the thresholds in force on the device."""
        return {"thresholds": comparable(self.row, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare in float32; NaN, minus infinity and an infinite threshold never stop."""
        return score >= state["thresholds"][features.stage], state

    def with_knob(self, knob: float) -> Self:
        """Return the same table at another of its levels."""
        changes: dict[str, Any] = {"level": float(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity and the levels of the table, thinned evenly to ``size``."""
        return thinned((math.inf, *self.levels), size=size)
