"""Hoeffding, Bentkus and Hoeffding-Bentkus: p-values and bounds from sums of bounded losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from adaptive.calibration._binomial import binomial_log_p
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._inversion import invert_log_p
from adaptive.calibration._validation import as_floats, check_positive, check_probability

Array = NDArray[np.float64]


def hoeffding_log_p(
    total: ArrayLike, n_units: ArrayLike, *, risk: ArrayLike, bound: float = 1.0
) -> Array:
    r"""Log p-value of H: E L > risk by Hoeffding's simple inequality; for teaching, dominated.

    .. math:: p = \exp(-2 n (r - \hat r)_+^2)

    Parameters and result as `kl_hoeffding_log_p`.
    """
    total, n, level = _scaled(total, n_units, risk, bound)
    return np.asarray(-2.0 * n * np.maximum(level - total / n, 0.0) ** 2)


def kl_hoeffding_log_p(
    total: ArrayLike, n_units: ArrayLike, *, risk: ArrayLike, bound: float = 1.0
) -> Array:
    r"""Log p-value of H: E L > risk by Hoeffding's inequality in its relative-entropy form.

    .. math:: p = \exp(-n\, \mathrm{kl}(\min(\hat r, r), r)), \quad
        \mathrm{kl}(a, b) = a \ln\frac{a}{b} + (1 - a) \ln\frac{1 - a}{1 - b}

    Parameters
    ----------
    total : array_like of float
        Sum of the losses, each in [0, bound].
    n_units : array_like of int
        Number of independent units.
    risk : array_like of float
        Level, in (0, bound).
    bound : float
        Declared upper bound of the loss.

    Returns
    -------
    ndarray of float64
        ln p, broadcast shape.

    References
    ----------
    Hoeffding (1963), doi:10.1080/01621459.1963.10500830, theorem 1.

    Examples
    --------
    >>> float(np.exp(kl_hoeffding_log_p(1, 100, risk=0.05)).round(10))
    0.0842796382
    """
    total, n, level = _scaled(total, n_units, risk, bound)
    mean = np.minimum(total / n, level)
    entropy = special.rel_entr(mean, level) + special.rel_entr(1.0 - mean, 1.0 - level)
    return np.asarray(-n * np.maximum(entropy, 0.0))


def bentkus_log_p(
    total: ArrayLike, n_units: ArrayLike, *, risk: ArrayLike, bound: float = 1.0
) -> Array:
    r"""Log of Bentkus' bound for H: E L > risk; it may exceed 0 (p above 1).

    .. math:: p = e\, P(\mathrm{Bin}(n, r) \le \lceil S / B \rceil)

    Parameters and result as `kl_hoeffding_log_p`.

    References
    ----------
    Bentkus (2004), doi:10.1214/009117904000000360.

    Examples
    --------
    >>> float(np.exp(bentkus_log_p(30, 1000, risk=0.05)).round(10))
    0.0034714305
    """
    total, n, level = _scaled(total, n_units, risk, bound)
    return 1.0 + binomial_log_p(np.minimum(np.ceil(total), n), n, risk=level)


def hoeffding_bentkus_log_p(
    total: ArrayLike, n_units: ArrayLike, *, risk: ArrayLike, bound: float = 1.0
) -> Array:
    """Log p-value of H: E L > risk, the smaller of Hoeffding's, Bentkus' and 1.

    All three bound the distribution function of the same mean, so their minimum is a p-value
    without further correction. For 0/1 losses `binomial_log_p` is always at least as powerful.
    Parameters and result as `kl_hoeffding_log_p`.

    References
    ----------
    Bates et al. (2021), doi:10.1145/3478535.
    """
    kl = kl_hoeffding_log_p(total, n_units, risk=risk, bound=bound)
    return np.minimum(kl, bentkus_log_p(total, n_units, risk=risk, bound=bound))


def hoeffding_upper_bound(
    total: ArrayLike, n_units: ArrayLike, *, delta: float, bound: float = 1.0
) -> Array:
    r"""Upper bound :math:`\hat r + B\sqrt{\ln(1/\delta) / (2n)}` on E L; dominated.

    Parameters and result as `hoeffding_bentkus_upper_bound`.
    """
    check_probability("delta", delta)
    total, n, _ = _scaled(total, n_units, 0.5 * bound, bound)
    return bound * np.minimum(1.0, total / n + np.sqrt(-math.log(delta) / (2.0 * n)))


def kl_hoeffding_upper_bound(
    total: ArrayLike, n_units: ArrayLike, *, delta: float, bound: float = 1.0
) -> Array:
    """Upper confidence bound on E L by inverting `kl_hoeffding_log_p`.

    Parameters and result as `hoeffding_bentkus_upper_bound`.
    """
    return _inverse(kl_hoeffding_log_p, total, n_units, delta, bound)


def bentkus_upper_bound(
    total: ArrayLike, n_units: ArrayLike, *, delta: float, bound: float = 1.0
) -> Array:
    """Upper confidence bound on E L by inverting `bentkus_log_p`.

    Parameters and result as `hoeffding_bentkus_upper_bound`.
    """
    return _inverse(bentkus_log_p, total, n_units, delta, bound)


def hoeffding_bentkus_upper_bound(
    total: ArrayLike, n_units: ArrayLike, *, delta: float, bound: float = 1.0
) -> Array:
    """Upper confidence bound on E L: the level at which the Hoeffding-Bentkus p-value is delta.

    Parameters
    ----------
    total, n_units, bound
        As in `kl_hoeffding_log_p`.
    delta : float
        Error probability in (0, 1).

    Returns
    -------
    ndarray of float64
        U with P(E L > U) <= delta, at most `bound`.

    Examples
    --------
    >>> float(hoeffding_bentkus_upper_bound(40, 1000, delta=0.1).round(10))
    0.0528083801
    """
    return _inverse(hoeffding_bentkus_log_p, total, n_units, delta, bound)


def _inverse(
    log_p: Callable[..., Array], total: ArrayLike, n_units: ArrayLike, delta: float, bound: float
) -> Array:
    check_probability("delta", delta)
    sums, n, _ = _scaled(total, n_units, 0.5 * bound, bound)
    flat_sums, flat_n = sums.ravel(), n.ravel()
    found = invert_log_p(
        lambda level, place: log_p(flat_sums[place], flat_n[place], risk=level),
        flat_sums / flat_n,
        math.log(delta),
    )
    return bound * found.reshape(sums.shape)


def _scaled(
    total: ArrayLike, n_units: ArrayLike, risk: ArrayLike, bound: float
) -> tuple[Array, Array, Array]:
    upper = check_positive("bound", bound)
    sums, n, level = np.broadcast_arrays(
        as_floats("total", total), as_floats("n_units", n_units), as_floats("risk", risk)
    )
    sums, level = sums / upper, level / upper
    if not ((n >= 1) & (n == np.floor(n))).all():
        raise InvalidArgumentError("n_units", n_units, "a positive whole number")
    if not ((sums >= 0.0) & (sums <= n * (1.0 + 1e-12))).all():
        raise InvalidArgumentError("total", total, "a sum of losses in [0, bound]")
    if not ((level > 0.0) & (level < 1.0)).all():
        raise InvalidArgumentError("risk", risk, f"in (0, {upper:g})")
    return np.minimum(sums, n), n, level
