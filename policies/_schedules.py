"""Thresholds that vary with stage and position around one knob."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, AbstractSchedule, Features, State
from adaptive.policies._simulate import positions_of
from adaptive.policies._statistic import check_knob, comparable, knob_path


@dataclass(frozen=True)
class PerStage(AbstractSchedule):
    """One offset per stage: ``threshold = base + offsets[stage]``.

    Parameters
    ----------
    offsets : tuple of float
        One per exit, 0..K-2; ``inf`` protects the exit: nothing stops there. With base 0 they are
        the thresholds themselves (LITE; Prophet's 7.5, 5, 2.5 over the thirds of its steps).
    """

    per_exit: ClassVar[tuple[str, ...]] = ("offsets",)

    offsets: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.offsets or any(math.isnan(offset) for offset in self.offsets):
            raise InvalidArgumentError("offsets", self.offsets, "numbers, one per exit, not NaN")

    def tables(self, *, device: torch.device) -> State:
        """Offsets, float32 [n_exits]."""
        return {"offsets": comparable(self.offsets, device=device)}

    def threshold(self, base: Tensor, features: Features, tables: State) -> Tensor:
        """Scalar tensor."""
        return base + tables["offsets"][features.stage]


@dataclass(frozen=True)
class Decay(AbstractSchedule):
    """CALM's decay in position: ``clip01(0.9 t + 0.1 t exp(-tau * position / length))``.

    Early tokens are held to a higher threshold, because what they get wrong is read by all later
    ones. For scores in [0, 1] and a base ``t`` in [0, 1].

    Parameters
    ----------
    tau : float
        Temperature of the decay, at least 0. CALM's default is 4.
    length : int
        Largest number of generated tokens (CALM's N_max), at least 1.

    References
    ----------
    .. [1] Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022, equation 5.

    Examples
    --------
    >>> here = Features(stage=0, position=torch.tensor([0, 25, 50, 100]))
    >>> Decay(tau=4.0, length=100).threshold(torch.tensor(0.8), here, {})
    tensor([0.8000, 0.7494, 0.7308, 0.7215])
    """

    tau: float
    length: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau < math.inf:
            raise InvalidArgumentError("tau", self.tau, "a finite number >= 0")
        if self.length < 1:
            raise InvalidArgumentError("length", self.length, "an integer >= 1")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def threshold(self, base: Tensor, features: Features, tables: State) -> Tensor:
        """Float32 [batch]; a base of NaN (never) is not clipped to 1."""
        decay = torch.exp(-self.tau / self.length * features.position.float())
        return torch.clamp(base * (0.9 + 0.1 * decay), 0.0, 1.0)


@dataclass(frozen=True)
class Phases(AbstractSchedule):
    """Steps in position: ``threshold = base + offsets[phase]``.

    Parameters
    ----------
    starts : tuple of int
        First position of each phase but the first, strictly ascending, at least 1.
    offsets : tuple of float
        One per phase, so one more than ``starts``; ``inf`` protects a phase (a warm-up).
    """

    starts: tuple[int, ...]
    offsets: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(b <= a for a, b in pairwise((0, *self.starts))):
            raise InvalidArgumentError("starts", self.starts, "strictly ascending integers >= 1")
        if len(self.offsets) != len(self.starts) + 1 or any(map(math.isnan, self.offsets)):
            expected = f"{len(self.starts) + 1} numbers, one per phase, not NaN"
            raise InvalidArgumentError("offsets", self.offsets, expected)

    def tables(self, *, device: torch.device) -> State:
        """First positions, int64 [n_phases - 1], and offsets, float32 [n_phases]."""
        return {
            "starts": torch.tensor(self.starts, dtype=torch.int64, device=device),
            "offsets": comparable(self.offsets, device=device),
        }

    def threshold(self, base: Tensor, features: Features, tables: State) -> Tensor:
        """Float32 [batch]."""
        phase = torch.bucketize(features.position.contiguous(), tables["starts"], right=True)
        return base + tables["offsets"][phase]


@dataclass(frozen=True)
class ScheduledThreshold(AbstractRule):
    """Stop at the first asked stage with ``score >= schedule(threshold, stage, position)``.

    The knob is the base threshold; a lower base lowers the threshold everywhere, so the family
    is nested. CALM is this rule with :class:`Decay`.

    Parameters
    ----------
    schedule : AbstractSchedule
        How the threshold in force follows from the base.
    threshold : float
        The base; ``inf`` never stops early.
    """

    schedule: AbstractSchedule
    threshold: float = math.inf

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Put the base and the tables on the device."""
        base = comparable(self.threshold, device=device)
        return {"knob": base} | self.schedule.tables(device=device)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare in float32; NaN, minus infinity and an infinite threshold never stop."""
        return score >= self.schedule.threshold(state["knob"], features, state), state

    def with_knob(self, knob: float) -> Self:
        """Return the same schedule around another base."""
        changes: dict[str, Any] = {"threshold": float(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then quantiles of the bases at which the tokens just stop, high to low.

        The base at which a token just stops at a stage is found by bisection over the observed
        scores and offsets, which works for every schedule that rises with its base.
        """
        scores = np.asarray(trace.scores, dtype=np.float32)
        best = np.full(scores.shape[0], -np.inf, dtype=np.float32)
        for stage in range(scores.shape[1]):
            here = Features(stage=stage, position=torch.from_numpy(positions_of(trace).copy()))
            best = np.fmax(best, self._critical(here, torch.from_numpy(scores[:, stage].copy())))
        return knob_path(best, size=size)

    def _critical(self, features: Features, score: Tensor) -> np.ndarray[Any, Any]:
        """Largest base, float32 [n_tokens], at which ``score`` still stops; -inf if none."""
        tables = self.schedule.tables(device=torch.device("cpu"))
        low = torch.full_like(score, -_WIDEST)
        high = torch.full_like(score, _WIDEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            stops = score >= self.schedule.threshold(middle, features, tables)
            low, high = torch.where(stops, middle, low), torch.where(stops, high, middle)
        return torch.where(low > -_WIDEST, low, -math.inf).numpy()


_WIDEST = 1024.0  # bases beyond this are not searched
_HALVINGS = 40  # to the last bit of a float32 near 1
