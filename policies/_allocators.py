"""Allocators: shares of the traffic to stop at each stage under a mean-cost budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from adaptive.calibration import InvalidArgumentError

Array = NDArray[np.float64]


def exponential_weights(
    risks: ArrayLike,
    costs: ArrayLike,
    budget: float,
    *,
    temperature: float = 0.04,
    prior: ArrayLike | None = None,
) -> Array:
    r"""EERO's rates: least mean risk plus a pull towards a prior, under a mean-cost budget.

    Minimises :math:`\sum_l \epsilon_l R_l + \beta\,\mathrm{KL}(\epsilon \| \pi)` subject to
    :math:`\sum_l \epsilon_l B_l \le \bar B`; the answer is
    :math:`\epsilon_l \propto \pi_l \exp(-(R_l + \mu B_l) / \beta)` with the least :math:`\mu \ge 0`
    that meets the budget.

    Parameters
    ----------
    risks : array_like [n_stages]
        Mean loss of each stage on labelled data; a constant added to all changes nothing.
    costs : array_like [n_stages]
        Cumulative cost of each stage, strictly increasing, positive.
    budget : float
        Mean cost allowed, above the cheapest stage's cost.
    temperature : float
        ``beta``; 0.04 in all published experiments.
    prior : array_like [n_stages], optional
        ``pi``, proportional to ``1 / costs`` when omitted.

    Returns
    -------
    ndarray [n_stages]
        Rates, non-negative, summing to 1.

    Raises
    ------
    InvalidArgumentError
        If no rates meet the budget; the message gives the feasible range.

    Notes
    -----
    The published bound on the risk of the routed classifier takes stopping to be independent of
    being right. Routing by score usually does better and can do worse: certify the routed risk
    by itself.

    References
    ----------
    .. [1] Valade et al., "EERO: early exit with reject option for efficient classification with
       limited budget", UAI 2025, PMLR 286:4290-4308, proposition 3.8.

    Examples
    --------
    >>> exponential_weights([0.5, 0.3, 0.2], [1.0, 2.0, 4.0], 2.0).round(4).tolist()
    [0.109, 0.8365, 0.0545]
    """
    risk, cost = _checked(risks, costs, budget)
    if not 0.0 < temperature < math.inf:
        raise InvalidArgumentError("temperature", temperature, "positive and finite")
    weight = 1.0 / cost if prior is None else np.asarray(prior, dtype=np.float64)
    if weight.shape != cost.shape or not (weight > 0.0).all():
        raise InvalidArgumentError("prior", prior, "positive, one per stage")

    def rates(price: float) -> Array:
        found: Array = special.softmax(np.log(weight) - (risk + price * cost) / temperature)
        return found

    def excess(price: float) -> float:
        return float(rates(price) @ cost) - budget

    if excess(0.0) <= 0.0:
        return rates(0.0)
    high = temperature / (cost[1] - cost[0])
    while excess(high) > 0.0:
        high *= 2.0
    return rates(float(optimize.brentq(excess, 0.0, high, xtol=1e-14)))


def linear_programme(risks: ArrayLike, costs: ArrayLike, budget: float) -> Array:
    """Rates of least mean risk under the budget: at most two stages get any traffic.

    Parameters
    ----------
    risks, costs, budget
        As for :func:`exponential_weights`, whose limit at temperature 0 this is.

    Returns
    -------
    ndarray [n_stages]
        Rates, non-negative, summing to 1.

    Raises
    ------
    InvalidArgumentError
        If no rates meet the budget; the message gives the feasible range.

    Examples
    --------
    >>> linear_programme([0.5, 0.3, 0.2], [1.0, 2.0, 4.0], 3.0).round(6).tolist()
    [0.0, 0.5, 0.5]
    """
    risk, cost = _checked(risks, costs, budget)
    found = optimize.linprog(
        risk, A_ub=cost[None, :], b_ub=[budget], A_eq=np.ones((1, cost.size)), b_eq=[1.0]
    )
    rates: Array = np.clip(found.x, 0.0, 1.0)
    return rates


def geometric_allocation(risks: ArrayLike, costs: ArrayLike, budget: float) -> Array:
    """Rates ``p^l`` with the ratio ``p`` that spends the budget: MSDNet's budgeted batch.

    Parameters
    ----------
    risks, costs, budget
        As for :func:`exponential_weights`; risks are not used.

    Returns
    -------
    ndarray [n_stages]
        Rates, non-negative, summing to 1. A budget that even the most expensive stage alone does
        not exceed gives all traffic to it.

    Raises
    ------
    InvalidArgumentError
        If no rates meet the budget; the message gives the feasible range.

    References
    ----------
    .. [1] Huang et al., "Multi-scale dense networks for resource efficient image classification",
       ICLR 2018.
    """
    _, cost = _checked(risks, costs, budget)
    if budget >= cost[-1]:
        return np.eye(cost.size)[-1]

    def excess(log_ratio: float) -> float:
        return float(geometric_rates(math.exp(log_ratio), cost.size) @ cost) - budget

    return geometric_rates(math.exp(optimize.brentq(excess, -40.0, 40.0)), cost.size)


def geometric_rates(ratio: float, n_stages: int) -> Array:
    """Rates proportional to ``ratio ** l`` for stages l = 0, 1, 2 and so on.

    Examples
    --------
    >>> geometric_rates(0.5, 4).round(4).tolist()
    [0.5333, 0.2667, 0.1333, 0.0667]
    """
    if not 0.0 < ratio < math.inf:
        raise InvalidArgumentError("ratio", ratio, "positive and finite")
    found: Array = special.softmax(np.arange(n_stages) * math.log(ratio))
    return found


def two_stage_allocation(risks: ArrayLike, costs: ArrayLike, budget: float) -> Array:
    """Spend the budget with one early exit: ``(B - b_2) / (b_1 - b_2)`` of the traffic stops.

    Parameters
    ----------
    risks, costs, budget
        As for :func:`exponential_weights`, for two stages; risks are not used.

    Returns
    -------
    ndarray [2]
        Rates, non-negative, summing to 1.

    Raises
    ------
    InvalidArgumentError
        If there are not two stages, or no rates meet the budget.

    Examples
    --------
    >>> two_stage_allocation([0.3, 0.0], [1.0, 4.0], 2.5).tolist()
    [0.5, 0.5]
    """
    _, cost = _checked(risks, costs, budget)
    if cost.size != 2:
        raise InvalidArgumentError("costs", costs, "those of two stages")
    early = min(max((budget - cost[1]) / (cost[0] - cost[1]), 0.0), 1.0)
    return np.array([early, 1.0 - early])


def _checked(risks: ArrayLike, costs: ArrayLike, budget: float) -> tuple[Array, Array]:
    risk = np.asarray(risks, dtype=np.float64)
    cost: Any = np.asarray(costs, dtype=np.float64)
    if cost.ndim != 1 or cost.size < 2 or not (np.diff(cost, prepend=0.0) > 0.0).all():
        raise InvalidArgumentError("costs", costs, "positive and strictly increasing, two or more")
    if risk.shape != cost.shape or not np.isfinite(risk).all():
        raise InvalidArgumentError("risks", risks, f"finite, {cost.size} of them")
    if not budget > cost[0]:
        raise InvalidArgumentError("budget", budget, f"in ({cost[0]:g}, {cost[-1]:g}] or above")
    return risk, cost
