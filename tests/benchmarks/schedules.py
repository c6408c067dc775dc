"""How fast could a batch be whose rows stop independently, given what passes take?

A simulator of passes over (row, segment): nodes 0..S-1 are the segments, node S is the head. A
row's token visits the segments up to its own depth and then the head; a pass serves any rows that
wait at one node and takes as long as was measured for that many. Two families of schedules are
tried:

aligned    every row gets its token before any gets the next: each segment with the rows that need
           it, then one head for all. This is what the library does.
free       rows run ahead of each other: the deepest node at which a given share of the rows waits
           runs, else the fullest one; and the node where a pass is used best.

The best of all is the reference of `bench_rows.py`. In `exact` mode tokens that wait in front of a
segment pass it with their row's next token that needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Waits = NDArray[np.int64]
Choice = Callable[[Waits], int]


@dataclass(frozen=True)
class Passes:
    """Seconds of a pass by node and number of tokens."""

    nodes: tuple[Callable[[float], float], ...]

    @property
    def segments(self) -> int:
        return len(self.nodes) - 1


def simulate(depths: Waits, passes: Passes, choose: Choice, *, exact: bool = False) -> float:
    """Seconds until every row has all its tokens.

    Parameters
    ----------
    depths : int array [rows, tokens]
        Segment that a token stops behind.
    passes : Passes
    choose : callable
        Next node, given the number of rows that wait at each.
    exact : bool
        Stopped tokens pass the deeper segments later.
    """
    rows, tokens = depths.shape
    head = passes.segments
    at, done = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    owed = np.zeros((rows, head + 1), dtype=np.int64)
    total = 0.0
    while (at >= 0).any():
        node = choose(np.bincount(at[at >= 0], minlength=head + 1))
        here = np.flatnonzero(at == node)
        count = here.size
        if node == head:
            done[here] += 1
            at[here] = np.where(done[here] < tokens, 0, -1)
        else:
            if exact:
                count += int(owed[here, node].sum())
                owed[here, node + 1] += owed[here, node]
                owed[here, node] = 0
            stops = depths[here, done[here]] == node
            owed[here[stops], node + 1] += exact
            at[here] = np.where(stops, head, node + 1)
        total += passes.nodes[node](count)
    return total


def aligned(waits: Waits) -> int:
    """Segments from the first on, then the head for all rows together."""
    return int(np.flatnonzero(waits)[0])


def shares(wanted: Sequence[float], rows: int) -> Choice:
    """The deepest node at which a share of the rows waits, else the fullest."""
    least = np.maximum(np.array(wanted) * rows, 1)

    def choose(waits: Waits) -> int:
        ready = np.flatnonzero(waits >= least)
        return int(ready[-1]) if ready.size else int(np.argmax(waits))

    return choose


def best_used(passes: Passes, rows: int) -> Choice:
    """The node whose pass comes closest to the most rows per second that it can serve."""
    counts = np.arange(1, rows + 1)
    pace = [counts / np.array([node(count) for count in counts]) for node in passes.nodes]
    used = [row / row.max() for row in pace]

    def choose(waits: Waits) -> int:
        found = [used[node][count - 1] if count else -1.0 for node, count in enumerate(waits)]
        return len(found) - 1 - int(np.argmax(np.round(found[::-1], 3)))

    return choose


def best_schedule(depths: Waits, passes: Passes, *, exact: bool = False) -> tuple[float, str]:
    """Least seconds over all schedules that are tried, and which one it is."""
    rows, segments = depths.shape[0], passes.segments
    tried = {"aligned": aligned, "best used": best_used(passes, rows)}
    for first, later, head in itertools.product((0, 0.5, 0.75), (0, 0.25, 0.5, 0.75), (0, 0.5, 1)):
        wanted = (first, *(later,) * (segments - 1), head)
        tried[f"shares {wanted}"] = shares(wanted, rows)
    seconds = {
        name: simulate(depths, passes, choose, exact=exact) for name, choose in tried.items()
    }
    name = min(seconds, key=seconds.__getitem__)
    return seconds[name], name
