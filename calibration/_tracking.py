"""Following a target risk under drift: a long-run average, not a certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._edetector import Array, check_state, stream_flags, stream_values
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._state_io import pack_state, unpack_state
from adaptive.calibration._unit_tables import LARGEST_VALUE
from adaptive.calibration._validation import check_count, check_number, check_positive


@dataclass(frozen=True, eq=False)
class TrackingState:
    """State of `RiskTracker`.

    Parameters
    ----------
    position : ndarray [n_streams]
        Where on the path, at most 1; 0 and below is full computation, 1 is the cheapest member.
    units : ndarray of int [n_streams]
        Units with a loss.
    total : ndarray [n_streams]
        Sum of the losses.
    """

    position: Array
    units: NDArray[np.int64]
    total: Array


@dataclass(frozen=True)
class RiskTracker:
    r"""Move along a path so that the running mean loss approaches a target, whatever happens.

    .. math:: \theta_{t+1} = \min\{1,\; \theta_t + \gamma\,(r - X_t)\}

    Online risk control, with member :math:`\lfloor \theta (J - 1) \rfloor` of a path of J members
    for the next unit and full computation (zero loss) for :math:`\theta \le 0`.

    Parameters
    ----------
    target : float
        r, in (0, upper).
    step : float
        :math:`\gamma`, positive: small follows slowly and smoothly.
    start : float
        First position, in [0, 1].
    upper : float
        Largest loss B.

    Notes
    -----
    For *every* sequence of losses, adversarial ones included, as long as full computation loses at
    most the target,

    .. math:: \frac1T \sum_{t \le T} X_t \;\le\; r + \frac{\theta_1 + \gamma (B - r)}{\gamma\, T}

    (`excess_limit`). That is all: a statement about one long average of what has happened. It says
    nothing about the next unit, any stretch or any group of them; losses far above the target
    can be paid for by quiet times before; and it needs the loss of every unit. It is not
    a certificate and never changes one. A monitor may watch a tracked policy: feed it the loss
    under the member that was used.

    References
    ----------
    Gibbs and Candes (2021), Adaptive conformal inference under distribution shift, NeurIPS,
    arXiv:2106.00170. Feldman, Ringel, Bates and Romano (2023), Achieving risk control in online
    learning settings, TMLR, arXiv:2205.09095.

    Examples
    --------
    >>> tracker = RiskTracker(0.1, step=0.05, start=0.1)
    >>> state = tracker.init()
    >>> for loss in [0, 0, 1]:
    ...     state = tracker.update(state, [loss])
    >>> state.position.round(3).tolist(), tracker.member(state, 21).tolist()
    ([0.065], [1])
    """

    target: float
    step: float = 0.01
    start: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        check_positive("step", self.step)
        if not 0.0 < check_number("target", self.target) < check_number("upper", self.upper):
            raise InvalidArgumentError("target", self.target, f"in (0, {self.upper:g})")
        if not 0.0 <= check_number("start", self.start) <= 1.0:
            raise InvalidArgumentError("start", self.start, "in [0, 1]")

    def init(self, streams: int = 1) -> TrackingState:
        """State before the first unit."""
        check_count("streams", streams)
        return TrackingState(
            np.full(streams, float(self.start)), np.zeros(streams, np.int64), np.zeros(streams)
        )

    def update(
        self, state: TrackingState, losses: ArrayLike, *, active: ArrayLike | None = None
    ) -> TrackingState:
        """State after one more loss per stream (where `active`), under the member that was used.

        Parameters
        ----------
        state : TrackingState
        losses : array_like [n_streams]
            At most `upper`; negative values welcome.
        active : array_like of bool [n_streams], optional
        """
        check_state(state, TrackingState)
        streams = state.units.size
        on = stream_flags("active", active, streams)
        x = stream_values("losses", losses, streams, on=on, low=-LARGEST_VALUE, high=self.upper)
        x = np.where(on, x, 0.0)
        moved = np.minimum(state.position + self.step * (self.target - x), 1.0)
        return TrackingState(np.where(on, moved, state.position), state.units + on, state.total + x)

    def member(self, state: TrackingState, members: int) -> NDArray[np.int64]:
        """Member of a path of `members`, from 0 (full computation), for the next unit."""
        check_count("members", members)
        return np.floor(np.clip(state.position, 0.0, 1.0) * (members - 1)).astype(np.int64)

    def mean_loss(self, state: TrackingState) -> Array:
        """Mean loss so far [n_streams]; 0 before the first unit."""
        return np.asarray(state.total / np.maximum(state.units, 1))

    def excess_limit(self, units: ArrayLike) -> Array:
        """How far the mean loss of so many units can be above the target, for certain."""
        reach = self.start / self.step + self.upper - self.target
        return np.asarray(reach / np.maximum(np.asarray(units, np.float64), 1.0))

    def to_dict(self, state: TrackingState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> TrackingState:
        """State from `to_dict`; refuses one written with other settings."""
        return unpack_state(self, data, TrackingState)
