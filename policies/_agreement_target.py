"""Thresholds per exit for a target agreement: the optimistic published form and a certified one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration import InvalidArgumentError, Trace, mixture_log_p
from adaptive.policies._labels import exit_losses
from adaptive.policies._outcome import cluster_means
from adaptive.policies._threshold_table import ThresholdTable


def agreement_thresholds(
    trace: Trace, *, targets: Sequence[float], loss: str = "disagreement"
) -> ThresholdTable:
    """Lowest threshold per exit whose tokens at or above it agree at the target rate.

    The published calibration of self-supervised exits: sort tokens by score, take the cumulative
    agreement, keep the last point at or above the target. That point is the best excursion of a
    random walk, so the agreement it shows is optimistic, without bound on noise.

    Parameters
    ----------
    trace : Trace
    targets : sequence of float
        Strictly descending, in (0, 1).
    loss : str
        The column that is zero where the exit was right.

    Returns
    -------
    ThresholdTable
        Its knob is the target. Certified as a family by calibration like any other.

    References
    ----------
    .. [1] Valade, "Accelerating large language model inference with self-supervised early exits",
       arXiv 2407.21082.
    """
    levels = _checked(targets)
    right = exit_losses(trace, loss) == 0
    rows = [
        tuple(
            _largest_excursion(np.asarray(scores), labels, target)
            for scores, labels in zip(trace.scores.T, right.T, strict=True)
        )
        for target in levels
    ]
    return ThresholdTable(levels=levels, thresholds=tuple(rows))


def certified_agreement_thresholds(
    trace: Trace,
    *,
    targets: Sequence[float],
    delta: float,
    n_candidates: int = 16,
    loss: str = "disagreement",
) -> ThresholdTable:
    r"""Lowest threshold per exit with a proven agreement at or above the target.

    For exit l and threshold t the claim "tokens at or above t agree at rate a" is
    :math:`E\,[\frac1T \sum_i 1\{s_{il} \ge t\}(y_{il} - (1 - a))] \le 0` with y = 1 for a
    disagreement: a bounded mean over units, tested by a betting test. Every exit and candidate is
    tested at ``delta / (n_exits * n_candidates)``.

    Parameters
    ----------
    trace : Trace
        Units that were used for nothing else; a cluster is the unit where the trace has groups.
    targets : sequence of float
        Strictly descending, in (0, 1).
    delta : float
        In (0, 1).
    n_candidates : int
        Thresholds tried per exit: quantiles of its scores at evenly spaced levels, at least 1.
    loss : str
        The column that is zero where the exit was right.

    Returns
    -------
    ThresholdTable
        ``inf`` where no candidate passes: the exit never stops.

    Notes
    -----
    Guarantee, for independent units and each target by itself: with probability at least
    ``1 - delta`` every exit's tokens at or above its threshold agree at least at the target rate
    (tokens of a unit weighing the same in total). It is a promise about each exit alone; the risk
    of the routed run is certified by calibration. The candidates are quantiles of the scores of
    the same units, which ``n_units`` far above ``n_candidates`` makes harmless but not exact.
    """
    levels = _checked(targets)
    if not 0.0 < delta < 1.0:
        raise InvalidArgumentError("delta", delta, "in (0, 1)")
    if n_candidates < 1:
        raise InvalidArgumentError("n_candidates", n_candidates, "an integer >= 1")
    wrong = exit_losses(trace, loss) != 0
    log_level = math.log(delta / (trace.n_exits * n_candidates))
    rows = []
    for target in levels:
        row = []
        for exit in range(trace.n_exits):
            scores = np.asarray(trace.scores[:, exit])
            candidates = _candidates(scores, n_candidates)
            losses = _unit_losses(trace, scores, wrong[:, exit], candidates, 1.0 - target)
            passed = mixture_log_p(losses, risk=1.0 - target) <= log_level
            row.append(float(candidates[passed].min(initial=math.inf)))
        rows.append(tuple(row))
    return ThresholdTable(levels=levels, thresholds=tuple(rows))


def _largest_excursion(scores: NDArray[Any], right: NDArray[np.bool_], target: float) -> float:
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    agreement = np.cumsum(right[order]) / np.arange(1, order.size + 1)
    last_of_tie = np.append(ordered[1:] < ordered[:-1], True)
    passing = np.flatnonzero((agreement >= target) & last_of_tie & np.isfinite(ordered))
    return float(ordered[passing[-1]]) if passing.size else math.inf


def _candidates(scores: NDArray[Any], count: int) -> NDArray[np.float64]:
    finite = scores[np.isfinite(scores)]
    if finite.size == 0:
        return np.full(1, math.inf)
    levels = np.arange(count) / count
    return np.unique(np.quantile(finite, levels, method="higher")).astype(np.float64)


def _unit_losses(
    trace: Trace,
    scores: NDArray[Any],
    wrong: NDArray[np.bool_],
    candidates: NDArray[np.float64],
    risk: float,
) -> NDArray[np.float64]:
    """Per unit and candidate, in [0, 1]: mean over tokens of ``risk + 1{stops}(wrong - risk)``.

    Where the trace has groups, the mean of that over the units of each cluster.
    """
    stops = scores[:, None] >= candidates[None, :]
    per_token = risk + stops * (wrong[:, None] - risk)
    means: NDArray[np.float64] = np.add.reduceat(per_token, trace.offsets[:-1], axis=0)
    return cluster_means(means / trace.lengths[:, None], trace)


def _checked(targets: Sequence[float]) -> tuple[float, ...]:
    found = tuple(map(float, np.atleast_1d(targets)))
    if not found or any(not 0.0 < b < a for a, b in pairwise((1.0, *found))):
        raise InvalidArgumentError("targets", targets, "numbers in (0, 1), strictly descending")
    return found
