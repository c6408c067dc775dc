"""Losses along time in blocks, with running sums that are quick for long columns too.

A cumulative sum waits for each addition before the next. Folded into eight rows, a block of units
needs an eighth of that wait: the rows are added one after another, each in one sweep, and what came
before a lane is added afterwards. Blocks stay in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROWS = 8
_BLOCK = 15 * 1024


@dataclass(frozen=True, eq=False)
class Block:
    """Losses of consecutive units, as they are or folded into lanes.

    Parameters
    ----------
    values : ndarray
        Plain: [n_units, n_columns]. Folded: one column as [8, lanes], its units down the first
        lane, then down the second; zeros after the last unit.
    times : ndarray
        The unit's number from 1, broadcastable against `values`.
    n_units : int
        Units of the whole column; later times are padding.
    folded : bool
    """

    values: Array
    times: Array
    n_units: int
    folded: bool

    def sums_before(self, values: Array, before: float | Array) -> tuple[Array, float | Array]:
        """Return `before` plus the sum over earlier units, per unit, and the same after the last.

        A unit's own value is never added and taken off again: rounding would let a large one shine
        through, and bets must not see the unit they are laid on.
        """
        sums = np.empty_like(values)
        if not self.folded:
            sums[0] = before
            sums[1:] = values[:-1]
            np.cumsum(sums, axis=0, out=sums)
            return sums, sums[-1] + values[-1]
        sums[0] = 0.0
        for row in range(1, _ROWS):
            np.add(sums[row - 1], values[row - 1], out=sums[row])
        lanes = _sums_from(before, sums[-1] + values[-1])
        sums += lanes[:-1]
        return sums, float(lanes[-1])

    def log_products(self, factors: Array, before: float | Array) -> tuple[Array, float | Array]:
        """Return the largest and the last of `before` plus the logs of the running products.

        Per column; `factors` are not negative, 1 in the padding, and may be overwritten. Folded, a
        log is taken per lane, of its product and of its largest partial product, not per unit.
        """
        with np.errstate(divide="ignore", under="ignore"):
            if not self.folded:
                logs = np.cumsum(np.log(factors), axis=0)
                return logs.max(axis=0), logs[-1]
            for row in range(1, _ROWS):
                np.multiply(factors[row - 1], factors[row], out=factors[row])
            starts = _sums_from(before, np.log(factors[-1]))
            highest = (starts[:-1] + np.log(factors.max(axis=0))).max()
        return np.atleast_1d(highest), float(starts[-1])

    def without_padding(self, values: Array) -> Array:
        """Return `values` with zeros in the padding, changed in place."""
        if self.folded and self.times[-1, -1] > self.n_units:
            values[self.times > self.n_units] = 0.0
        return values


def plain(matrix: Array) -> Block:
    """Return losses [n_units, n_columns] as one block."""
    n = matrix.shape[0]
    return Block(matrix, np.arange(1.0, n + 1.0)[:, None], n, False)


def timelines(matrix: Array) -> Iterator[Iterator[Block]]:
    """Cut losses [n_units, n_columns] into blocks: all columns at once, or one by one if long."""
    if matrix.shape[0] <= _BLOCK:
        yield iter([plain(matrix)])
    else:
        yield from (_folded(matrix[:, column]) for column in range(matrix.shape[1]))


def _folded(column: Array) -> Iterator[Block]:
    n = column.size
    for start in range(0, n, _BLOCK):
        yield Block(_fold(column[start : start + _BLOCK]), _times() + start, n, True)


def _sums_from(start: float | Array, steps: Array) -> Array:
    return np.cumsum(np.append(start, steps))


def _fold(part: Array) -> Array:
    """Return up to one block of units as [8, lanes], zeros after the last."""
    if part.size < _BLOCK:
        part = np.concatenate([part, np.zeros(_BLOCK - part.size)])
    return np.ascontiguousarray(part.reshape(-1, _ROWS).T)


@functools.cache
def _times() -> Array:
    return _fold(np.arange(1.0, _BLOCK + 1.0))
