"""Exact binomial tests and Clopper-Pearson bounds, accurate in the far tail."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_probability, numeric

_TINY = 1e-280
_STEPS = 20_000


def log_betainc(a: ArrayLike, b: ArrayLike, x: ArrayLike) -> NDArray[np.float64]:
    """Return the natural log of the regularised incomplete beta function I_x(a, b).

    Where I_x underflows in double precision, the continued fraction of DLMF 8.17.22 is evaluated
    in log space, so that ln I = -12148.33 is told from ln I = -12149.33.

    Parameters
    ----------
    a, b : array_like of float
        Positive shapes.
    x : array_like of float
        Points in (0, 1).

    Returns
    -------
    ndarray of float64, broadcast shape

    References
    ----------
    NIST Digital Library of Mathematical Functions, https://dlmf.nist.gov/8.17.22

    Examples
    --------
    >>> float(np.round(log_betainc(980000, 20001, 0.95), 6))
    -12148.330674
    """
    a, b, x = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (a, b, x)))
    plain = special.betainc(a, b, x)
    with np.errstate(divide="ignore"):
        out = np.array(np.log(plain))
    deep = (plain < _TINY) & (x > 0.0)
    if deep.any():
        points = zip(a[deep].tolist(), b[deep].tolist(), x[deep].tolist(), strict=True)
        out[deep] = [_log_betainc_tail(*point) for point in points]
    return out


def binomial_log_p(
    errors: ArrayLike, n_units: ArrayLike, *, risk: ArrayLike
) -> NDArray[np.float64]:
    r"""Exact log p-value of H: P(error) > risk, from counts of independent 0/1 losses.

    .. math:: p = P(\mathrm{Bin}(n, r) \le k)

    Parameters
    ----------
    errors : array_like of int
        Count k of units with loss 1; an integer, never n times a mean.
    n_units : array_like of int
        Count n of independent units; 0 units give p = 1.
    risk : array_like of float
        Level r in (0, 1).

    Returns
    -------
    ndarray of float64
        ln p, broadcast shape; finite even where p underflows.

    Raises
    ------
    InvalidArgumentError
        If a count is fractional, negative or above `n_units`.

    Notes
    -----
    Super-uniform under H in finite samples; no other valid test of 0/1
    losses is uniformly more powerful.

    References
    ----------
    Clopper and Pearson (1934), doi:10.1093/biomet/26.4.404.

    Examples
    --------
    >>> float(np.exp(binomial_log_p(7, 100, risk=0.1)).round(9))
    0.206050862
    """
    k, n = _counts(errors, n_units)
    level = _levels(risk)
    k, n, level = np.broadcast_arrays(k, n, level)
    out = np.zeros(k.shape)
    inside = k < n
    out[inside] = log_betainc(n[inside] - k[inside], k[inside] + 1.0, 1.0 - level[inside])
    return out


def binomial_upper_bound(
    errors: ArrayLike, n_units: ArrayLike, *, delta: float
) -> NDArray[np.float64]:
    r"""Clopper-Pearson upper confidence bound on P(error), at confidence 1 - delta.

    .. math:: U = \mathrm{Beta}^{-1}(1 - \delta;\; k + 1,\, n - k), \qquad U = 1 \text{ if } k = n

    Parameters
    ----------
    errors, n_units : array_like of int
        Counts as in `binomial_log_p`; the two agree: U <= r exactly where ln p(r) <= ln delta.
    delta : float
        Error probability in (0, 1).

    Returns
    -------
    ndarray of float64, broadcast shape

    References
    ----------
    Clopper and Pearson (1934), doi:10.1093/biomet/26.4.404.

    Examples
    --------
    >>> float(binomial_upper_bound(0, 100, delta=0.05).round(15))
    0.02951304960704
    """
    check_probability("delta", delta)
    k, n = np.broadcast_arrays(*_counts(errors, n_units))
    out = np.ones(k.shape)
    inside = k < n
    out[inside] = special.betainccinv(k[inside] + 1.0, n[inside] - k[inside], delta)
    return out


def ratio_log_p(
    errors: ArrayLike, occurrences: ArrayLike, *, risk: ArrayLike
) -> NDArray[np.float64]:
    """Exact log p-value of H: P(error | occurrence) > risk, for a 0/1 condition.

    A ratio risk (precision, selective error, error among the units that stopped at a stage) counts
    errors only among the units where the condition holds. Given their number N the errors are
    binomial, so the exact test with its *effective* n = N is valid conditionally, hence overall.

    Parameters
    ----------
    errors : array_like of bool, [n_units] or [n_units, n_columns]
        Whether the unit is in error; ignored where `occurrences` is false.
    occurrences : array_like of bool, same shape
        Whether the unit counts.
    risk : array_like of float
        Level in (0, 1).

    Returns
    -------
    ndarray of float64, [n_columns] (or a scalar array for one column)
        ln p; 0 (p = 1) where the condition never holds, never NaN.

    Examples
    --------
    >>> stopped = np.array([True, True, False, True])
    >>> wrong = np.array([False, False, True, False])
    >>> float(np.exp(ratio_log_p(wrong, stopped, risk=0.5)).round(9))
    0.125
    """
    condition = _boolean("occurrences", occurrences)
    error = _boolean("errors", errors)
    if error.shape != condition.shape:
        raise InvalidArgumentError("occurrences", f"shape {condition.shape}", f"{error.shape}")
    return binomial_log_p((error & condition).sum(axis=0), condition.sum(axis=0), risk=risk)


def _counts(
    errors: ArrayLike, n_units: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    k = as_floats("errors", errors)
    n = as_floats("n_units", n_units)
    for name, value in (("errors", k), ("n_units", n)):
        if not (np.isfinite(value).all() and (value == np.floor(value)).all()):
            raise InvalidArgumentError(name, value, "a whole number (a count, not a mean)")
    if (k < 0).any() or (k > n).any():
        raise InvalidArgumentError("errors", k, "between 0 and `n_units`")
    return k, n


def _levels(risk: ArrayLike) -> NDArray[np.float64]:
    level = as_floats("risk", risk)
    if not ((level > 0.0) & (level < 1.0)).all():
        raise InvalidArgumentError("risk", risk, "in (0, 1)")
    return level


def _boolean(name: str, value: ArrayLike) -> NDArray[np.bool_]:
    array = numeric(name, value)
    if not np.isin(array, (0, 1)).all():
        raise InvalidArgumentError(name, "other values", "0 or 1")
    return array.astype(bool)


def _log_betainc_tail(a: float, b: float, x: float) -> float:
    """Lower tail by Lentz's method; converges fast for x far below a / (a + b)."""
    front = a * math.log(x) + b * math.log1p(-x) - float(special.betaln(a, b)) - math.log(a)
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    h = d
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            step = c * d
            h *= step
        if abs(step - 1.0) < 1e-15:
            break
    return front + math.log(h)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
