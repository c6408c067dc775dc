"""Early warning of a regime shift: a sequential test that a process is slowing down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from adaptive.calibration._edetector import (
    Array,
    Flags,
    advance,
    check_state,
    chosen_streams,
    stream_flags,
    stream_values,
)
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._state_io import pack_state, unpack_state
from adaptive.calibration._unit_tables import LARGEST_VALUE, bounded_vector
from adaptive.calibration._validation import (
    as_floats,
    check_count,
    check_number,
    check_positive,
    check_probability,
)

_FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.175, 0.1)
_LARGEST = 1e6  # factor of a single pair: how far it can be believed


@dataclass(frozen=True, eq=False)
class SlowingDownState:
    """State of `SlowingDown`.

    Parameters
    ----------
    statistics : ndarray [n_streams, n_rates]
        One restarted statistic per alternative rate.
    previous : ndarray [n_streams]
        Last value; NaN before the first.
    units, first_alarm : ndarray of int [n_streams]
        Values seen, and the number of the one that raised the alarm (0 for none).
    """

    statistics: Array
    previous: Array
    units: NDArray[np.int64]
    first_alarm: NDArray[np.int64]


@dataclass(frozen=True)
class SlowingDown:
    r"""Evidence that a stationary process returns to its mean more slowly than it used to.

    Near a bifurcation the return rate falls to zero, and variance and autocorrelation rise with it:
    all three are one parameter of the Ornstein-Uhlenbeck process
    :math:`dx = -\kappa (x - \mu)\,dt + \sigma\,dW`. Each value contributes the likelihood ratio

    .. math:: L_t = \frac{N(x_t;\; \mu + a_1 (x_{t-1} - \mu),\; v_1)}
        {N(x_t;\; \mu + a_0 (x_{t-1} - \mu),\; v_0)}, \qquad
        a = e^{-\kappa}, \quad v = \frac{\sigma^2}{2\kappa}(1 - a^2)

    of a lower rate against `rate`, to a Shiryaev-Roberts e-detector over a grid of lower rates.

    Parameters
    ----------
    rate : float
        :math:`\kappa_0` per unit of time between values, positive.
    noise : float
        :math:`\sigma`, positive.
    mean : float
        :math:`\mu`.
    average_run_length : float
        A, above 1: mean number of values to a false alarm, and P(alarm within T) <= T/A, for a
        stationary process with these parameters.
    warn : float
        Share of the threshold at which a warning is on.

    Notes
    -----
    A warning for people and for the audit rate (`EvidenceAudits`), not an alarm: the promise is
    that of a model, not of every process. It cannot warn of a change that comes without slowing
    down: an abrupt change of traffic, a jump caused by noise, a new release. It also speaks up
    when nothing collapses afterwards: noise that grows, or a mean that drifts (subtract a trend
    first; a moving mean lags and looks like slowing down). Where the mean itself moves, a
    `RiskMonitor` or `ScoreDrift` usually sees it long before.

    References
    ----------
    Boettiger and Hastings (2012), Quantifying limits to detection of early warning for critical
    transitions, doi:10.1098/rsif.2012.0125. Boettiger, Ross and Hastings (2013),
    doi:10.1007/s12080-013-0192-6. Scheffer et al. (2009), doi:10.1038/nature08227.

    Examples
    --------
    >>> from adaptive.calibration import simulate_ou
    >>> detector = SlowingDown(rate=2.0, noise=0.1, average_run_length=1e4)
    >>> state = detector.init()
    >>> for value in simulate_ou(1000, rate=0.3, noise=0.1, rng=0)[:, 0]:
    ...     state = detector.update(state, [value])
    >>> bool(detector.alarm(state)[0])
    True
    """

    rate: float
    noise: float
    mean: float = 0.0
    average_run_length: float = 1e4
    warn: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rate", "noise"):
            value = check_positive(name, getattr(self, name))
            if not 1.0 / LARGEST_VALUE <= value <= LARGEST_VALUE:
                raise InvalidArgumentError(name, value, "from 1e-100 to 1e+100")
        check_number("mean", self.mean)
        if check_number("average_run_length", self.average_run_length) <= 1.0:
            raise InvalidArgumentError("average_run_length", self.average_run_length, "above 1")
        check_probability("warn", self.warn)

    @classmethod
    def fit(
        cls,
        series: ArrayLike,
        *,
        confidence: float = 0.95,
        average_run_length: float = 1e4,
        warn: float = 0.1,
    ) -> SlowingDown:
        """Parameters from a stationary calibration series, on the cautious side.

        Parameters
        ----------
        series : array_like [n]
            At least 30 values in time order, one per unit of time.
        confidence : float
            The autocorrelation and the noise are taken at their upper one-sided limits of this
            confidence (large-sample), so that the calibration's own error does not raise alarms.
        average_run_length, warn
            As in the class.
        """
        x = bounded_vector("series", series)
        if x.size < 30:
            raise InvalidArgumentError("series", f"{x.size} values", "at least 30 values")
        tail = 1.0 - check_probability("confidence", confidence)
        mean = float(x.mean())
        past, now = x[:-1] - mean, x[1:] - mean
        if not past.any():
            raise InvalidArgumentError("series", "constant values", "values that vary")
        n = past.size
        slope = float(past @ now / (past @ past))
        spread = math.sqrt(max(1.0 - slope * slope, 1.0 / n) / n)
        a = min(max(slope + stats.norm.isf(tail) * spread, math.exp(-5.0)), 1.0 - 1.0 / n)
        residuals = now - slope * past
        v = float(residuals @ residuals) / stats.chi2.ppf(tail, n - 1)
        rate = -math.log(a)
        noise = math.sqrt(2.0 * rate * v / (1.0 - a * a))
        return cls(rate, noise, mean, float(average_run_length), float(warn))

    @property
    def threshold(self) -> float:
        """The average run length A."""
        return float(self.average_run_length)

    def log_ratios(self, previous: ArrayLike, values: ArrayLike, *, rate: float) -> Array:
        """Log likelihood ratio of one lower rate against `rate`, per pair of values."""
        check_positive("rate", rate)
        before, now = as_floats("previous", previous), as_floats("values", values)
        return self._log_ratios(before, now, np.array([rate]))[..., 0]

    def init(self, streams: int = 1) -> SlowingDownState:
        """State before the first value of every stream."""
        check_count("streams", streams)
        counts = np.zeros(streams, np.int64)
        statistics = np.zeros((streams, len(_FRACTIONS)))
        return SlowingDownState(statistics, np.full(streams, np.nan), counts, counts)

    def update(
        self, state: SlowingDownState, values: ArrayLike, *, active: ArrayLike | None = None
    ) -> SlowingDownState:
        """State after one more value per stream (where `active`).

        Parameters
        ----------
        state : SlowingDownState
        values : array_like [n_streams]
            Finite.
        active : array_like of bool [n_streams], optional
        """
        check_state(state, SlowingDownState, len(_FRACTIONS))
        on = stream_flags("active", active, state.units.size)
        limit = LARGEST_VALUE
        x = stream_values("values", values, state.units.size, on=on, low=-limit, high=limit)
        second = on & ~np.isnan(state.previous)
        before, now = (np.where(second, array, self.mean) for array in (state.previous, x))
        logs = self._log_ratios(before, now, self.rate * np.array(_FRACTIONS))
        factors = np.exp(np.minimum(logs, math.log(_LARGEST)))
        moved = advance(state.statistics, factors, weight=1.0, threshold=self.threshold)
        after = SlowingDownState(
            np.where(second[:, None], moved, state.statistics),
            np.where(on, x, state.previous),
            state.units + on,
            state.first_alarm,
        )
        new = (self.evidence(after) >= self.threshold) & (state.first_alarm == 0) & on
        first = np.where(new, after.units, state.first_alarm)
        return SlowingDownState(after.statistics, after.previous, after.units, first)

    def evidence(self, state: SlowingDownState) -> Array:
        """Evidence for slowing down [n_streams]; the alarm is on at `threshold`."""
        return np.asarray(np.add.reduce(state.statistics, axis=1) / len(_FRACTIONS))

    def alarm(self, state: SlowingDownState) -> Flags:
        """Whether the evidence has ever reached the threshold [n_streams]."""
        return np.asarray(state.first_alarm > 0)

    def warning(self, state: SlowingDownState) -> Flags:
        """Whether the evidence is at least `warn` times the threshold now [n_streams]."""
        return np.asarray(self.evidence(state) >= self.warn * self.threshold)

    def restart(self, state: SlowingDownState, streams: ArrayLike) -> SlowingDownState:
        """State in which the chosen streams (mask or indices) begin anew, with a new promise."""
        chosen = chosen_streams(streams, state.units.size)
        return SlowingDownState(
            np.where(chosen[:, None], 0.0, state.statistics),
            np.where(chosen, np.nan, state.previous),
            np.where(chosen, 0, state.units),
            np.where(chosen, 0, state.first_alarm),
        )

    def to_dict(self, state: SlowingDownState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> SlowingDownState:
        """State from `to_dict`; refuses one written by another detector or other settings."""
        return unpack_state(self, data, SlowingDownState)

    def _log_ratios(self, previous: Array, values: Array, rates: Array) -> Array:
        """Log likelihood ratios [..., n_rates], in units of the noise so that nothing overflows."""
        before, now = (
            np.clip((x - self.mean) / self.noise, -LARGEST_VALUE, LARGEST_VALUE)[..., None]
            for x in (previous, values)
        )
        (a0, v0), (a1, v1) = _step(np.array(self.rate)), _step(rates)
        gain = (now - a0 * before) ** 2 / v0 - (now - a1 * before) ** 2 / v1
        return np.asarray(0.5 * (np.log(v0 / v1) + gain))


def _step(rate: Array) -> tuple[Array, Array]:
    """Autocorrelation and conditional variance, in units of noise squared, of one step."""
    return np.exp(-rate), -np.expm1(-2.0 * rate) / (2.0 * rate)
