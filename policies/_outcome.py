"""What stopping where a rule stops would have cost each unit, and lost it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import (
    Certificate,
    InvalidArgumentError,
    Trace,
    control_risk,
    mixture_upper_bound,
)
from adaptive.policies._labels import stage_losses, stages_of


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

    Returns
    -------
    ndarray of float64 [n_units]

    Raises
    ------
    InvalidArgumentError
        If the trace has no such loss, or a stage is out of range.

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
    harm, where = stage_losses(trace, loss), stages_of(stages, trace)
    return unit_means(harm[np.arange(trace.n_tokens), where], trace)


def unit_costs(stages: ArrayLike, trace: Trace) -> NDArray[np.float64]:
    """Mean cost per token of each unit, float64 [n_units], in ``trace.cost_quantity``."""
    return unit_means(np.asarray(trace.costs)[stages_of(stages, trace)], trace)


def mean_cost_bound(stages: ArrayLike, trace: Trace, *, delta: float) -> float:
    """Upper bound on the mean cost per token of a unit: the certificate of a budget.

    Parameters
    ----------
    stages : array_like of int [n_tokens]
    trace : Trace
        Units that fitted nothing; a cluster is the unit where the trace has groups.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        With probability at least ``1 - delta`` over the draw of the trace's units, which are
        independent and alike, the expected cost of a new one is at most this; where the trace has
        groups, of a new cluster, which has the mean of its units. The routed risk is another
        statement, certified by itself.
    """
    full = float(trace.costs[-1])
    shares = cluster_means(unit_costs(stages, trace), trace) / full
    return full * float(np.asarray(mixture_upper_bound(shares, delta=delta)).reshape(-1)[0])


def budget_certificate(
    stages: ArrayLike, trace: Trace, *, budget: float, delta: float, rng: int = 0
) -> Certificate:
    """Certificate that the expected cost per token is at most the budget.

    A statement of its own beside the one about the risk: each holds with its own ``1 - delta``.

    Parameters
    ----------
    stages : array_like of int [n_tokens]
        Where the policy stops each token of the trace (`exit_stages`).
    trace : Trace
        Units that fitted nothing; a cluster is the unit where the trace has groups.
    budget : float
        Mean cost per token, in ``trace.cost_quantity``; below full computation's.
    delta : float
        In (0, 1).
    rng : int
        Seed of the order of the units.

    Returns
    -------
    Certificate
        ``holds`` says whether the budget is certified. Its loss is the cost as a share of full
        computation's.

    Raises
    ------
    InvalidArgumentError
        If no policy that stops early can meet the budget, or every one does; the message gives
        the feasible range.

    Notes
    -----
    For independent units and this one policy: ``P(holds and expected cost > budget) <= delta``, by
    the same test as a bounded loss.
    """
    least, full = float(trace.costs[0]), float(trace.costs[-1])
    if not least <= budget < full:
        raise InvalidArgumentError("budget", budget, f"in [{least:g}, {full:g})")
    shares = unit_costs(stages, trace) / full
    result = control_risk(
        np.stack([np.zeros_like(shares), shares], axis=1),
        risk=budget / full,
        delta=delta,
        groups=trace.groups,
        loss=f"cost per token as a share of full computation ({trace.cost_quantity})",
        rng=rng,
    )
    return result.certificate


def cluster_means(values: NDArray[np.float64], trace: Trace) -> NDArray[np.float64]:
    """Mean over each cluster of values per unit, float64 [n_clusters, ...].

    Units of one cluster are no independent draws: a promise counts clusters. Without groups every
    unit is its own, and the values are returned as they are.
    """
    if trace.groups is None:
        return values
    _, codes = np.unique(trace.groups, return_inverse=True)
    sizes = np.bincount(codes)
    sums = np.zeros((sizes.size, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums / sizes.reshape(-1, *[1] * (values.ndim - 1))


def unit_means(values: NDArray[np.float64], trace: Trace) -> NDArray[np.float64]:
    """Mean of a number per token over each unit, float64 [n_units]."""
    means: NDArray[np.float64] = np.add.reduceat(values, trace.offsets[:-1]) / trace.lengths
    return means
