"""Rules that read no score: a fixed stage, SkipDecode's depth per position, a random stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, Features, State, needed
from adaptive.policies._statistic import AbstractStatisticRule, check_knob, thinned


@dataclass(frozen=True)
class FixedStage(AbstractStatisticRule):
    """Stop at the first asked exit whose index is at least ``stage``.

    Parameters
    ----------
    stage : float
        ``inf`` never stops early.
    """

    knob_name: ClassVar[str] = "stage"

    stage: float = math.inf

    def __post_init__(self) -> None:
        check_knob("stage", self.stage)

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """None."""
        return {}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Index of the exit."""
        return torch.full_like(score, float(features.stage)), state


@dataclass(frozen=True)
class SkipDecode(AbstractRule):
    """One depth per position, falling linearly from ``most`` to ``least`` layers: SkipDecode.

    All rows of a batch at one position share the depth, and depth never rises along a sequence,
    so no token needs a key that an earlier one did not compute. As a stopping rule it takes the
    first exit that is at least as deep as the schedule says; the published system spends the same
    number of layers on the first ``warmup`` and the *top* layers instead
    (:meth:`active_layers`).

    Parameters
    ----------
    depths : tuple of int
        Layers computed at each exit, ascending, one per exit.
    most : int
        Layers at position 0.
    length : int
        Position at which ``least`` is reached, plus 1; at least 2.
    least : float
        At most ``most``, at least 1; ``inf`` never stops early.

    References
    ----------
    .. [1] Del Corro et al., "SkipDecode: autoregressive skip decoding with batching and caching",
       arXiv 2307.02628.
    """

    per_exit: ClassVar[tuple[str, ...]] = ("depths",)

    depths: tuple[int, ...]
    most: int
    length: int
    least: float = math.inf

    def __post_init__(self) -> None:
        if not self.depths or any(b <= a for a, b in pairwise((0, *self.depths))):
            raise InvalidArgumentError("depths", self.depths, "positive and strictly ascending")
        if self.length < 2:
            raise InvalidArgumentError("length", self.length, "an integer >= 2")
        if not (1 <= self.least <= self.most or math.isinf(self.least)):
            raise InvalidArgumentError("least", self.least, f"in 1..{self.most}, or inf")

    def layers(self, position: Tensor) -> Tensor:
        """Layers to spend at each position, int64, non-increasing; needs a finite ``least``."""
        return self._wanted(position, self.least).to(torch.int64)

    def active_layers(self, position: int, *, n_layers: int, warmup: int) -> tuple[int, ...]:
        """Layers that the published system runs: the first ``warmup`` and the top ones."""
        if math.isinf(self.least):
            raise InvalidArgumentError("least", self.least, "finite: at inf all layers run")
        count = int(self.layers(torch.tensor([position]))[0])
        return (*range(warmup), *range(n_layers - (count - warmup), n_layers))

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Least depth, on the device."""
        return {"least": torch.tensor(self.least, dtype=torch.float32, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare the exit's depth with the schedule."""
        wanted = self._wanted(features.position, state["least"].clamp(max=float(self.most)))
        return (self.depths[features.stage] >= wanted) & (state["least"] < math.inf), state

    def with_knob(self, knob: float) -> Self:
        """Return the schedule that ends at another depth."""
        changes: dict[str, Any] = {"least": float(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then final depths from ``most`` down to the first exit's."""
        last = range(self.most, min(self.depths[0], self.most) - 1, -1)
        return thinned((math.inf, *(float(depth) for depth in last)), size=size)

    def _wanted(self, position: Tensor, least: float | Tensor) -> Tensor:
        """Layers wanted at each position, whole numbers in float32, rounding errors not counted."""
        share = (position.float() / (self.length - 1)).clamp(max=1.0)
        return torch.ceil(self.most - (self.most - least) * share - 1e-4)


@dataclass(frozen=True)
class RandomStage(AbstractStatisticRule):
    """Stop at each asked stage with the same chance, whatever the scores: a control.

    One uniform draw per unit and position decides, so offline and online agree.

    Parameters
    ----------
    going_on : float
        Chance of going on at a stage, in (0, 1]; 1 and ``inf`` never stop early.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})
    knob_name: ClassVar[str] = "going_on"
    strict: ClassVar[bool] = True

    going_on: float = math.inf

    def __post_init__(self) -> None:
        if not self.going_on > 0.0:
            raise InvalidArgumentError("going_on", self.going_on, "positive")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Count of the stages asked so far."""
        return {"asked": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Largest chance of going on at which this draw has stopped by now."""
        asked = state["asked"] + 1.0
        chance = (1.0 - needed(features.noise, "noise")) ** (1.0 / asked)
        return chance, state | {"asked": asked}
