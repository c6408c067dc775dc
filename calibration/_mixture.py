"""Mixtures of bets: order plays no part, and a histogram of the losses is all they need."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._betting import scale_losses
from adaptive.calibration._binomial import log_betainc
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._inversion import invert_log_p
from adaptive.calibration._validation import (
    as_floats,
    check_count,
    check_number,
    check_positive,
    check_probability,
    check_risk,
    float_matrix,
    require_at_most,
)

Array = NDArray[np.float64]
_FRACTIONS = np.geomspace(0.01, 0.99, 24)
_BLOCK = 16 * 1024


def constant_bet_log_wealth(
    losses: ArrayLike, *, bet: float, risk: float, bound: float = 1.0
) -> Array:
    r"""Log wealth of one constant bet: :math:`\sum_i \ln(1 - \nu (L_i - r) / B)`.

    Parameters
    ----------
    losses : array_like of float, [n_units, n_columns] or [n_units]
        Losses of at most `bound`; negative values welcome.
    bet : float
        The bet in units of the bound, in [0, 1 / (1 - risk / bound)].
    risk, bound : float
        Level and declared upper bound.

    Returns
    -------
    ndarray of float64, [n_columns]
        The exponential of which is an e-value for H: E L > risk; the units' order is irrelevant.
    """
    level, upper = check_risk(risk, bound)
    scaled, _ = scale_losses(losses, upper)
    level /= upper
    if not 0.0 <= check_number("bet", bet) <= 1.0 / (1.0 - level):
        raise InvalidArgumentError("bet", bet, f"in [0, {1.0 / (1.0 - level):g}]")
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(1.0 - bet * (scaled - level), 0.0)).sum(axis=0))


def mixture_log_p(losses: ArrayLike, *, risk: float, bound: float = 1.0) -> Array:
    r"""Log p-value of H: E L > risk by a uniform mixture of 24 constant bets.

    .. math:: E = \frac{1}{G} \sum_g \prod_i (1 - \nu_g (L_i - m)), \quad p = \min(1, 1/E)

    with the bets a fixed geometric grid of fractions of the largest bet 1/(1-m). Invariant under
    permutation of the units, and valid at every stopping time (Ville's inequality).

    Parameters and result as `constant_bet_log_wealth`, of which this is the mixture; the result
    is ln p, at most 0.

    References
    ----------
    Waudby-Smith and Ramdas (2024), doi:10.1093/jrsssb/qkad009, section 4.
    """
    level, upper = check_risk(risk, bound)
    scaled, _ = scale_losses(losses, upper)
    log_e = _log_e(scaled, np.full(scaled.shape[1], level / upper))
    return np.asarray(-np.maximum(log_e, 0.0))


def mixture_upper_bound(losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
    r"""Upper confidence bound on E L by the mixture of constant bets, found by bisection.

    With the bets fixed fractions f of the largest bet, each factor is
    :math:`1 - f + f (1 - L) / (1 - m)`, which grows with m: rejected levels form an interval.
    Parameters and result as `wsr_upper_bound`.
    """
    check_probability("delta", delta)
    scaled, upper = scale_losses(losses, bound)
    return upper * invert_log_p(
        lambda levels, columns: -_log_e(scaled[:, columns], levels),
        scaled.mean(axis=0),
        math.log(delta),
    )


@dataclass(frozen=True)
class LossHistogram:
    """Counts of losses rounded up to a grid: a mergeable, streaming summary for the mixture test.

    Rounding up never lowers a loss, so evidence from the counts is valid for the losses
    themselves; memory is bins x columns however many units there are.

    Parameters
    ----------
    low, bound : float
        Ends of the grid; losses below `low` count as `low`, losses above `bound` are an error.
    counts : ndarray of int64, [n_bins + 1, n_columns]
        Units per grid value, from `low` up to `bound` in equal steps.

    Examples
    --------
    >>> first = LossHistogram.of(np.zeros((60, 2)), bins=100)
    >>> second = LossHistogram.of(np.full((40, 2), 0.013), bins=100)
    >>> both = first.merge(second)
    >>> both.n_units, float(np.exp(both.log_p_values(risk=0.1))[0].round(6))
    (100, 0.001245)
    """

    low: float
    bound: float
    counts: NDArray[np.int64]

    @classmethod
    def of(
        cls, losses: ArrayLike, *, bins: int = 1000, low: float = 0.0, bound: float = 1.0
    ) -> LossHistogram:
        """Count losses [n_units, n_columns] on a grid of `bins` equal steps."""
        matrix = float_matrix("losses", losses)
        upper = check_positive("bound", bound)
        steps = check_count("bins", bins)
        if not check_number("low", low) < upper:
            raise InvalidArgumentError("low", low, f"below `bound` = {upper:g}")
        require_at_most("losses", matrix, upper)
        counts = [_counted_up(column, float(low), upper, steps) for column in matrix.T]
        return cls(float(low), upper, np.stack(counts, axis=1))

    @property
    def n_units(self) -> int:
        """Units counted."""
        return int(self.counts[:, 0].sum())

    @property
    def grid(self) -> Array:
        """Loss values [n_bins + 1] that the counts stand for."""
        steps = self.counts.shape[0] - 1
        return np.asarray(self.low + (self.bound - self.low) * np.arange(steps + 1) / steps)

    def merge(self, other: LossHistogram) -> LossHistogram:
        """Return the histogram of both sets of units."""
        same = (self.low, self.bound, self.counts.shape) == (
            other.low,
            other.bound,
            other.counts.shape,
        )
        if not same:
            raise InvalidArgumentError("other", "another grid", "a histogram on the same grid")
        return LossHistogram(self.low, self.bound, self.counts + other.counts)

    def log_p_values(self, *, risk: float) -> Array:
        """Return ln p [n_columns] of H: E L > risk by the mixture of constant bets."""
        level, upper = check_risk(risk, self.bound)
        steps = self.counts.shape[0] - 1
        gains = _log_gains(level / upper, self.low / upper, steps)
        log_e = special.logsumexp(gains @ self.counts, axis=0) - math.log(_FRACTIONS.size)
        return np.asarray(-np.maximum(log_e, 0.0))

    def upper_bounds(self, *, delta: float) -> Array:
        """Return upper confidence bounds [n_columns] on E L, as `mixture_upper_bound` does."""
        check_probability("delta", delta)
        used = self.counts.any(axis=1)
        grid, counts = self.grid[used, None] / self.bound, self.counts[used]
        return self.bound * invert_log_p(
            lambda levels, columns: -_log_e(grid, levels, counts[:, columns]),
            (grid * counts).sum(axis=0) / self.n_units,
            math.log(delta),
        )


def beta_mixture_log_p(
    errors: ArrayLike,
    n_units: ArrayLike,
    *,
    risk: ArrayLike,
    prior: tuple[float, float] = (1.0, 1.0),
) -> Array:
    r"""Anytime-valid log p-value of H: P(error) > risk for 0/1 losses, by a truncated Beta prior.

    The likelihood ratio of rates q < m against m, averaged over a Beta(a, b) prior cut at m:

    .. math:: \ln E = \ln B(k{+}a, n{-}k{+}b) + \ln I_m(k{+}a, n{-}k{+}b) - \ln B(a, b)
        - \ln I_m(a, b) - k \ln m - (n{-}k) \ln(1 - m)

    Parameters
    ----------
    errors, n_units : array_like of int
        Counts after any number of units, at any stopping time.
    risk : array_like of float
        Level m in (0, 1).
    prior : tuple of float
        Shapes (a, b) of the Beta prior.

    Returns
    -------
    ndarray of float64
        ln p = min(0, -ln E), broadcast shape.

    References
    ----------
    Robbins (1970), doi:10.1214/aoms/1177696786 (method of mixtures).

    Examples
    --------
    >>> float(-beta_mixture_log_p(0, 100, risk=0.05).round(6))
    3.504301
    """
    log_e = beta_mixture_log_wealth(errors, n_units, risk=risk, prior=prior)
    return np.minimum(-log_e, 0.0)


def beta_mixture_log_wealth(
    errors: ArrayLike,
    n_units: ArrayLike,
    *,
    risk: ArrayLike,
    prior: tuple[float, float] = (1.0, 1.0),
) -> Array:
    """Log e-value of `beta_mixture_log_p`, which may be negative; parameters as there."""
    a, b = (check_positive("prior", shape) for shape in prior)
    k, n, m = np.broadcast_arrays(
        as_floats("errors", errors), as_floats("n_units", n_units), as_floats("risk", risk)
    )
    if not ((m > 0.0) & (m < 1.0)).all():
        raise InvalidArgumentError("risk", risk, "in (0, 1)")
    if not ((k >= 0) & (k <= n) & (k == np.floor(k)) & (n == np.floor(n))).all():
        raise InvalidArgumentError("errors", errors, "whole numbers between 0 and `n_units`")
    posterior = special.betaln(k + a, n - k + b) + log_betainc(k + a, n - k + b, m)
    start = special.betaln(a, b) + log_betainc(a, b, m)
    return np.asarray(posterior - start - k * np.log(m) - (n - k) * np.log1p(-m))


def _counted_up(column: Array, low: float, upper: float, steps: int) -> NDArray[np.int64]:
    """Count losses [n] per grid value, each at the least one that is not below it."""
    grid = low + (upper - low) * np.arange(steps + 1) / steps
    counts = np.zeros(steps + 1, dtype=np.int64)
    for start in range(0, column.size, _BLOCK):
        losses = column[start : start + _BLOCK]
        position = np.maximum(losses, low)
        position -= low
        position *= steps / (upper - low)
        place = np.minimum(np.ceil(position, out=position), steps, out=position).astype(np.intp)
        place += grid[place] < losses
        counts += np.bincount(np.minimum(place, steps, out=place), minlength=steps + 1)
    return counts


@functools.lru_cache(maxsize=8)
def _log_gains(level: float, low: float, steps: int) -> Array:
    """Log of each bet's factor at each grid value [n_bets, n_bins + 1], in units of the bound."""
    grid = low + (1.0 - low) * np.arange(steps + 1) / steps
    room = (1.0 - grid) / (1.0 - level)
    return np.log1p(_FRACTIONS[:, None] * (room - 1.0))


def _log_e(scaled: Array, levels: Array, counts: NDArray[np.int64] | None = None) -> Array:
    """Log e-value per column of losses [n, J] or [n, 1] at levels [J], taken `counts` times."""
    room = (1.0 - scaled) / (1.0 - levels)
    logs = []
    for fraction in _FRACTIONS:
        gains = np.log1p(fraction * (room - 1.0))
        logs.append((gains if counts is None else gains * counts).sum(axis=0))
    return np.asarray(special.logsumexp(logs, axis=0) - math.log(len(logs)))
