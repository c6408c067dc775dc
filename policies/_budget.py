"""Exit rates into thresholds: mean-cost budgets over any allocator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError, Trace, marginal_thresholds
from adaptive.policies._allocators import exponential_weights
from adaptive.policies._labels import exit_losses
from adaptive.policies._threshold_table import ThresholdTable

Array = NDArray[np.float64]


def budget_thresholds(
    trace: Trace,
    *,
    budgets: Sequence[float],
    allocate: Callable[[Any, Any, float], Array] = exponential_weights,
    quantiles: Callable[[Any, Any], Array] = marginal_thresholds,
    loss: str = "disagreement",
) -> ThresholdTable:
    """Thresholds that spend a mean-cost budget, for a path of budgets: EERO and its kin.

    The allocator turns a budget into shares of the traffic to stop at each stage; the quantiles
    of the trace's scores turn the shares into thresholds.

    Parameters
    ----------
    trace : Trace
        The fit split. Tokens are treated as exchangeable here; what must be promised about the
        budget or the risk is certified afterwards, on units, each by itself.
    budgets : sequence of float
        Mean costs per token, strictly descending, in ``trace.cost_quantity``.
    allocate : callable
        ``(risks [n_stages], costs [n_stages], budget) -> rates [n_stages]``:
        `exponential_weights`, `linear_programme`, `geometric_allocation`,
        `two_stage_allocation` or your own.
    quantiles : callable
        ``(scores [n_tokens, n_exits], rates [n_exits]) -> thresholds [n_exits]``:
        `marginal_thresholds` (each exit by itself, conformal rank: the mean cost stays within the
        budget, usually well within), `inflated_thresholds` (the published form),
        `survivor_thresholds` (spends the whole budget).
    loss : str
        Whose mean per exit is the risk; full computation has none.

    Returns
    -------
    ThresholdTable
        Its knob is the budget.

    Raises
    ------
    InvalidArgumentError
        If a budget is infeasible; the message gives the feasible range.
    """
    risks = np.append(exit_losses(trace, loss).mean(axis=0), 0.0)
    scores = np.asarray(trace.scores, dtype=np.float64)
    levels = tuple(map(float, np.atleast_1d(budgets)))
    if not levels or any(b >= a for a, b in pairwise(levels)):
        raise InvalidArgumentError("budgets", budgets, "mean costs, strictly descending")
    rows = []
    for budget in levels:
        rates = allocate(risks, trace.costs, budget)
        rows.append(tuple(float(value) for value in quantiles(scores, rates[:-1])))
    return ThresholdTable(levels=levels, thresholds=tuple(rows))


def inflated_thresholds(
    scores: ArrayLike, rates: ArrayLike, *, inflation: float = math.sqrt(2.0 * math.pi)
) -> Array:
    """One threshold per exit from its own scores, the rates inflated by ``C / sqrt(N)``.

    EERO's published form: exit ``l`` stops where ``F_l(score) >= 1 - (rates_0 + ... + rates_l) -
    C / sqrt(N)``. With ``C = sqrt(2 pi)`` the Dvoretzky-Kiefer-Wolfowitz inequality bounds the
    expected share that goes on by ``1 - (rates_0 + ... + rates_l)``.

    Parameters
    ----------
    scores : array_like [n_units, n_exits]
    rates : array_like [n_exits]
    inflation : float
        ``C``, at least 0.

    Returns
    -------
    ndarray [n_exits]
        ``-inf`` where everything stops.
    """
    if not inflation >= 0.0:
        raise InvalidArgumentError("inflation", inflation, "at least 0")
    table = np.sort(np.asarray(scores, dtype=np.float64), axis=0)
    n = table.shape[0]
    stay = 1.0 - np.cumsum(np.asarray(rates, dtype=np.float64)) - inflation / math.sqrt(n)
    ranks = np.ceil(n * stay - 1e-9).astype(int)
    return np.array([table[k - 1, c] if k > 0 else -math.inf for c, k in enumerate(ranks)])
