"""Watching a certified risk: alarms with a false-alarm promise made beforehand, on many streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._edetector import (
    Array,
    EDetectorState,
    Flags,
    advance,
    check_state,
    fresh_state,
    restarted,
    stream_flags,
    stream_values,
)
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._state_io import pack_state, unpack_state
from adaptive.calibration._validation import check_count, check_number, check_probability

SAFE = 0.9  # largest share of a bet that a unit without loss takes
_GRID = 8
_TINY = 1e-300  # no room to lose: any bet is safe


class AbstractRiskMonitor(ABC):
    r"""What the risk monitors share: betting that the loss exceeds what was promised.

    A unit with loss X contributes, for every bet, the factor

    .. math:: L_t = 1 + \lambda (X_t - g_t), \qquad \lambda \le \tfrac{0.9}{g_t - a}

    to an e-detector, where g is `bound`, or the unit's own `expected` loss where one is given, and
    a is `lower`. Its mean is at most 1 as long as the unit's mean loss, given the past, is at most
    g. Final classes: `RiskMonitor`, `LifetimeRiskMonitor`.
    """

    bound: float
    lower: float
    upper: float
    bets: tuple[float, ...] | None
    warn: float

    @property
    @abstractmethod
    def threshold(self) -> float:
        """Evidence at which the alarm is on."""

    @abstractmethod
    def spend(self, units: NDArray[np.int64], count: ArrayLike = 1) -> Array:
        """Weight of "the change begins with one of the next `count` units", after `units`."""

    @abstractmethod
    def reserve(self, units: NDArray[np.int64]) -> Array:
        """Weight left for changes that begin later."""

    @abstractmethod
    def false_alarm_limit(self, units: int) -> float:
        """P(false alarm within so many units) is at most this."""

    @property
    def bet_sizes(self) -> Array:
        r"""Bets :math:`\lambda` per unit of loss [n_bets], before the cap for safety."""
        if self.bets is not None:
            return np.asarray(self.bets)
        return _grid(self.upper - self.lower, self.bound - self.lower)

    def init(self, streams: int = 1) -> EDetectorState:
        """State before the first unit of every stream."""
        return fresh_state(streams, self.bet_sizes.size)

    def update(
        self,
        state: EDetectorState,
        losses: ArrayLike,
        *,
        expected: ArrayLike | None = None,
        audited: ArrayLike | None = None,
        active: ArrayLike | None = None,
    ) -> EDetectorState:
        """State after one more unit per stream.

        Parameters
        ----------
        state : EDetectorState
        losses : array_like [n_streams]
            In [lower, upper]; not read where `audited` or `active` is false.
        expected : array_like [n_streams], optional
            Upper limit of each unit's expected loss given its scores (`ExpectedLossCurve`, meaned
            over the unit's tokens), known before the loss is; `bound` if left out.
        audited : array_like of bool [n_streams], optional
            Units whose loss was observed. The others count as units, with factor 1. Whether a unit
            is audited may depend on the past (and, with `expected`, on the unit's scores), never on
            its loss.
        active : array_like of bool [n_streams], optional
            Streams that have a unit; nothing changes for the others.

        Raises
        ------
        InvalidArgumentError
            For a loss that is NaN or outside [lower, upper], or a wrong shape.

        Notes
        -----
        A label that arrives late is a unit when it arrives; leave its unit out (`active`) before.
        A label that never arrives is a unit that was not audited. Both are valid as long as
        arrival does not depend on the loss.
        """
        check_state(state, EDetectorState, self.bet_sizes.size)
        on = stream_flags("active", active, state.streams)
        seen = stream_flags("audited", audited, state.streams) & on
        x = stream_values("losses", losses, state.streams, on=seen, low=self.lower, high=self.upper)
        factors = self._factors(x, seen, self._levels(expected, seen))
        moved = advance(
            state.statistics,
            factors,
            weight=self.spend(state.units)[:, None],
            threshold=self.threshold,
        )
        statistics = np.where(on[:, None], moved, state.statistics)
        after = EDetectorState(
            statistics, state.units + on, state.labelled + seen, state.first_alarm
        )
        new = (self.evidence(after) >= self.threshold) & (state.first_alarm == 0) & on
        first = np.where(new, after.units, state.first_alarm)
        return EDetectorState(after.statistics, after.units, after.labelled, first)

    def evidence(self, state: EDetectorState) -> Array:
        """Evidence for a change so far [n_streams]; the alarm is on at `threshold`."""
        total = np.add.reduce(state.statistics, axis=1)
        return np.asarray(total / state.statistics.shape[1] + self.reserve(state.units))

    def alarm(self, state: EDetectorState) -> Flags:
        """Whether the alarm has ever been on [n_streams]; it stays on until `restart`."""
        return np.asarray(state.first_alarm > 0)

    def warning(self, state: EDetectorState) -> Flags:
        """Whether the evidence is at least `warn` times the threshold now [n_streams]."""
        return np.asarray(self.evidence(state) >= self.warn * self.threshold)

    def restart(self, state: EDetectorState, streams: ArrayLike) -> EDetectorState:
        """State in which the chosen streams (mask or indices) begin anew, with a new promise."""
        return restarted(state, streams)

    def to_dict(self, state: EDetectorState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> EDetectorState:
        """State from `to_dict`; refuses one written by another monitor or other settings."""
        return unpack_state(self, data, EDetectorState)

    def _levels(self, expected: ArrayLike | None, seen: Flags) -> Array:
        if expected is None:
            return np.full(seen.size, self.bound)
        return stream_values(
            "expected", expected, seen.size, on=seen, low=self.lower, high=self.upper
        )

    def _factors(self, x: Array, seen: Flags, levels: Array) -> Array:
        """Factors [n_streams, n_bets]; 1 where nothing was seen, or nothing can exceed."""
        use = seen & (levels < self.upper)
        gain = np.where(use, x - levels, 0.0)[:, None]
        room = np.maximum(np.where(use, levels - self.lower, 0.0), _TINY)[:, None]
        return 1.0 + np.minimum(self.bet_sizes, SAFE / room) * gain


@dataclass(frozen=True)
class RiskMonitor(AbstractRiskMonitor):
    r"""Alarm when the mean loss exceeds a bound, with a promised average run length.

    The Shiryaev-Roberts e-detector with a grid of bets: nothing to tune.

    Parameters
    ----------
    bound : float
        Certified risk m: no alarm is due while E[X | past] <= m. In (lower, upper). It must be a
        bound (the promise, or an upper confidence bound), not a calibration mean.
    average_run_length : float
        A, above 1: the mean number of units to a false alarm is at least A, and
        P(false alarm within T units) <= T/A for every T.
    lower, upper : float
        Ends of the loss. Betting against a mean needs a bound *below*: losses that may be
        negative are welcome if they have one, and are never cut off there.
    bets : tuple of float, optional
        Bets per unit of loss, in (0, 1 / (bound - lower)). By default 8 in geometric progression
        from 0.05 / (upper - lower) to 0.45 / (bound - lower).
    warn : float
        Share of the threshold at which a warning is on, in (0, 1).

    Notes
    -----
    Assumes that each unit's mean loss, *given everything before it*, is at most its bound. Units
    drawn independently do that with `bound`; tokens do not (a mean of m over bursts of difficult
    tokens is not a mean of m given the past): watch requests, or give `expected` from an
    `ExpectedLossCurve`, which explains the bursts. With `expected` the monitor sees that the
    curve has stopped holding; traffic that is more difficult *within* the curve is for
    `ScoreDrift`, or for a monitor without `expected`. State and time per unit are constant; about
    0.2 microseconds per stream for thousands of streams in one call.

    References
    ----------
    Shin, Ramdas and Rinaldo (2024), doi:10.51387/23-NEJSDS51; Waudby-Smith and Ramdas (2024),
    doi:10.1093/jrsssb/qkad009.

    Examples
    --------
    >>> monitor = RiskMonitor(0.05, average_run_length=10_000)
    >>> state = monitor.init(2)
    >>> for unit in range(200):
    ...     state = monitor.update(state, [unit % 20 == 0, unit % 5 == 0])
    >>> monitor.alarm(state).tolist(), state.first_alarm.tolist()
    ([False, True], [0, 61])
    """

    bound: float
    average_run_length: float = 1e5
    lower: float = 0.0
    upper: float = 1.0
    bets: tuple[float, ...] | None = None
    warn: float = 0.1

    def __post_init__(self) -> None:
        if check_number("average_run_length", self.average_run_length) <= 1.0:
            raise InvalidArgumentError("average_run_length", self.average_run_length, "above 1")
        _check_settings(self)

    @property
    def threshold(self) -> float:
        """The average run length A."""
        return float(self.average_run_length)

    def spend(self, units: NDArray[np.int64], count: ArrayLike = 1) -> Array:
        """1 for each unit."""
        return np.broadcast_to(np.asarray(count, np.float64), units.shape)

    def false_alarm_limit(self, units: int) -> float:
        """``units / average_run_length``, at most 1."""
        return min(1.0, check_count("units", units, least=0) / self.threshold)

    def reserve(self, units: NDArray[np.int64]) -> Array:
        """None: the weights have no end."""
        return np.zeros(units.shape)


@dataclass(frozen=True)
class LifetimeRiskMonitor(AbstractRiskMonitor):
    r"""Alarm when the mean loss exceeds a bound; P(any false alarm, ever) at most alpha.

    The restarts at unit t have weight 1/(t(t+1)), which sum to 1, and the alarm is on when the
    evidence, weight not yet spent included, reaches 1/alpha.

    Parameters
    ----------
    bound, lower, upper, bets, warn
        As in `RiskMonitor`.
    alpha : float
        In (0, 1).

    Notes
    -----
    Assumptions as `RiskMonitor`. The price of "ever": detection takes about twice as long, and
    longer with the logarithm of the quiet time before.

    Examples
    --------
    >>> monitor = LifetimeRiskMonitor(0.05, alpha=0.01)
    >>> state = monitor.init()
    >>> while not monitor.alarm(state)[0]:
    ...     state = monitor.update(state, [state.units[0] % 5 == 0])
    >>> int(state.first_alarm[0])
    41
    """

    bound: float
    alpha: float = 0.05
    lower: float = 0.0
    upper: float = 1.0
    bets: tuple[float, ...] | None = None
    warn: float = 0.1

    def __post_init__(self) -> None:
        check_probability("alpha", self.alpha)
        _check_settings(self)

    @property
    def threshold(self) -> float:
        """1 / alpha."""
        return 1.0 / self.alpha

    def spend(self, units: NDArray[np.int64], count: ArrayLike = 1) -> Array:
        """1/(t(t+1)) for unit t, summed over the next `count`."""
        t, n = units + 1.0, np.asarray(count, np.float64)
        return np.asarray(n / (t * (t + n)))

    def false_alarm_limit(self, units: int) -> float:
        """`alpha`, however many."""
        return float(self.alpha)

    def reserve(self, units: NDArray[np.int64]) -> Array:
        """1 less the weights so far."""
        return np.asarray(1.0 / (units + 1.0))


@lru_cache(maxsize=256)
def _grid(span: float, room: float) -> Array:
    """Return the default bets; kept, because an update takes less time than making them."""
    bets = np.geomspace(0.05 / span, 0.5 * SAFE / room, _GRID)
    bets.flags.writeable = False
    return bets


def _check_settings(monitor: RiskMonitor | LifetimeRiskMonitor) -> None:
    low, high = check_number("lower", monitor.lower), check_number("upper", monitor.upper)
    if not low < check_number("bound", monitor.bound) < high:
        raise InvalidArgumentError("bound", monitor.bound, f"in ({low:g}, {high:g})")
    check_probability("warn", monitor.warn)
    if monitor.bets is None:
        return
    if not isinstance(monitor.bets, tuple):
        raise InvalidTypeError("bets", monitor.bets, "a tuple of numbers")
    largest = 1.0 / (monitor.bound - low)
    if not monitor.bets or not all(0.0 < check_number("bets", b) < largest for b in monitor.bets):
        raise InvalidArgumentError("bets", monitor.bets, f"in (0, {largest:g}), at least one")
