"""Testing many hypotheses while the chance of any false rejection stays at most delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_count, check_probability

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Evaluate = Callable[[int], float]


@dataclass(frozen=True)
class Tested:
    """Outcome of a multiple test.

    Parameters
    ----------
    rejected : tuple of int
        Hypotheses rejected (configurations certified), ascending.
    visited : tuple of int
        Hypotheses whose p-value was asked for, in that order.
    levels : dict of int to float
        The largest level at which each visited hypothesis was tested.
    """

    rejected: tuple[int, ...]
    visited: tuple[int, ...]
    levels: dict[int, float]


def bonferroni(p_values: ArrayLike, *, delta: float) -> Mask:
    """Reject where p <= delta / n, by statsmodels.

    Parameters
    ----------
    p_values : array_like of float, [n]
        NaN counts as 1.
    delta : float
        Family-wise error rate.

    Returns
    -------
    ndarray of bool, [n]

    Examples
    --------
    >>> bonferroni([0.001, 0.02, float("nan"), 0.03], delta=0.1)
    array([ True,  True, False, False])
    """
    return _multipletests(p_values, delta, "bonferroni")


def holm(p_values: ArrayLike, *, delta: float) -> Mask:
    """Reject by Holm's step-down rule, by statsmodels; parameters and result as `bonferroni`.

    References
    ----------
    Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    return _multipletests(p_values, delta, "holm")


def fixed_sequence(p_values: ArrayLike, *, delta: float, starts: Sequence[int] = (0,)) -> Mask:
    """Reject along a fixed order until the first failure, from one or several starts.

    With one start every hypothesis is tested at the full level. With k starts each chain begins
    with delta / k, and a chain that reaches the place where another one failed pools its level
    there (a special case of `graphical`).

    Parameters
    ----------
    p_values : array_like of float, [n]
        In an order that does not depend on them; NaN counts as 1.
    delta : float
        Family-wise error rate.
    starts : sequence of int
        Positions where chains begin.

    Returns
    -------
    ndarray of bool, [n]

    References
    ----------
    Maurer, Hothorn and Lehmacher (1995). Bretz et al. (2009), doi:10.1002/sim.3495.
    Angelopoulos et al. (2025), doi:10.1214/24-AOAS1998.

    Examples
    --------
    >>> fixed_sequence([0.001, 0.008, 0.2, 0.01], delta=0.05)
    array([ True,  True, False, False])
    """
    log_p = log_of_p_values(p_values)
    tested = walk_fixed_sequence(
        lambda j: float(log_p[j]), count=log_p.size, starts=starts, delta=delta
    )
    return mask_of(tested.rejected, log_p.size)


def graphical(
    p_values: ArrayLike, *, delta: float, weights: ArrayLike, transitions: ArrayLike
) -> Mask:
    r"""Reject by a graphical procedure: levels flow along edges from rejected hypotheses.

    Hypothesis i is rejected if :math:`p_i \le \delta w_i`; its weight then moves,
    :math:`w_j \leftarrow w_j + w_i g_{ij}`, and the graph closes over it,
    :math:`g_{jk} \leftarrow (g_{jk} + g_{ji} g_{ik}) / (1 - g_{ji} g_{ij})`.
    Holm (complete uniform graph), the fixed sequence (a chain) and the fallback are special cases.

    Parameters
    ----------
    p_values : array_like of float, [n]
        NaN counts as 1.
    delta : float
        Family-wise error rate.
    weights : array_like of float, [n]
        Non-negative, sum at most 1, chosen without looking at the p-values.
    transitions : array_like of float, [n, n]
        Non-negative, rows sum to at most 1, zero diagonal, chosen likewise.

    Returns
    -------
    ndarray of bool, [n]

    References
    ----------
    Bretz et al. (2009), doi:10.1002/sim.3495.

    Examples
    --------
    >>> chain = np.eye(4, k=1)
    >>> graphical([0.04, 0.2, 0.03, 0.01], delta=0.1, weights=[0.5, 0, 0.5, 0], transitions=chain)
    array([ True, False,  True,  True])
    """
    log_p = log_of_p_values(p_values)
    weight, edges = check_graph(weights, transitions, log_p.size)
    tested = walk_graph(lambda j: float(log_p[j]), weights=weight, transitions=edges, delta=delta)
    return mask_of(tested.rejected, log_p.size)


def walk_fixed_sequence(
    evaluate: Evaluate, *, count: int, starts: Sequence[int], delta: float
) -> Tested:
    """Run `fixed_sequence` asking `evaluate(j)` (a log p-value) only for hypotheses it visits."""
    check_probability("delta", delta)
    first = _starts(starts, count)
    budget = {j: delta / len(first) for j in first}
    seen: dict[int, float] = {}
    levels: dict[int, float] = {}
    rejected: set[int] = set()
    waiting = sorted(budget)
    while waiting:
        j = waiting.pop(0)
        if j not in seen:
            seen[j] = evaluate(j)
        levels[j] = budget[j]
        if not seen[j] <= math.log(budget[j]):
            continue
        rejected.add(j)
        heir = j + 1
        while heir in rejected:
            heir += 1
        share = budget.pop(j)
        if heir < count:
            budget[heir] = budget.get(heir, 0.0) + share
            waiting = sorted({*waiting, heir})
    return Tested(tuple(sorted(rejected)), tuple(seen), levels)


