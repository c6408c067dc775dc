"""Signs that come without labels: scores and depths that move, and a score that slows down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from adaptive.calibration import ScoreDrift, SlowingDown

State = dict[str, Any]
#: Fewest calibration units that a sign is built on.
_FEWEST = 30


@dataclass(frozen=True)
class Signs:
    """Detectors that read no labels. They raise the audit rate and never withdraw a policy.

    Each reads one number per unit, so that a journal of units replays exactly.

    Parameters
    ----------
    score, depth : ScoreDrift, optional
        Mean exit score, and mean depth, against those of the calibration units.
    slowing : SlowingDown, optional
        Mean exit score as a series that returns to its mean ever more slowly.
    """

    score: ScoreDrift | None = None
    depth: ScoreDrift | None = None
    slowing: SlowingDown | None = None

    @classmethod
    def fit(
        cls, scores: Sequence[float], depths: Sequence[float], *, average_run_length: float
    ) -> Self:
        """Build them from calibration units; what they cannot be built on is left out.

        Parameters
        ----------
        scores, depths : sequence of float
            One per calibration unit, in the random order of the split.
        average_run_length : float
            Of each sign.
        """
        drifts = {
            name: ScoreDrift.fit(values, average_run_length=average_run_length, rng=0)
            for name, values in (("score", scores), ("depth", depths))
            if len(values) >= _FEWEST and np.ptp(values) > 0
        }
        slowing = None
        if "score" in drifts:
            slowing = SlowingDown.fit(scores, average_run_length=average_run_length)
        return cls(**drifts, slowing=slowing)

    def init(self) -> State:
        """State before the first unit."""
        return {name: sign.init() for name, sign in self._present().items()}

    def update(self, state: State, *, score: float | None, depth: float) -> State:
        """State after a unit; a unit without a score is left out where scores are read."""
        new = dict(state)
        for name, sign in self._present().items():
            value = depth if name == "depth" else score
            if value is None or not math.isfinite(value):
                continue
            put = sign.features([value]) if isinstance(sign, ScoreDrift) else [value]
            new[name] = sign.update(state[name], put)
        return new

    def warnings(self, state: State, *, share: float = 1.0) -> tuple[str, ...]:
        """Names of the signs whose evidence is at least a share of their warning's level."""
        return tuple(
            name
            for name, sign in self._present().items()
            if sign.evidence(state[name])[0] >= share * sign.warn * sign.threshold
        )

    def to_dict(self, state: State) -> dict[str, Any]:
        """JSON form of a state, exact to the last bit."""
        return {name: sign.to_dict(state[name]) for name, sign in self._present().items()}

    def from_dict(self, data: Mapping[str, Any]) -> State:
        """Rebuild from :meth:`to_dict`."""
        return {name: sign.from_dict(data[name]) for name, sign in self._present().items()}

    def _present(self) -> dict[str, Any]:
        named = {"score": self.score, "depth": self.depth, "slowing": self.slowing}
        return {name: sign for name, sign in named.items() if sign is not None}
