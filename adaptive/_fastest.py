"""Which policy is fastest on this machine, so that a busy machine does not say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

#: A policy is faster only if it wins so many comparisons that chance would with less than this.
_LEVEL = 0.01
#: Comparisons from which it is judged, and up to which more are made while that is undecided.
_FEWEST, _MOST = 12, 24


@dataclass(frozen=True)
class Fastest:
    """A choice among policies.

    Parameters
    ----------
    index : int
        Its place.
    seconds : ndarray of float64 [n_policies]
        Of every policy: the least of the rounds, on average over the pieces of work.
    """

    index: int
    seconds: NDArray[np.float64]


def fastest(measure: Callable[[], NDArray[np.float64]], *, preferred: int) -> Fastest:
    """Choose the policy that was expected to be fastest, unless another clearly is.

    Other work on the machine only ever adds time, and seldom the same to two runs. So policies
    take turns on the same pieces of work, and what counts is how often one is faster than another
    on a piece: a sign test, which asks nothing of how long the disturbances are.

    Parameters
    ----------
    measure : callable
        One round: seconds ``[n_pieces, n_policies]``, the policies taking turns. Called until 12
        pieces were compared, and up to 24 while it is undecided whether policy 0, which is full
        computation, or the preferred one is faster.
    preferred : int
        The policy taken where nothing clearly speaks for another.

    Returns
    -------
    Fastest
        Of several that are clearly faster than the preferred one, the one with the least time.
    """
    rounds = [measure()]
    pairs = rounds[0]
    while len(pairs) < _MOST:
        full, own = pairs[:, 0], pairs[:, preferred]
        decided = preferred == 0 or _faster(full, own) or _faster(own, full)
        if decided and len(pairs) >= _FEWEST:
            break
        rounds.append(measure())
        pairs = np.concatenate(rounds)
    seconds = np.min(rounds, axis=0).mean(axis=0)
    better = [j for j in range(pairs.shape[1]) if _faster(pairs[:, j], pairs[:, preferred])]
    index = min(better, key=lambda j: float(seconds[j]), default=preferred)
    return Fastest(index, seconds)


def _faster(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether ``one`` wins more often than chance would let it."""
    wins = int(np.sum(one < other))
    return bool(binomtest(wins, len(one), alternative="greater").pvalue < _LEVEL)