def walk_graph(evaluate: Evaluate, *, weights: Array, transitions: Array, delta: float) -> Tested:
    """Run `graphical` asking `evaluate(j)` (a log p-value) once a hypothesis has weight."""
    check_probability("delta", delta)
    weight, edges = weights.copy(), transitions.copy()
    alive = np.ones(weight.size, dtype=bool)
    seen: dict[int, float] = {}
    levels: dict[int, float] = {}
    while True:
        passing = None
        for j in map(int, np.flatnonzero(alive & (weight > 0.0))):
            if j not in seen:
                seen[j] = evaluate(j)
            levels[j] = delta * float(weight[j])
            if seen[j] <= math.log(levels[j]):
                passing = j
                break
        if passing is None:
            break
        alive[passing] = False
        weight, edges = _remove(weight, edges, alive, passing)
    return Tested(tuple(map(int, np.flatnonzero(~alive))), tuple(seen), levels)


def walk_all(evaluate: Evaluate, *, first: int, count: int, delta: float, rule: str) -> Tested:
    """Evaluate hypotheses `first`..`count`-1 all at once and apply Bonferroni or Holm."""
    check_probability("delta", delta)
    visited = tuple(range(first, count))
    log_p = np.array([evaluate(j) for j in visited])
    mask = _multipletests(np.exp(log_p), delta, rule)
    size = len(visited)
    ranks = np.argsort(np.argsort(log_p, kind="stable"), kind="stable")
    share = delta / (size - ranks) if rule == "holm" else np.full(size, delta / size)
    return Tested(
        tuple(first + int(i) for i in np.flatnonzero(mask)),
        visited,
        {j: float(share[i]) for i, j in enumerate(visited)},
    )


def check_graph(weights: ArrayLike, transitions: ArrayLike, count: int) -> tuple[Array, Array]:
    """Return weights [n] and transitions [n, n] as float64, checked as `graphical` states."""
    weight = as_floats("weights", weights)
    edges = np.asarray(transitions, dtype=np.float64)
    if weight.shape != (count,) or not (weight >= 0).all() or weight.sum() > 1.0 + 1e-9:
        raise InvalidArgumentError(
            "weights", weight, f"{count} non-negative numbers with sum at most 1"
        )
    fits = edges.shape == (count, count) and (edges >= 0).all() and not np.diag(edges).any()
    if not fits or (edges.sum(axis=1) > 1.0 + 1e-9).any():
        expected = f"[{count}, {count}], non-negative, zero diagonal, rows summing to at most 1"
        raise InvalidArgumentError("transitions", edges, expected)
    return weight, edges


def log_of_p_values(p_values: ArrayLike) -> Array:
    """Return natural logs of p-values [n]; NaN counts as 1.

    Raises
    ------
    InvalidArgumentError
        If a p-value is negative or the array is not a non-empty vector.
    """
    p = as_floats("p_values", p_values)
    if p.ndim != 1 or p.size == 0:
        raise InvalidArgumentError("p_values", f"shape {p.shape}", "a non-empty vector")
    p = np.where(np.isnan(p), 1.0, p)
    if (p < 0.0).any():
        raise InvalidArgumentError("p_values", p, "non-negative")
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(p))


def mask_of(rejected: Sequence[int], count: int) -> Mask:
    """Return a boolean vector that is true at the given positions."""
    mask = np.zeros(count, dtype=bool)
    mask[list(rejected)] = True
    return mask


def _multipletests(p_values: ArrayLike, delta: float, rule: str) -> Mask:
    from statsmodels.stats.multitest import multipletests

    check_probability("delta", delta)
    p = np.minimum(np.exp(log_of_p_values(p_values)), 1.0)
    return np.asarray(multipletests(p, alpha=delta, method=rule)[0], dtype=bool)


def _remove(weight: Array, edges: Array, alive: Mask, i: int) -> tuple[Array, Array]:
    """Return weights and transitions after hypothesis i is rejected."""
    new_weight = np.where(alive, weight + weight[i] * edges[i], 0.0)
    into, out = edges[:, i], edges[i]
    loop = 1.0 - into * out
    new_edges = np.zeros_like(edges)
    np.divide(edges + np.outer(into, out), loop[:, None], out=new_edges, where=loop[:, None] > 0.0)
    new_edges[~alive] = 0.0
    new_edges[:, ~alive] = 0.0
    np.fill_diagonal(new_edges, 0.0)
    return new_weight, new_edges


def _starts(starts: Sequence[int], count: int) -> tuple[int, ...]:
    first = tuple(check_count("starts", s, least=0) for s in starts)
    if not first or len(set(first)) != len(first) or max(first) >= count:
        raise InvalidArgumentError("starts", starts, f"distinct positions below {count}")
    return first
