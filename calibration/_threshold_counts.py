"""How many thresholds each score reaches: a table look-up where binary search is too slow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Counts = NDArray[np.int64]
_MOST_BITS = 18


def threshold_counter(ascending: Scores) -> Callable[[Scores], Counts]:
    """Return a faster ``np.searchsorted(ascending, scores, side="right")``.

    The range of the thresholds is cut into equal cells with at most one distinct threshold each.
    A score's cell is a monotone function of it, so thresholds in lower cells are below the score,
    those in higher cells above it, and one comparison settles the cell's own. Where thresholds
    lie too close for that, the function is binary search itself.

    Parameters
    ----------
    ascending : ndarray of float32 [n_thresholds]
        Sorted, without NaN; infinities allowed.

    Returns
    -------
    callable
        From scores without NaN [...] to counts [...].
    """
    distinct, multiplicity = np.unique(ascending[np.isfinite(ascending)], return_counts=True)
    if distinct.size >= 2:
        least_bits = int(4 * distinct.size).bit_length()
        with np.errstate(over="ignore"):
            span = distinct[-1] - distinct[0]
        for bits in range(least_bits, _MOST_BITS + 1):
            with np.errstate(over="ignore"):
                scale = np.float32((1 << bits) - 1) / span
            if not np.isfinite(scale) or not np.isfinite(span):
                break
            cells = _cells(distinct, distinct[0], scale, bits)
            if (np.diff(cells) > 0).all():
                return _table(ascending, distinct, multiplicity, cells, scale, bits)
    return lambda scores: np.searchsorted(ascending, scores, side="right")


def _table(
    ascending: Scores,
    distinct: Scores,
    multiplicity: Counts,
    cells: NDArray[np.int32],
    scale: np.float32,
    bits: int,
) -> Callable[[Scores], Counts]:
    lowest = int((ascending == -np.inf).sum())
    edge = np.full(1 << bits, np.inf, dtype=np.float32)
    edge[cells] = distinct
    inside = np.zeros(1 << bits, dtype=np.int64)
    inside[cells] = multiplicity
    upto = lowest + np.cumsum(inside)
    table = np.stack([upto - inside, upto], axis=1).ravel()

    def count(scores: Scores) -> Counts:
        cell = _cells(scores, distinct[0], scale, bits)
        reached = scores >= edge[cell]
        cell *= 2
        cell += reached
        found: Counts = table[cell]
        if scores.size and scores.max() == np.inf:
            found[scores == np.inf] = ascending.size
        return found

    return count


def _cells(scores: Scores, low: np.float32, scale: np.float32, bits: int) -> NDArray[np.int32]:
    with np.errstate(over="ignore"):
        position = scores - low
        position *= scale
    np.clip(position, 0.0, np.float32((1 << bits) - 1), out=position)
    return position.astype(np.int32)
