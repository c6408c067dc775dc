"""Bounds that use the sample variance: Maurer-Pontil (finite sample) and normal (asymptotic)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._validation import (
    check_positive,
    check_probability,
    check_risk,
    float_matrix,
    require_at_least,
    require_at_most,
)

Array = NDArray[np.float64]


def maurer_pontil_upper_bound(losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
    r"""Empirical Bernstein upper confidence bound on E L.

    .. math:: U = \hat r + \sqrt{\frac{2 v \ln(2/\delta)}{n}} + \frac{7 B \ln(2/\delta)}{3 (n - 1)}

    with v the unbiased sample variance of the losses (not of means over columns).

    Parameters
    ----------
    losses : array_like of float, [n_units, n_columns] or [n_units]
        Losses of independent units in [0, bound].
    delta : float
        Error probability in (0, 1).
    bound : float
        Declared upper bound of the loss.

    Returns
    -------
    ndarray of float64, [n_columns]
        P(E L > U) <= delta; at most `bound`, and `bound` for a single unit.

    References
    ----------
    Maurer and Pontil (2009), arXiv:0907.3740, theorem 4.
    """
    check_probability("delta", delta)
    mean, spread, n, upper = _moments(losses, bound)
    if n < 2:
        return np.full_like(mean, upper)
    log_term = math.log(2.0 / delta)
    radius = spread * math.sqrt(2.0 * log_term / n) + 7.0 * log_term / (3.0 * (n - 1))
    return upper * np.minimum(mean + radius, 1.0)


def maurer_pontil_log_p(losses: ArrayLike, *, risk: float, bound: float = 1.0) -> Array:
    """Log p-value of H: E L > risk: the log of the delta at which the bound equals the level.

    Parameters and references as `maurer_pontil_upper_bound`, with `risk` in (0, bound).
    """
    level, upper = check_risk(risk, bound)
    mean, spread, n, _ = _moments(losses, bound)
    if n < 2:
        return np.zeros_like(mean)
    linear, quadratic = spread * math.sqrt(2.0 / n), 7.0 / (3.0 * (n - 1))
    gap = np.maximum(level / upper - mean, 0.0)
    root = (np.sqrt(linear**2 + 4.0 * quadratic * gap) - linear) / (2.0 * quadratic)
    return np.minimum(math.log(2.0) - root**2, 0.0)


def normal_upper_bound(losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
    r"""Asymptotic upper confidence bound :math:`\hat r + z_{1-\delta}\,\hat\sigma/\sqrt n`.

    No finite-sample guarantee: for skewed losses it fails more often than delta. Parameters as
    `maurer_pontil_upper_bound`, negative losses allowed. Without spread it is `bound`.
    """
    check_probability("delta", delta)
    mean, spread, n, upper = _moments(losses, bound, signed=True)
    radius = float(special.ndtri(1.0 - delta)) * spread / math.sqrt(n)
    return upper * np.where(spread > 0.0, np.minimum(mean + radius, 1.0), 1.0)


def normal_log_p(losses: ArrayLike, *, risk: float, bound: float = 1.0) -> Array:
    r"""Asymptotic log p-value :math:`\ln\Phi(\sqrt n(\hat r - r)/\hat\sigma)`; 0 without spread.

    No finite-sample guarantee. Parameters as `normal_upper_bound`, with `risk` in (0, bound).
    """
    level, upper = check_risk(risk, bound)
    mean, spread, n, _ = _moments(losses, bound, signed=True)
    some = spread > 0.0
    z = math.sqrt(n) * (mean - level / upper) / np.where(some, spread, 1.0)
    return np.asarray(np.where(some, special.log_ndtr(z), 0.0))


def _moments(
    losses: ArrayLike, bound: float, *, signed: bool = False
) -> tuple[Array, Array, int, float]:
    """Mean and unbiased standard deviation per column in units of the bound, n, the bound."""
    matrix = float_matrix("losses", losses)
    upper = check_positive("bound", bound)
    require_at_most("losses", matrix, upper)
    if not signed:
        require_at_least("losses", matrix, 0.0, reason="the inequality needs a lower bound")
    n = matrix.shape[0]
    if n > 1:  # equal values have no spread; their rounded mean must not give them one
        varied = matrix.min(axis=0) < matrix.max(axis=0)
        spread = np.where(varied, matrix.std(axis=0, ddof=1), 0.0)
    else:
        spread = np.zeros(matrix.shape[1])
    return matrix.mean(axis=0) / upper, spread / upper, n, upper
