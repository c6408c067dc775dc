"""Offline references: the best stage per token in hindsight, and the regret against it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._labels import stage_losses, stages_of


def oracle_stages(
    trace: Trace, *, loss: str = "disagreement", price: float = math.inf
) -> NDArray[np.int64]:
    """Stage that hindsight would choose for each token: a reference, not a rule.

    Minimises ``price * loss + cost`` with full computation free of loss; at an infinite price it
    is the cheapest stage among those of least loss.

    Parameters
    ----------
    trace : Trace
    loss : str
    price : float
        Cost that one unit of loss is worth, at least 0.

    Returns
    -------
    ndarray of int64 [n_tokens]
        0..n_exits-1, or ``n_exits`` for full computation.

    Examples
    --------
    >>> trace = Trace(
    ...     scores=[[0.1, 0.2]],
    ...     losses={"disagreement": [[1, 0]]},
    ...     costs=[1.0, 2.0, 4.0],
    ...     cost_quantity="FLOPs",
    ... )
    >>> oracle_stages(trace).tolist()
    [1]
    """
    if not price >= 0.0:
        raise InvalidArgumentError("price", price, "at least 0")
    harm = stage_losses(trace, loss)
    if math.isinf(price):
        total = np.where(harm <= harm.min(axis=1, keepdims=True), trace.costs, np.inf)
    else:
        total = price * harm + trace.costs
    return np.asarray(total.argmin(axis=1), dtype=np.int64)


def regret(
    stages: ArrayLike, trace: Trace, *, loss: str = "disagreement", price: float
) -> NDArray[np.float64]:
    """Excess of each token's ``price * loss + cost`` over the oracle's: float64 [n_tokens], >= 0.

    Parameters
    ----------
    stages : array_like of int [n_tokens]
        As `exit_stages` gives them.
    trace : Trace
    loss : str
    price : float
        Finite, at least 0.
    """
    if not 0.0 <= price < math.inf:
        raise InvalidArgumentError("price", price, "finite and at least 0")
    best = oracle_stages(trace, loss=loss, price=price)
    paid = _paid(stages_of(stages, trace), trace, loss, price)
    return paid - _paid(best, trace, loss, price)


def _paid(stages: NDArray[np.int64], trace: Trace, loss: str, price: float) -> NDArray[np.float64]:
    harm = stage_losses(trace, loss)
    found: NDArray[np.float64] = price * harm[np.arange(len(harm)), stages] + trace.costs[stages]
    return found
