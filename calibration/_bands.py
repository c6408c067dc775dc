"""Distribution-free bands: lower limits on a distribution function at every order statistic."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import check_count, check_probability

Array = NDArray[np.float64]


def dkw_levels(n: int, *, delta: float) -> Array:
    r"""Levels :math:`b_i = i/n - \sqrt{\ln(1/\delta)/(2n)}` of the one-sided DKW band.

    Parameters
    ----------
    n : int
        Units.
    delta : float
        In (0, 1/2], where Massart's constant is proved.

    Returns
    -------
    ndarray [n]
        With probability at least 1 - delta, F(i-th smallest) >= b_i for all i.

    References
    ----------
    Massart (1990), doi:10.1214/aop/1176990746.
    """
    check_count("n", n)
    if check_probability("delta", delta) > 0.5:
        raise InvalidArgumentError("delta", delta, "at most 1/2 for the one-sided DKW band")
    ranks = np.arange(1, n + 1) / n
    return np.maximum(ranks - math.sqrt(-math.log(delta) / (2 * n)), 0.0)


def berk_jones_levels(n: int, *, delta: float, first: int = 1) -> Array:
    r"""Levels of the one-sided Berk-Jones band.

    .. math:: b_i = \mathrm{Beta}^{-1}(c;\, i,\, n - i + 1)

    The common level c is the largest one with joint probability at least 1 - delta, found from
    the exact non-crossing probability of order statistics. Equally strict at every rank, so much
    tighter than DKW in the tails.

    Parameters
    ----------
    n : int
        Units.
    delta : float
        In (0, 1).
    first : int
        Ranks below `first` are left without a limit (level 0), which tightens the others. Chosen
        from `n` and the quantity of interest, never from the losses.

    Returns
    -------
    ndarray [n]
        With probability at least 1 - delta, F(i-th smallest) >= b_i for all i.

    Notes
    -----
    Half a second at n = 1,000, ten seconds at n = 10,000; remembered between calls.

    References
    ----------
    Berk and Jones (1979), doi:10.1007/BF00533250. Moscovich and Nadler (2017),
    doi:10.1016/j.spl.2016.11.027, for the non-crossing probability. Snell et al. (2023), Quantile
    risk control, ICLR, arXiv:2212.13629, for the use and the truncation.

    Examples
    --------
    >>> berk_jones_levels(1, delta=0.1).round(4).tolist()
    [0.1]
    """
    check_count("n", n)
    check_probability("delta", delta)
    if not 1 <= check_count("first", first) <= n:
        raise InvalidArgumentError("first", first, f"in 1..{n}")
    return _berk_jones(n, float(delta), first).copy()


def no_crossing_probability(levels: Array) -> float:
    """P(the i-th smallest of n uniforms is at least ``levels[i]`` for every i).

    Parameters
    ----------
    levels : ndarray [n]
        Non-decreasing, in [0, 1).

    Notes
    -----
    The uniforms are points of a Poisson process given that n fall in [0, 1]; the count below
    each level walks through convolutions. Terms dropped make the answer smaller, never larger,
    by about 1e-15.
    """
    n = levels.size
    mass, lowest, before = np.ones(1), 0, 0.0
    for rank, level in enumerate(levels.tolist(), start=1):
        if level > before:
            kernel, shift = _poisson(n * (level - before))
            mass = np.convolve(mass, kernel)
            lowest += shift
            before = level
        mass = mass[: max(rank - lowest, 0)]
        drop = int(np.searchsorted(np.cumsum(mass), 1e-19))
        mass, lowest = mass[drop:], lowest + drop
        if mass.size == 0:
            return 0.0
    missing = n - (lowest + np.arange(mass.size))
    last = stats.poisson.pmf(missing, n * (1.0 - before))
    return float(mass @ last / stats.poisson.pmf(n, n))


@functools.lru_cache(maxsize=64)
def _berk_jones(n: int, delta: float, first: int) -> Array:
    ranks = np.arange(first, n + 1)

    def levels(log_c: float) -> Array:
        found = np.zeros(n)
        found[first - 1 :] = special.betaincinv(ranks, n - ranks + 1, math.exp(log_c))
        return found

    def excess(log_c: float) -> float:
        return no_crossing_probability(levels(log_c)) - (1.0 - delta)

    low, high = math.log(delta / n), math.log(delta)
    if n == first:
        return levels(high)
    root = optimize.brentq(excess, low, high, xtol=1e-4)
    return levels(root - 2e-4)


def _poisson(mean: float) -> tuple[Array, int]:
    """Poisson probabilities around the mean, all but about 1e-18 of them, and the first count."""
    reach = 9.5 * math.sqrt(mean)
    first = max(0, math.floor(mean - reach))
    counts = np.arange(first, math.ceil(mean + reach) + 20)
    return np.exp(special.xlogy(counts, mean) - mean - special.gammaln(counts + 1.0)), first
