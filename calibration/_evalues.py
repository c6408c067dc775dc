"""Arithmetic of e-values, in logs: products, averages, and the way to and from p-values.

An e-value is a non-negative statistic with expectation at most 1 under the null; large is evidence
against it. ``log_e`` below is its natural log, ``-inf`` allowed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_probability

Array = NDArray[np.float64]


def multiply_e(log_e: ArrayLike, *, axis: int = 0) -> Array:
    """Log of the product: an e-value if the factors are independent, or each given the past."""
    return np.asarray(_logs(log_e).sum(axis=axis))


def average_e(log_e: ArrayLike, *, weights: ArrayLike | None = None, axis: int = 0) -> Array:
    """Log of the weighted mean: an e-value however the e-values depend on each other.

    Parameters
    ----------
    log_e : array_like
    weights : array_like, broadcast against `log_e`, optional
        Non-negative, fixed before looking; normalised to sum 1 along `axis`. Equal if left out.
    axis : int

    Examples
    --------
    >>> float(np.exp(average_e(np.log([4.0, 2.0]))).round(12))
    3.0
    """
    logs = _logs(log_e)
    share = np.ones_like(logs) if weights is None else np.asarray(weights, dtype=np.float64)
    if not (share >= 0.0).all() or not (share.sum(axis=axis) > 0.0).all():
        raise InvalidArgumentError("weights", weights, "non-negative and not all zero")
    with np.errstate(divide="ignore"):
        shifted = logs + np.log(share / share.sum(axis=axis, keepdims=True))
    return np.asarray(np.logaddexp.reduce(shifted, axis=axis))


def e_to_log_p(log_e: ArrayLike) -> Array:
    """Log p-value ``min(1, 1/e)``: valid by Markov, at any stopping time for an e-process.

    Examples
    --------
    >>> np.exp(e_to_log_p(np.log([20.0, 0.5]))).round(3).tolist()
    [0.05, 1.0]
    """
    return np.minimum(-_logs(log_e), 0.0)


def p_to_log_e(p_values: ArrayLike, *, power: float | None = None) -> Array:
    r"""Log e-value from p-values.

    Parameters
    ----------
    p_values : array_like
        In [0, 1].
    power : float, optional
        :math:`\kappa \in (0, 1)` gives :math:`e = \kappa p^{\kappa - 1}`; left out, the mean over
        all :math:`\kappa`: :math:`e = (1 - p + p \ln p) / (p \ln^2 p)`, which needs no choice.

    References
    ----------
    Vovk and Wang (2021), E-values: calibration, combination and applications,
    doi:10.1214/20-AOS2020.
    """
    p = as_floats("p_values", p_values)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise InvalidArgumentError("p_values", p_values, "in [0, 1]")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.log(p)
        if power is not None:
            kappa = check_probability("power", power)
            return np.asarray(np.log(kappa) + (kappa - 1.0) * log_p)
        exact = np.log1p(-p + special.xlogy(p, p)) - log_p - 2.0 * np.log(-log_p)
    near_one = np.log(0.5) + (1.0 - p) / 3.0
    return np.where(p == 0.0, np.inf, np.where(p > 1.0 - 1e-4, near_one, exact))


def _logs(log_e: ArrayLike) -> Array:
    logs = as_floats("log_e", log_e)
    if np.isnan(logs).any():
        raise InvalidArgumentError("log_e", "NaN", "free of NaN")
    return logs
