"""From a p-value at every level to the upper confidence bound that it implies."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import elementwise

Array = NDArray[np.float64]
LogP = Callable[[Array, NDArray[np.intp]], Array]
_LEAST = 1e-300
_LARGEST = float(np.nextafter(1.0, 0.0))
_PRECISION = {"xatol": 1e-15, "xrtol": 1e-13, "fatol": 0.0, "frtol": 0.0}


def invert_log_p(log_p: LogP, guess: Array, target: float) -> Array:
    """Return the smallest level in [0, 1] at which a decreasing `log_p` is `target`; 1 if none.

    Parameters
    ----------
    log_p : callable
        `log_p(levels [k], places [k])`, the log p-value as a decreasing function of the level for
        the quantities at some places of the vector `guess`.
    guess : ndarray of float64, [n]
        Levels below which the search looks only if they pass themselves: the sample means, say.
    target : float
        ln delta.

    Returns
    -------
    ndarray of float64, [n]
        Upper ends of brackets 1e-13 wide or less, relative to the bound: never below it.
    """
    low = np.clip(guess, _LEAST, _LARGEST)
    high = np.full_like(low, _LARGEST)
    places = np.arange(low.size)
    out = np.ones_like(low)
    reached = log_p(high, places) <= target
    passed = log_p(low, places) <= target
    if passed.any():
        high[passed], low[passed] = low[passed], _LEAST
        at_once = passed & (log_p(low, places) <= target)
        out[at_once] = _LEAST
        reached &= ~at_once
    places = places[reached]
    if places.size:
        root = elementwise.find_root(
            lambda level, place: _excess(log_p(level, place), target),
            (low[places], high[places]),
            args=(places,),
            tolerances=_PRECISION,
        )
        out[places] = np.where(root.success, root.bracket[1], 1.0)
    return out


def _excess(log_p: Array, target: float) -> Array:
    """How far from the target: evidence grows like a square from the mean on, its root evenly."""
    return np.asarray(math.sqrt(-target) - np.sqrt(-np.minimum(log_p, 0.0)))
