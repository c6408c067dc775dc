"""What stopping where a rule stops would have cost each unit, and lost it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError, Trace, mixture_upper_bound


def unit_losses(
    stages: ArrayLike, trace: Trace, *, loss: str = "disagreement"
) -> NDArray[np.float64]:
    """Mean loss over each unit's tokens, float64 [n_units]: what `control_risk` tests.

    Parameters
    ----------
    stages : array_like of int [n_tokens]
        As `exit_stages` gives them; full computation has no loss.
    trace : Trace
    loss : str

    Examples
    --------
    >>> trace = Trace(
    ...     scores=[[0.9], [0.2]],
    ...     losses={"disagreement": [[1], [1]]},
    ...     costs=[1.0, 4.0],
    ...     cost_quantity="layers",
    ...     lengths=[2],
    ... )
    >>> unit_losses([0, 1], trace).tolist(), unit_costs([0, 1], trace).tolist()
    ([0.5], [2.5])
    """
    if loss not in trace.losses:
        raise InvalidArgumentError("loss", loss, f"one of {', '.join(map(repr, trace.losses))}")
    where = _stages(stages, trace)
    harm = np.asarray(trace.losses[loss], dtype=np.float64)
    harm = np.concatenate([harm, np.zeros((trace.n_tokens, 1))], axis=1)
    return _unit_means(harm[np.arange(trace.n_tokens), where], trace)


def unit_costs(stages: ArrayLike, trace: Trace) -> NDArray[np.float64]:
    """Mean cost per token of each unit, float64 [n_units], in ``trace.cost_quantity``."""
    return _unit_means(np.asarray(trace.costs)[_stages(stages, trace)], trace)


def mean_cost_bound(stages: ArrayLike, trace: Trace, *, delta: float) -> float:
    """Upper bound on the mean cost per token of a unit: the certificate of a budget.

    Parameters
    ----------
    stages : array_like of int [n_tokens]
    trace : Trace
        Units that fitted nothing.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        With probability at least ``1 - delta`` over independent units the expected cost is at
        most this. The routed risk is another statement, certified by itself.
    """
    full = float(trace.costs[-1])
    shares = unit_costs(stages, trace) / full
    return full * float(np.asarray(mixture_upper_bound(shares, delta=delta)).reshape(-1)[0])


def _stages(stages: ArrayLike, trace: Trace) -> NDArray[np.int64]:
    where = np.asarray(stages, dtype=np.int64)
    if where.shape != (trace.n_tokens,):
        raise InvalidArgumentError("stages", f"shape {where.shape}", f"({trace.n_tokens},)")
    return where


def _unit_means(values: NDArray[np.float64], trace: Trace) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.add.reduceat(values, trace.offsets[:-1]) / trace.lengths
    return means
