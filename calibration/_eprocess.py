"""E-processes for a mean: evidence that may be looked at after every unit, over many streams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_active, check_count, check_number

Array = NDArray[np.float64]
BETS = (0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class EProcessState:
    """State of `MeanEProcess` on many streams.

    Parameters
    ----------
    log_wealth : ndarray [n_streams, n_bets]
        Log wealth of each bet.
    log_peak : ndarray [n_streams]
        Largest log e-value so far, at least 0.
    units : ndarray of int [n_streams]
        Units seen.
    """

    log_wealth: Array
    log_peak: Array
    units: NDArray[np.int64]

    @property
    def log_e(self) -> Array:
        """Log e-value now [n_streams]."""
        wealth = np.logaddexp.reduce(self.log_wealth, axis=1)
        return np.asarray(wealth - np.log(self.log_wealth.shape[1]))


@dataclass(frozen=True)
class MeanEProcess:
    r"""Evidence against "the mean is at least `level`", for values of at most `bound`.

    .. math:: E_t = \frac1G \sum_g \prod_{i \le t}
        \Big(1 - \frac{c_g}{B - m} (X_i - m)\Big)

    Parameters
    ----------
    level : float
        Null :math:`m`: E[X | past] >= level. Below `bound`.
    bound : float
        Upper bound :math:`B` of the values, which may be negative without limit.
    bets : tuple of float
        Shares :math:`c_g` of the largest safe bet, in (0, 1).

    Notes
    -----
    Under the null :math:`E_t` is a non-negative supermartingale from 1, so
    :math:`P(\sup_t E_t \ge 1/\delta) \le \delta`: stop whenever you like. The value does not
    depend on the order of the units. For the opposite null "the mean is at most m" of values of
    at least a, feed ``-X`` with ``level=-m, bound=-a``. An update costs O(1) per stream and bet.

    References
    ----------
    Waudby-Smith and Ramdas (2024), doi:10.1093/jrsssb/qkad009; Ville (1939).

    Examples
    --------
    >>> process = MeanEProcess(level=0.05)
    >>> state = process.init(1)
    >>> for _ in range(100):
    ...     state = process.update(state, [0.0])
    >>> bool(state.log_e[0] >= np.log(20))
    True
    """

    level: float
    bound: float = 1.0
    bets: tuple[float, ...] = BETS

    def __post_init__(self) -> None:
        check_number("bound", self.bound)
        if check_number("level", self.level) >= self.bound:
            raise InvalidArgumentError("level", self.level, f"below `bound` = {self.bound:g}")
        if not self.bets or not all(0.0 < bet < 1.0 for bet in self.bets):
            raise InvalidArgumentError("bets", self.bets, "in (0, 1), at least one")

    def init(self, n_streams: int) -> EProcessState:
        """State before the first unit."""
        check_count("n_streams", n_streams)
        return EProcessState(
            np.zeros((n_streams, len(self.bets))),
            np.zeros(n_streams),
            np.zeros(n_streams, dtype=np.int64),
        )

    def update(
        self, state: EProcessState, values: ArrayLike, *, active: ArrayLike | None = None
    ) -> EProcessState:
        """State after one more value per stream.

        Parameters
        ----------
        state : EProcessState
        values : array_like [n_streams]
        active : array_like of bool [n_streams], optional
            Streams that have a new value; values of the others are not read.

        Raises
        ------
        InvalidArgumentError
            If a value is NaN, infinite or above the bound, or a shape is wrong.
        """
        x = as_floats("values", values)
        on = check_active(active, state.units.shape)
        if x.shape != on.shape:
            raise InvalidArgumentError("values", f"shape {x.shape}", f"of shape {on.shape}")
        self._check(x[on])
        bets = np.asarray(self.bets) / (self.bound - self.level)
        gain = np.where(on, x - self.level, 0.0)
        log_wealth = state.log_wealth + np.log1p(-bets * gain[:, None])
        after = EProcessState(log_wealth, state.log_peak, state.units + on)
        return EProcessState(log_wealth, np.maximum(state.log_peak, after.log_e), state.units + on)

    def path(self, values: ArrayLike, *, start: ArrayLike | None = None) -> tuple[Array, Array]:
        """Log e-value of one stream after each of many values.

        Parameters
        ----------
        values : array_like [n]
        start : array_like [n_bets], optional
            Log wealth to begin with; zero if left out.

        Returns
        -------
        log_e : ndarray [n]
        log_wealth : ndarray [n_bets]
            After the last value, for the next call.
        """
        x = as_floats("values", values)
        if x.ndim != 1:
            raise InvalidArgumentError("values", f"shape {x.shape}", "a vector")
        self._check(x)
        bets = np.asarray(self.bets) / (self.bound - self.level)
        first = np.zeros(bets.size) if start is None else np.asarray(start, dtype=np.float64)
        gains = np.log1p(-bets * (x - self.level)[:, None])
        wealth = np.cumsum(np.vstack([first, gains]), axis=0)
        log_e = np.logaddexp.reduce(wealth[1:], axis=1) - np.log(bets.size)
        return log_e, wealth[-1]

    def _check(self, values: Array) -> None:
        if not np.isfinite(values).all():
            raise InvalidArgumentError("values", "NaN or infinity", "finite")
        if values.size and values.max() > self.bound:
            raise InvalidArgumentError("values", values.max(), f"at most {self.bound:g}")
