"""Confidence sequences for a mean: intervals that hold at all times at once, over many streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import (
    check_active,
    check_count,
    check_number,
    check_positive,
    check_probability,
)

Array = NDArray[np.float64]


def normal_mixture_boundary(variance: ArrayLike, *, delta: float, best_at: float) -> Array:
    r"""Boundary that a sub-Gaussian martingale crosses, ever, with probability at most delta.

    One-sided, half-normal mixture: the s solving
    :math:`2 \sqrt{\rho/(v+\rho)}\, e^{s^2/(2(v+\rho))}\, \Phi(s/\sqrt{v+\rho}) = 1/\delta`.

    Parameters
    ----------
    variance : array_like
        Intrinsic time v, non-negative: the sum of variance proxies so far.
    delta : float
        In (0, 1).
    best_at : float
        Intrinsic time at which the boundary is tightest.

    References
    ----------
    Howard, Ramdas, McAuliffe and Sekhon (2021), doi:10.1214/20-AOS1991, proposition 6.

    Examples
    --------
    >>> normal_mixture_boundary([1.0, 10.0], delta=0.05, best_at=10.0).round(6).tolist()
    [3.634305, 8.747084]
    """
    v = _intrinsic(variance)
    rho = _best_rho(best_at, delta)

    def log_martingale(s: Array) -> Array:
        scale = v + rho
        found: Array = (
            math.log(2.0)
            + 0.5 * np.log(rho / scale)
            + s * s / (2.0 * scale)
            + special.log_ndtr(s / np.sqrt(scale))
        )
        return found

    return _solve(log_martingale, -math.log(delta), v.shape)


def gamma_exponential_boundary(
    variance: ArrayLike, *, delta: float, scale: float, best_at: float
) -> Array:
    """Boundary that a sub-exponential martingale crosses, ever, with probability at most delta.

    Parameters
    ----------
    variance, delta, best_at
        As in `normal_mixture_boundary`.
    scale : float
        Scale c of the sub-exponential increments: the range, for bounded values.

    References
    ----------
    Howard, Ramdas, McAuliffe and Sekhon (2021), doi:10.1214/20-AOS1991, proposition 9.

    Examples
    --------
    >>> found = gamma_exponential_boundary([1.0, 10.0], delta=0.05, scale=1.0, best_at=10.0)
    >>> found.round(6).tolist()
    [5.806373, 11.549352]
    """
    v = _intrinsic(variance)
    c = check_positive("scale", scale)
    rho = _best_rho(best_at, delta) / c**2
    leading = rho * math.log(rho) - special.gammaln(rho) - math.log(special.gammainc(rho, rho))
    shape = v / c**2 + rho

    def log_martingale(s: Array) -> Array:
        shift = s / c + v / c**2
        found: Array = (
            leading
            + special.gammaln(shape)
            + np.log(special.gammainc(shape, shift + rho))
            - shape * np.log(shift + rho)
            + shift
        )
        return found

    return _solve(log_martingale, -math.log(delta), v.shape)


@dataclass(frozen=True, eq=False)
class MomentState:
    """State of `EmpiricalBernsteinSequence`: units, sums and intrinsic times [n_streams] each."""

    units: NDArray[np.int64]
    total: Array
    variance: Array


@dataclass(frozen=True)
class EmpiricalBernsteinSequence:
    r"""Two-sided confidence sequence for the mean of bounded values, O(1) state.

    .. math:: \bar X_t \pm u_{\delta/2}(V_t)/t, \qquad V_t = \sum_{i \le t}(X_i - \hat\mu_{i-1})^2

    with the gamma-exponential boundary u at scale ``high - low``.

    Parameters
    ----------
    delta : float
        P(some interval ever misses the mean) is at most delta.
    low, high : float
        Bounds of the values.
    best_at : float
        Intrinsic time (about variance x units) at which the interval is to be tightest.

    Notes
    -----
    Holds for values whose conditional mean given the past is constant; no other assumption than
    the bounds.

    References
    ----------
    Howard, Ramdas, McAuliffe and Sekhon (2021), doi:10.1214/20-AOS1991, theorem 4.
    """

    delta: float
    low: float = 0.0
    high: float = 1.0
    best_at: float = 10.0

    def __post_init__(self) -> None:
        check_probability("delta", self.delta)
        check_positive("best_at", self.best_at)
        if check_number("high", self.high) <= check_number("low", self.low):
            raise InvalidArgumentError("high", self.high, f"above `low` = {self.low:g}")

    def init(self, n_streams: int) -> MomentState:
        """State before the first unit."""
        check_count("n_streams", n_streams)
        return MomentState(np.zeros(n_streams, np.int64), np.zeros(n_streams), np.zeros(n_streams))

    def update(
        self, state: MomentState, values: ArrayLike, *, active: ArrayLike | None = None
    ) -> MomentState:
        """State after one more value per stream (where `active`)."""
        x, on = _values(values, active, state.units.shape, self.low, self.high)
        middle = 0.5 * (self.low + self.high)
        predicted = (middle + state.total) / (1.0 + state.units)
        return MomentState(
            state.units + on,
            state.total + np.where(on, x, 0.0),
            state.variance + np.where(on, (x - predicted) ** 2, 0.0),
        )

    def interval(self, state: MomentState) -> tuple[Array, Array]:
        """Lower and upper limits now [n_streams] each."""
        reach = gamma_exponential_boundary(
            state.variance,
            delta=self.delta / 2.0,
            scale=self.high - self.low,
            best_at=self.best_at,
        )
        units = np.maximum(state.units, 1)
        mean = state.total / units
        seen = state.units > 0
        lower = np.where(seen, np.maximum(mean - reach / units, self.low), self.low)
        upper = np.where(seen, np.minimum(mean + reach / units, self.high), self.high)
        return lower, upper


@dataclass(frozen=True, eq=False)
class BettingState:
    """State of `BettingSequence`.

    Parameters
    ----------
    log_wealth : ndarray [n_streams, 2, n_grid]
        Of bets that the mean is above, and below, each grid point.
    lower, upper : ndarray [n_streams]
        Limits, intersected over time, in units of the range.
    units : ndarray of int [n_streams]
    total, squares : ndarray [n_streams]
        Running sum, and running sum of squared distances to the running mean.
    """

    log_wealth: Array
    lower: Array
    upper: Array
    units: NDArray[np.int64]
    total: Array
    squares: Array


@dataclass(frozen=True)
class BettingSequence:
    """Two-sided confidence sequence for a bounded mean by hedged bets on a grid of means.

    Tighter than `EmpiricalBernsteinSequence`, at the cost of one wealth pair per grid point.

    Parameters
    ----------
    delta : float
        P(some interval ever misses the mean) is at most delta.
    low, high : float
        Bounds of the values.
    n_grid : int
        Grid points inside the range; limits are rounded outwards to the grid.

    References
    ----------
    Waudby-Smith and Ramdas (2024), doi:10.1093/jrsssb/qkad009, section 4.
    """

    delta: float
    low: float = 0.0
    high: float = 1.0
    n_grid: int = 400

    def __post_init__(self) -> None:
        check_probability("delta", self.delta)
        check_count("n_grid", self.n_grid, least=2)
        if check_number("high", self.high) <= check_number("low", self.low):
            raise InvalidArgumentError("high", self.high, f"above `low` = {self.low:g}")

    def init(self, n_streams: int) -> BettingState:
        """State before the first unit."""
        check_count("n_streams", n_streams)
        return BettingState(
            np.zeros((n_streams, 2, self.n_grid)),
            np.zeros(n_streams),
            np.ones(n_streams),
            np.zeros(n_streams, np.int64),
            np.zeros(n_streams),
            np.zeros(n_streams),
        )

    def update(
        self, state: BettingState, values: ArrayLike, *, active: ArrayLike | None = None
    ) -> BettingState:
        """State after one more value per stream (where `active`)."""
        raw, on = _values(values, active, state.units.shape, self.low, self.high)
        x = np.where(on, (raw - self.low) / (self.high - self.low), 0.0)
        grid = self._grid()
        t = state.units + 1.0
        variance = (0.25 + state.squares) / t
        bet = np.sqrt(2.0 * math.log(2.0 / self.delta) / (variance * t * np.log1p(t)))[:, None]
        gap = x[:, None] - grid
        above = np.log1p(np.minimum(bet, 0.5 / grid) * gap)
        below = np.log1p(-np.minimum(bet, 0.5 / (1.0 - grid)) * gap)
        step = np.where(on[:, None, None], np.stack([above, below], axis=1), 0.0)
        log_wealth = state.log_wealth + step
        lower, upper = self._limits(log_wealth, grid)
        total = state.total + x
        mean = (0.5 + total) / (t + 1.0)
        return BettingState(
            log_wealth,
            np.maximum(state.lower, lower),
            np.minimum(state.upper, upper),
            state.units + on,
            total,
            state.squares + np.where(on, (x - mean) ** 2, 0.0),
        )

    def interval(self, state: BettingState) -> tuple[Array, Array]:
        """Lower and upper limits now [n_streams] each."""
        span = self.high - self.low
        return self.low + span * state.lower, self.low + span * state.upper

    def _grid(self) -> Array:
        return np.arange(1, self.n_grid + 1) / (self.n_grid + 1.0)

    def _limits(self, log_wealth: Array, grid: Array) -> tuple[Array, Array]:
        """Largest mean rejected from below, smallest rejected from above; hedge of one half."""
        rejected = log_wealth >= math.log(2.0 / self.delta)
        lower = np.where(rejected[:, 0], grid, 0.0).max(axis=1)
        upper = np.where(rejected[:, 1], grid, 1.0).min(axis=1)
        return lower, upper


def _values(
    values: ArrayLike, active: ArrayLike | None, shape: tuple[int, ...], low: float, high: float
) -> tuple[Array, NDArray[np.bool_]]:
    x = np.asarray(values, dtype=np.float64)
    on = check_active(active, shape)
    if x.shape != shape:
        raise InvalidArgumentError("values", f"shape {x.shape}", f"of shape {shape}")
    if not ((x[on] >= low) & (x[on] <= high)).all():
        raise InvalidArgumentError("values", values, f"in [{low:g}, {high:g}]")
    return x, on


def _intrinsic(variance: ArrayLike) -> Array:
    v = np.asarray(variance, dtype=np.float64)
    if not (np.isfinite(v) & (v >= 0.0)).all():
        raise InvalidArgumentError("variance", variance, "finite and non-negative")
    return v


def _best_rho(best_at: float, delta: float) -> float:
    """Mixture variance for which the one-sided boundary is about tightest at `best_at`."""
    check_positive("best_at", best_at)
    spread = -2.0 * math.log(2.0 * check_probability("delta", delta))
    if spread <= 0.0:
        return best_at
    return best_at / (spread + math.log1p(spread))


def _solve(
    log_martingale: Callable[[Array], Array], target: float, shape: tuple[int, ...]
) -> Array:
    """Find where an increasing log martingale reaches the target, from above, per element."""
    low, high = np.zeros(shape), np.ones(shape)
    while (short := log_martingale(high) < target).any():
        low, high = np.where(short, high, low), np.where(short, 2.0 * high, high)
    for _ in range(60):
        middle = 0.5 * (low + high)
        short = log_martingale(middle) < target
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return high
