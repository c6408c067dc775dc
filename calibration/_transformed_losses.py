"""Losses rewritten so that their plain mean is the risk wanted, for any test to be run on them.

Covariate shift with known weights, and few graded units beside many with a cheap proxy, both come
down to other losses with another declared bound. What is returned goes into `control_risk` (or any
test for bounded losses that welcomes negative values) as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import (
    Rng,
    as_floats,
    as_generator,
    check_number,
    check_positive,
    check_risk,
    float_matrix,
    require_at_least,
    require_at_most,
)

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TransformedLosses:
    """Losses and the bound that they keep by construction; `control_risk` takes them as they are.

    Parameters
    ----------
    losses : ndarray [n_units, n_columns]
    bound : float
        To be declared to the test together with them; the loss type is "bounded".
    risk : float or None
        The one promise that they can be tested for, where they were made for one.
    assumptions, notes : tuple of str
        Sentences that a certificate for these losses must carry.
    """

    losses: Array
    bound: float
    risk: float | None = None
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def shifted_losses(
    losses: ArrayLike, *, weights: ArrayLike, risk: float, max_weight: float, bound: float = 1.0
) -> TransformedLosses:
    r"""Losses whose mean over calibration traffic is at most `risk` where the target's risk is.

    .. math:: X_i = r + w_i (L_i - r), \qquad
        E X \le r \iff E_{\text{target}} L \le r, \qquad X \le r + W (B - r)

    Parameters
    ----------
    losses : array_like [n_units, n_columns]
        Of units drawn from the calibration traffic; at most `bound`.
    weights : array_like [n_units]
        Known density ratio target / calibration of each unit, up to a constant factor.
    risk : float
        Promise for the target traffic, in (0, bound); pass the same to `control_risk`.
    max_weight : float
        Declared bound W of the weights over all traffic, not only over these units.
    bound : float
        Declared upper bound B of the loss.

    Returns
    -------
    TransformedLosses

    Raises
    ------
    InvalidArgumentError
        If a weight is negative or above `max_weight`, or a loss above `bound`.

    Notes
    -----
    Exact where the weights are the true ratio; an error in them moves the promise to the traffic
    they describe. Only the sign of ``E w (L - r)`` matters, so the weights need no normalisation.
    The linear form has a smaller bound and, near the level, a smaller variance than ``w L``.

    Examples
    --------
    >>> moved = shifted_losses([[0.0], [1.0]], weights=[2.0, 0.5], risk=0.1, max_weight=2.0)
    >>> moved.losses.round(3).tolist(), round(moved.bound, 9)
    ([[-0.1], [0.55]], 1.9)
    """
    level, upper = check_risk(risk, bound)
    table = float_matrix("losses", losses)
    require_at_most("losses", table, upper)
    ratio, largest = _weights(weights, table.shape[0], max_weight)
    moved = _within(level + ratio[:, None] * (table - level), level + largest * (upper - level))
    return dataclasses.replace(
        moved,
        risk=level,
        assumptions=(
            f"weights are the ratio of target to calibration traffic and never exceed {largest:g}",
        ),
        notes=(
            "The promise is about the traffic that the weights describe, not about the traffic "
            "that the calibration units came from.",
        ),
    )


def thin_by_weights(weights: ArrayLike, *, max_weight: float, rng: Rng = None) -> NDArray[np.intp]:
    """Units that are, after random thinning, a plain sample of the target traffic.

    Each unit is kept with probability ``weight / max_weight``. The kept ones are independent draws
    from the target, so that any test, the exact binomial one too, applies to them unchanged; about
    ``n * mean weight / max_weight`` remain.

    Parameters
    ----------
    weights, max_weight
        As in `shifted_losses`.
    rng : int, numpy.random.Generator or None
        Seed of the coin flips, which must not depend on the losses.

    Returns
    -------
    ndarray of int [n_kept]
        Indices, ascending.

    References
    ----------
    von Neumann (1951), rejection sampling; Park, Dobriban, Lee and Bastani (2022), PAC prediction
    sets under covariate shift, ICLR, arXiv:2106.09848.
    """
    values = as_floats("weights", weights)
    ratio, largest = _weights(values, values.size, max_weight)
    return np.flatnonzero(as_generator(rng).random(ratio.size) * largest < ratio)


def prediction_powered_losses(
    graded: ArrayLike,
    *,
    proxy: ArrayLike,
    proxy_plenty: ArrayLike,
    power: float = 1.0,
    bound: float = 1.0,
    proxy_bound: float = 1.0,
    rectifier_bound: float | None = None,
) -> TransformedLosses:
    r"""Losses with the mean of the graded ones, less noisy thanks to a plentiful proxy.

    .. math:: Z_i = L_i - \lambda f_i + \lambda \bar f_{(i)}, \qquad E Z = E L

    with :math:`\bar f_{(i)}` the mean proxy over the i-th of n equal shares of the plentiful
    units. Typical: L is a graded loss of quality, f is disagreement with the full model, which
    needs no grader.

    Parameters
    ----------
    graded : array_like [n_units, n_columns]
        Graded loss L of the few units, at most `bound`.
    proxy : array_like [n_units, n_columns]
        Proxy f of the same units.
    proxy_plenty : array_like [n_plenty, n_columns]
        Proxy of further units of the same traffic, ``n_plenty >= n_units``; what the shares leave
        over is not used. Their order must not depend on their values.
    power : float
        Weight :math:`\lambda \ge 0`, fixed before looking at these units (see `tune_power`). 0
        gives the graded losses back.
    bound, proxy_bound : float
        Declared upper bounds of L and f; f is non-negative.
    rectifier_bound : float, optional
        Declared upper bound of :math:`L - \lambda f`. `bound` if left out. Where the graded loss
        is relative to the full model, it is zero wherever the two agree; with f = 1 for
        disagreement then :math:`L \le f`, and ``bound - power`` may be declared (not below 0).

    Returns
    -------
    TransformedLosses
        [n_units, n_columns] with bound ``rectifier_bound + power * proxy_bound``.

    Raises
    ------
    InvalidArgumentError
        If shapes disagree or a value is outside its declared bound.

    Notes
    -----
    The units of `graded` and `proxy_plenty` must be independent draws from one traffic. No
    quality of the proxy is assumed: a bad one costs power, never validity.

    References
    ----------
    Angelopoulos, Bates, Fannjiang, Jordan and Zrnic (2023), Prediction-powered inference,
    doi:10.1126/science.adi6000. Einbinder, Ringel and Romano (2024), Semi-supervised risk control
    via prediction-powered inference, arXiv:2412.11174.

    Examples
    --------
    >>> found = prediction_powered_losses(
    ...     [[1.0], [0.0]], proxy=[[1.0], [1.0]], proxy_plenty=[[1.0], [0.0], [0.0], [0.0]],
    ...     rectifier_bound=0.0,
    ... )
    >>> found.losses.tolist(), found.bound
    ([[0.5], [-1.0]], 1.0)

    An upper confidence bound on the graded mean:

    >>> from adaptive.calibration import wsr_upper_bound
    >>> float(wsr_upper_bound(found.losses, delta=0.05, bound=found.bound)[0])
    1.0
    """
    table = float_matrix("graded", graded)
    near = float_matrix("proxy", proxy)
    plenty = float_matrix("proxy_plenty", proxy_plenty)
    strength = check_number("power", power)
    if strength < 0.0:
        raise InvalidArgumentError("power", power, "at least 0")
    if near.shape != table.shape:
        raise InvalidArgumentError("proxy", f"shape {near.shape}", f"of shape {table.shape}")
    n, n_columns = table.shape
    if plenty.shape[1] != n_columns or plenty.shape[0] < n:
        raise InvalidArgumentError(
            "proxy_plenty", f"shape {plenty.shape}", f"[at least {n}, {n_columns}]"
        )
    upper = check_positive("bound", bound)
    require_at_most("graded", table, upper)
    for name, values in (("proxy", near), ("proxy_plenty", plenty)):
        require_at_most(name, values, check_positive("proxy_bound", proxy_bound))
        require_at_least(name, values, 0.0, reason="the proxy is non-negative")
    share = plenty.shape[0] // n
    means = plenty[: share * n].reshape(n, share, n_columns).mean(axis=1)
    rectifier = table - strength * near
    limit = upper if rectifier_bound is None else check_number("rectifier_bound", rectifier_bound)
    require_at_most("graded less the weighted proxy", rectifier, limit)
    powered = _within(rectifier + strength * means, limit + strength * proxy_bound)
    return dataclasses.replace(
        powered,
        assumptions=(
            f"the {n} graded and {share * n} plentiful units are independent draws from one "
            f"traffic, the plentiful ones in an order that does not depend on their proxy",
        ),
        notes=(
            f"The mean is that of the graded loss; {strength:g} times the proxy was taken off it "
            f"and its mean over the plentiful units added, which changes the noise only.",
        ),
    )


def tune_power(graded: ArrayLike, *, proxy: ArrayLike, plenty_per_graded: float) -> float:
    r"""Weight of the proxy that gives the least variance, from units used for nothing else.

    .. math:: \lambda^* = \frac{\mathrm{Cov}(L, f)}{\mathrm{Var}(f)\,(1 + 1/k)}

    Parameters
    ----------
    graded, proxy : array_like [n_units]
        Of a tuning split, never of the units to be tested.
    plenty_per_graded : float
        Plentiful units k per graded unit in the test.

    Returns
    -------
    float
        At least 0; 0 where the proxy does not vary.
    """
    values = float_matrix("graded", graded)[:, 0]
    near = float_matrix("proxy", proxy)[:, 0]
    if near.shape != values.shape:
        raise InvalidArgumentError("proxy", f"shape {near.shape}", f"of shape {values.shape}")
    ratio = check_positive("plenty_per_graded", plenty_per_graded)
    spread = float(near.var())
    if spread == 0.0:
        return 0.0
    covariance = float(((values - values.mean()) * (near - near.mean())).mean())
    return max(0.0, covariance / (spread * (1.0 + 1.0 / ratio)))


def _within(losses: Array, bound: float) -> TransformedLosses:
    """Take off what rounding may have put above a bound that holds by construction."""
    return TransformedLosses(np.minimum(losses, bound), bound)


def _weights(weights: ArrayLike, n: int, max_weight: float) -> tuple[Array, float]:
    ratio = as_floats("weights", weights)
    largest = check_positive("max_weight", max_weight)
    if ratio.shape != (n,) or n == 0:
        raise InvalidArgumentError("weights", f"shape {ratio.shape}", f"of shape ({n},)")
    if not ((ratio >= 0.0) & (ratio <= largest)).all():
        raise InvalidArgumentError("weights", weights, f"in [0, {largest:g}] (`max_weight`)")
    return ratio, largest
