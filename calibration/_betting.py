r"""Tests by betting: wealth against "the mean loss is above the level".

For independent losses with upper bound B and any predictable bets :math:`0 \le \nu_t \le c/(B-m)`,

.. math:: K_t(m) = \prod_{i \le t} (1 - \nu_i (L_i - m))

is a non-negative supermartingale whenever :math:`E L \ge m`, so by Ville's inequality
:math:`p = 1 / \max_t K_t(m)` is a p-value. Only the upper bound matters: losses may be negative
without limit. The rows are bet on in the order given; **the order must be fixed before the losses
are looked at** (`control_risk` does so from its `rng`), because the best of many orders is not
valid.

References
----------
Waudby-Smith and Ramdas (2024), doi:10.1093/jrsssb/qkad009. Voracek and Orabona (2025),
arXiv:2505.22422. Bates et al. (2021), doi:10.1145/3478535, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._inversion import invert_log_p
from adaptive.calibration._running import Block, plain, timelines
from adaptive.calibration._validation import (
    check_positive,
    check_probability,
    check_risk,
    float_matrix,
    require_at_most,
)

Array = NDArray[np.float64]
_AGRAPA_CAP = 0.75
_GRID = 1000
_LEAST = -1e12
_BLOCK = 2_000_000


def wsr_log_p(losses: ArrayLike, *, risk: float, delta: float, bound: float = 1.0) -> Array:
    r"""Log p-value of H: E L > risk by the bets of Waudby-Smith and Ramdas.

    .. math:: \nu_t = \min\{1, \sqrt{2 \ln(1/\delta) / (n \hat\sigma^2_{t-1})}\}

    in units of the bound, with running mean and variance started at 1/2 and 1/4.

    Parameters
    ----------
    losses : array_like of float, [n_units, n_columns] or [n_units]
        Losses of independent units, in an order fixed before looking; at most `bound`, negative
        values welcome.
    risk : float
        Level, in (0, bound).
    delta : float
        Error probability that the bets aim at; the p-value is valid for every other one too.
    bound : float
        Declared upper bound of the loss.

    Returns
    -------
    ndarray of float64, [n_columns]
        ln p = -max_t ln K_t(risk), at most 0.

    Examples
    --------
    >>> float(np.exp(wsr_log_p(np.zeros(100), risk=0.05, delta=0.1))[0].round(6))
    0.008417
    """
    scaled, level = _prepare(losses, risk, delta, bound)
    return -np.concatenate([_peak(_wsr_bets(part, delta), level) for part in timelines(scaled)])


def agrapa_log_p(losses: ArrayLike, *, risk: float, delta: float, bound: float = 1.0) -> Array:
    r"""Log p-value of H: E L > risk by the aGRAPA bets; parameters as `wsr_log_p`.

    .. math:: \nu_t = \mathrm{clip}\Big(\frac{m - \hat\mu_{t-1}}
        {\hat\sigma^2_{t-1} + (m - \hat\mu_{t-1})^2},\; 0,\; \frac{3/4}{1 - m}\Big)

    The bets approximate the growth-optimal constant bet and do not depend on `delta`.
    """
    scaled, level = _prepare(losses, risk, delta, bound)
    return -np.concatenate([_agrapa_peak(part, level) for part in timelines(scaled)])


def star_log_p(
    losses: ArrayLike,
    *,
    risk: float,
    delta: float,
    bound: float = 1.0,
    prior_units: float = 40.0,
) -> Array:
    r"""Log p-value of H: E L > risk by bets that recalculate the distance to the target.

    .. math:: \nu_t = \min\Big\{\sqrt{\frac{2(\ln(1/\delta) - \ln K_{t-1})_+}{(n - t + 1)\, v_t}},
        \frac{1}{1 - m}\Big\}, \quad v_t = \frac{w\,m(1-m) + \sum_{i<t}(L_i - m)^2}{w + t - 1}

    in units of the bound, with w = `prior_units`: how many units' worth of trust the start value
    of the variance (that of a 0/1 loss at the level) gets. Small w overbets on rare large losses
    before the first of them is seen, and one such loss then ruins the wealth. Betting stops when
    the wealth reaches 1/delta, so the evidence is made for this one `delta`: powerful in a fixed
    sequence or with Bonferroni, where the level of each test is known beforehand. Valid by Ville's
    inequality for any predictable bet, any w. Cost: one pass over the units, sequential in wealth,
    vectorised over columns. Other parameters as `wsr_log_p`.

    References
    ----------
    Voracek and Orabona (2025), arXiv:2505.22422 (this variant follows the published idea; w is
    ours, w = 1 gives the form measured in the literature on early exits).

    Examples
    --------
    >>> float(np.exp(star_log_p(np.zeros(59), risk=0.05, delta=0.05))[0]) <= 0.05
    True
    """
    scaled, level = _prepare(losses, risk, delta, bound)
    prior = check_positive("prior_units", prior_units)
    if scaled.shape[1] == 1:
        return -np.array([_star_peak_scalar(scaled[:, 0].tolist(), level, delta, prior)])
    return -_star_peak(scaled, np.full(scaled.shape[1], level), delta, prior)


def wsr_upper_bound(losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
    r"""Upper confidence bound on E L by the WSR bets: inf{m : max_t K_t(m) >= 1/delta}.

    The bets do not depend on m and the wealth grows with m, so a root search finds the bound.
    P(E L > U) <= delta for independent losses of at most `bound` (down to zero from below: the
    bound is searched in [0, bound]); parameters and result as `wsr_log_p`.

    Examples
    --------
    >>> float(wsr_upper_bound(np.zeros(100), delta=0.1)[0].round(10))
    0.0237975915
    """
    check_probability("delta", delta)
    scaled, upper = scale_losses(losses, bound)
    target = math.log(delta)
    roots = [_wsr_root(tuple(part), target) for part in timelines(scaled)]
    return upper * np.concatenate(roots)


def agrapa_upper_bound(losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
    """Upper confidence bound on E L by the aGRAPA bets, on a grid of 1000 steps of `bound`.

    The bets depend on the level, so rejected levels need not form an interval. The bound is the
    grid point above the largest level that is *not* rejected, which is valid because the test at
    a grid point is a test of every mean between it and the next one.
    """
    check_probability("delta", delta)

    def peak(column: Array, levels: Array) -> Array:
        blocks = np.array_split(levels, max(1, column.size * levels.size // _BLOCK))
        losses = plain(column)
        return np.concatenate([_agrapa_peak([losses], block) for block in blocks])

    return grid_upper_bound(*scale_losses(losses, bound), delta, peak)


def star_upper_bound(
    losses: ArrayLike, *, delta: float, bound: float = 1.0, prior_units: float = 40.0
) -> Array:
    """Upper confidence bound on E L by target-recalculating bets, as `agrapa_upper_bound`."""
    check_probability("delta", delta)
    prior = check_positive("prior_units", prior_units)

    def peak(column: Array, levels: Array) -> Array:
        return _star_peak(column, levels, delta, prior)

    return grid_upper_bound(*scale_losses(losses, bound), delta, peak)


def scale_losses(losses: ArrayLike, bound: float) -> tuple[Array, float]:
    """Return losses [n_units, n_columns] in units of `bound`, checked against it, and `bound`.

    Gains beyond 1e12 bounds count as 1e12: sums beside them would be lost in rounding, and a loss
    that is raised never makes evidence.
    """
    matrix = float_matrix("losses", losses)
    upper = check_positive("bound", bound)
    require_at_most("losses", matrix, upper)
    least = _LEAST * upper
    if matrix.min() < least:
        matrix = np.maximum(matrix, least)
    return (matrix if upper == 1.0 else matrix / upper), upper


def _prepare(losses: ArrayLike, risk: float, delta: float, bound: float) -> tuple[Array, float]:
    level, upper = check_risk(risk, bound)
    check_probability("delta", delta)
    return scale_losses(losses, upper)[0], level / upper


def _moments_before(losses: Iterable[Block]) -> Iterator[tuple[Block, Array, Array]]:
    """Each block with the sums over the units before each: of losses, of squared deviations.

    They start at 1/2 and 1/4, so that sums over time are running mean and variance. A unit's
    deviation is from the mean that includes it.
    """
    total: float | Array = 0.5
    spread: float | Array = 0.25
    for block in losses:
        totals, total = block.sums_before(block.values, total)
        deviations = block.values * block.times
        deviations -= totals
        deviations /= block.times + 1.0
        deviations *= deviations
        spreads, spread = block.sums_before(deviations, spread)
        yield block, totals, spreads


def _wsr_bets(losses: Iterable[Block], delta: float) -> Iterator[tuple[Block, Array]]:
    for block, _, spreads in _moments_before(losses):
        bet = np.multiply(block.times, -2.0 * math.log(delta) / block.n_units)
        bet = np.divide(bet, spreads, out=spreads)
        np.sqrt(bet, out=bet)
        yield block, block.without_padding(np.minimum(bet, 1.0, out=bet))


def _agrapa_bets(losses: Iterable[Block], levels: float | Array) -> Iterator[tuple[Block, Array]]:
    limit = _AGRAPA_CAP / (1.0 - levels)
    for block, totals, spreads in _moments_before(losses):
        gap = levels - totals / block.times
        bets = np.clip(gap / (spreads / block.times + gap**2), 0.0, limit)
        yield block, block.without_padding(bets)


def _wsr_root(losses: Sequence[Block], target: float) -> Array:
    """Smallest level per column at which minus the largest log wealth is at most `target`."""
    laid = tuple(_wsr_bets(losses, math.exp(target)))
    block, bets = laid[0]
    if block.folded:
        mean = sum(float(part.values.sum()) for part in losses) / block.n_units
        return invert_log_p(lambda level, _: -_peak(laid, level), np.array([mean]), target)

    def log_p(levels: Array, columns: NDArray[np.intp]) -> Array:
        return -_peak([(plain(block.values[:, columns]), bets[:, columns])], levels)

    return invert_log_p(log_p, block.values.mean(axis=0), target)


def _peak(laid: Iterable[tuple[Block, Array]], level: float | Array) -> Array:
    """Largest log wealth per column, at least 0, of bets of 1 / (1 - level) or less.

    The bets are 0 in the padding. No factor is negative, in floating point neither.
    """
    wealth: float | Array = 0.0
    peak = np.zeros(1)
    for block, bet in laid:
        factors = block.values - level
        factors *= bet
        np.subtract(1.0, factors, out=factors)
        highest, wealth = block.log_products(factors, wealth)
        peak = np.maximum(peak, highest)
    return peak


def _agrapa_peak(losses: Iterable[Block], levels: float | Array) -> Array:
    return _peak(_agrapa_bets(losses, levels), levels)


def _star_peak(scaled: Array, levels: Array, delta: float, prior: float) -> Array:
    """Largest log wealth per column; `scaled` [n, J] or [n, 1] against levels [J]."""
    n = scaled.shape[0]
    target = -math.log(delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = 1.0 / (1.0 - levels)
        wealth, peak = np.zeros_like(levels), np.zeros_like(levels)
        spread = prior * levels * (1.0 - levels)
        for t, row in enumerate(scaled, start=1):
            need = np.maximum(target - wealth, 0.0)
            count = prior + t - 1.0
            bet = np.minimum(np.sqrt(2.0 * count * need / ((n - t + 1) * spread)), limit)
            step = row - levels
            wealth = wealth + np.log(np.maximum(1.0 - bet * step, 0.0))
            peak = np.fmax(peak, wealth)
            spread = spread + step * step
    return peak


def _star_peak_scalar(column: list[float], level: float, delta: float, prior: float) -> float:
    """Twin of `_star_peak` for one column: plain floats are ten times faster than arrays."""
    n = len(column)
    target = -math.log(delta)
    limit = 1.0 / (1.0 - level)
    wealth = peak = 0.0
    spread = prior * level * (1.0 - level)
    for t, loss in enumerate(column, start=1):
        need = target - wealth
        if need <= 0.0:
            break
        count = prior + t - 1.0
        bet = min(math.sqrt(2.0 * count * need / ((n - t + 1) * spread)), limit)
        step = loss - level
        factor = 1.0 - bet * step
        if factor <= 0.0:
            break
        wealth += math.log(factor)
        peak = max(peak, wealth)
        spread += step * step
    return peak


def grid_upper_bound(
    scaled: Array, upper: float, delta: float, peak: Callable[[Array, Array], Array]
) -> Array:
    """Return the bound of `agrapa_upper_bound` for any largest-log-wealth function.

    `peak(column [n, 1], levels [m]) -> [m]` must be a test of every mean above the level.
    """
    levels = np.arange(1, _GRID) / _GRID
    out = np.empty(scaled.shape[1])
    for j in range(scaled.shape[1]):
        kept = np.flatnonzero(peak(scaled[:, [j]], levels) < -math.log(delta))
        out[j] = (kept[-1] + 2) / _GRID if kept.size else 1.0 / _GRID
    return upper * out
