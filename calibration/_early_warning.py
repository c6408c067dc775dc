"""Indicators of critical slowing down: rolling ones for plots, moving ones in O(1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats

from adaptive.calibration._edetector import check_state, stream_flags, stream_values
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._state_io import pack_state, unpack_state
from adaptive.calibration._streams import simulate_ou
from adaptive.calibration._unit_tables import LARGEST_VALUE, bounded_vector
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_count,
    check_number,
    check_probability,
)

Array = NDArray[np.float64]
_QUARTILE = 0.25 / 0.675  # a kernel's quartiles lie at a quarter of its bandwidth
_LEAST_WINDOW = 10


@dataclass(frozen=True, eq=False)
class EarlyWarningSignals:
    """Indicators in a rolling window over a detrended series, and their trends.

    Parameters
    ----------
    trend, residuals : ndarray [n]
        Smoothed series, and what is left of the series.
    window : int
        Values per window; indicator i describes values i to i + window - 1.
    variance, autocorrelation, return_rate, skewness : ndarray [n - window + 1]
        Of the residuals in the window; the autocorrelation at lag 1, the return rate one minus it.
    tau : dict of str to float
        Kendall's rank correlation of each indicator with time.
    bandwidth : float
        Of the detrending.

    Notes
    -----
    For plots and for comparison with the literature, not for alarms: windows overlap, so that a
    stationary series often has a tau of 0.5 and more, and textbook p-values of tau mean nothing.
    `significance` compares with surrogates instead. `SlowingDown` is the detector.
    """

    trend: Array
    residuals: Array
    window: int
    variance: Array
    autocorrelation: Array
    return_rate: Array
    skewness: Array
    tau: dict[str, float]
    bandwidth: float

    def significance(self, *, surrogates: int = 200, rng: Rng = None) -> dict[str, float]:
        """P-values of the trends among series of the same persistence without a trend.

        Surrogates are first-order autoregressions fitted to the residuals, detrended and
        summed up in the same way. A p-value is the share of surrogates with a trend at least as
        strong: rising for variance and autocorrelation, falling for the return rate, either for
        the skewness.

        Parameters
        ----------
        surrogates : int
            The smallest p-value is ``1 / (surrogates + 1)``.
        rng : int, Generator or None
            Seed.
        """
        check_count("surrogates", surrogates)
        x = self.residuals
        if np.ptp(x) == 0.0:
            return dict.fromkeys(self.tau, 1.0)
        a = min(max(float(np.corrcoef(x[:-1], x[1:])[0, 1]), 1e-6), 1.0 - 1e-6)
        rate = -math.log(a)
        noise = float(x.std()) * math.sqrt(2.0 * rate)
        paths = simulate_ou(
            x.size, rate=rate, noise=noise, streams=surrogates, rng=as_generator(rng)
        )
        others = [
            early_warning_signals(path, window=self.window, bandwidth=self.bandwidth).tau
            for path in paths.T
        ]
        found = {}
        for name, tau in self.tau.items():
            drawn = np.array([other[name] for other in others])
            strong = {"return_rate": drawn <= tau, "skewness": np.abs(drawn) >= abs(tau)}
            as_strong = int(strong.get(name, drawn >= tau).sum())
            found[name] = (1 + as_strong) / (1 + surrogates)
        return found


def early_warning_signals(
    series: ArrayLike, *, window: float = 0.5, bandwidth: float = 0.2
) -> EarlyWarningSignals:
    """Return rolling variance, autocorrelation, return rate, skewness of a detrended series.

    Parameters
    ----------
    series : array_like [n]
        At least 20 values in time order, equally spaced.
    window : float
        Values per window, or a share of the series if at most 1.
    bandwidth : float
        Of the Gaussian smoothing that is subtracted, as a share of the series; 0 for no
        detrending. The kernel's quartiles are at a quarter of it, as in the literature. It looks
        both ways: for series that are over, not for alarms.

    Returns
    -------
    EarlyWarningSignals

    References
    ----------
    Dakos et al. (2012), Methods for detecting early warnings of critical transitions in time
    series, doi:10.1371/journal.pone.0041010.

    Examples
    --------
    >>> from adaptive.calibration import simulate_fold
    >>> path = simulate_fold(400, end=0.1, rng=3)[:, 0]
    >>> signals = early_warning_signals(path)
    >>> signals.tau["variance"] > 0.5, signals.significance(rng=0)["variance"] < 0.1
    (True, True)
    """
    x = bounded_vector("series", series)
    if x.size < 2 * _LEAST_WINDOW:
        raise InvalidArgumentError("series", f"{x.size} values", f"at least {2 * _LEAST_WINDOW}")
    size = check_number("window", window)
    width = int(size * x.size) if size <= 1.0 else int(size)
    if not _LEAST_WINDOW <= width < x.size:
        allowed = f"from {_LEAST_WINDOW} to {x.size - 1} values"
        raise InvalidArgumentError("window", window, allowed)
    if not 0.0 <= check_number("bandwidth", bandwidth) <= 1.0:
        raise InvalidArgumentError("bandwidth", bandwidth, "in [0, 1]")
    trend = np.zeros_like(x)
    if bandwidth > 0.0:
        trend = ndimage.gaussian_filter(x, sigma=_QUARTILE * bandwidth * x.size, mode="reflect")
    residuals = x - trend
    windows = np.lib.stride_tricks.sliding_window_view(residuals, width)
    found = _indicators(windows)
    time = np.arange(windows.shape[0])
    tau = {name: _tau(time, values) for name, values in found.items()}
    return EarlyWarningSignals(trend, residuals, width, **found, tau=tau, bandwidth=bandwidth)


def _indicators(windows: Array) -> dict[str, Array]:
    variance = windows.var(axis=1, ddof=1)
    before, after = windows[:, :-1], windows[:, 1:]
    before = before - before.mean(axis=1, keepdims=True)
    after = after - after.mean(axis=1, keepdims=True)
    scale = np.sqrt((before**2).sum(axis=1) * (after**2).sum(axis=1))
    centred = windows - windows.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        autocorrelation = (before * after).sum(axis=1) / scale
        skewness = (centred**3).mean(axis=1) / windows.var(axis=1) ** 1.5
    return {
        "variance": variance,
        "autocorrelation": autocorrelation,
        "return_rate": 1.0 - autocorrelation,
        "skewness": skewness,
    }


def _tau(time: NDArray[np.int64], values: Array) -> float:
    """Kendall's tau; 0 where it is not defined (an indicator that does not vary)."""
    found = float(stats.kendalltau(time, values).statistic)
    return 0.0 if math.isnan(found) else found


