"""Testing many configurations while the chance of any false certificate stays at most delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import check_count, check_probability

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


def fixed_sequence(
    p_values: ArrayLike, *, delta: float, starts: Sequence[int] = (0,)
) -> NDArray[np.bool_]:
    """Reject along a fixed order until the first failure, from one or several starts.

    With one start every hypothesis is tested at the full level. With k starts each chain begins
    with delta / k, and a chain that reaches the place where another one failed pools its level
    there (a special case of the graphical procedure).

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


def log_of_p_values(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return natural logs of p-values [n]; NaN counts as 1.

    Raises
    ------
    InvalidArgumentError
        If a p-value is negative or the array is not a non-empty vector.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or p.size == 0:
        raise InvalidArgumentError("p_values", f"shape {p.shape}", "a non-empty vector")
    p = np.where(np.isnan(p), 1.0, p)
    if (p < 0.0).any():
        raise InvalidArgumentError("p_values", p, "non-negative")
    with np.errstate(divide="ignore"):
        return np.log(p)


def mask_of(rejected: Sequence[int], count: int) -> NDArray[np.bool_]:
    """Return a boolean vector that is true at the given positions."""
    mask = np.zeros(count, dtype=bool)
    mask[list(rejected)] = True
    return mask


def _starts(starts: Sequence[int], count: int) -> tuple[int, ...]:
    first = tuple(check_count("starts", s, least=0) for s in starts)
    if not first or len(set(first)) != len(first) or max(first) >= count:
        raise InvalidArgumentError("starts", starts, f"distinct positions below {count}")
    return first