@dataclass(frozen=True, eq=False)
class MovingIndicatorState:
    """State of `MovingIndicators`: moving mean, variance, covariance at lag 1, last deviation."""

    mean: Array
    variance: Array
    covariance: Array
    deviation: Array
    units: NDArray[np.int64]


@dataclass(frozen=True)
class MovingIndicators:
    """Exponentially weighted mean, variance and lag-1 autocorrelation, in O(1), for dashboards.

    Parameters
    ----------
    memory : float
        Weight of the newest value, in (0, 1); about 1/memory values are remembered.

    Notes
    -----
    The moving mean lags a ramp by its slope over `memory`, and that lag looks like variance and
    autocorrelation: a rise of these alone does not tell a trend from slowing down.

    Examples
    --------
    >>> indicators = MovingIndicators(0.05)
    >>> state = indicators.init()
    >>> for value in [1.0, -1.0] * 100:
    ...     state = indicators.update(state, [value])
    >>> indicators.autocorrelation(state).round(2).tolist()
    [-1.0]
    """

    memory: float = 0.02

    def __post_init__(self) -> None:
        check_probability("memory", self.memory)

    def init(self, streams: int = 1) -> MovingIndicatorState:
        """State before the first value."""
        check_count("streams", streams)
        zero = np.zeros(streams)
        return MovingIndicatorState(zero, zero, zero, zero, np.zeros(streams, np.int64))

    def update(
        self, state: MovingIndicatorState, values: ArrayLike, *, active: ArrayLike | None = None
    ) -> MovingIndicatorState:
        """State after one more value per stream (where `active`); finite values [n_streams]."""
        check_state(state, MovingIndicatorState)
        on = stream_flags("active", active, state.units.size)
        limit = LARGEST_VALUE
        x = stream_values("values", values, state.units.size, on=on, low=-limit, high=limit)
        x = np.where(on, x, state.mean)
        a = self.memory
        mean = np.where(state.units == 0, x, state.mean + a * (x - state.mean))
        z = x - mean
        variance = (1.0 - a) * state.variance + a * z * z
        covariance = (1.0 - a) * state.covariance + a * z * state.deviation
        return MovingIndicatorState(
            np.where(on, mean, state.mean),
            np.where(on, variance, state.variance),
            np.where(on, covariance, state.covariance),
            np.where(on, z, state.deviation),
            state.units + on,
        )

    def autocorrelation(self, state: MovingIndicatorState) -> Array:
        """Lag-1 autocorrelation [n_streams]; 0 while the variance is."""
        safe = np.where(state.variance > 0.0, state.variance, 1.0)
        return np.asarray(np.where(state.variance > 0.0, state.covariance / safe, 0.0))

    def to_dict(self, state: MovingIndicatorState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> MovingIndicatorState:
        """State from `to_dict`; refuses one written with another memory."""
        return unpack_state(self, data, MovingIndicatorState)
