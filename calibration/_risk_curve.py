"""Exact risk, cost and departure curves of a shared threshold, at all thresholds in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._threshold_counts import threshold_counter
from adaptive.calibration._trace import Trace
from adaptive.calibration._validation import as_floats, check_count

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 1 << 15


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskCurve:
    """Mean loss and cost of "stop at the first exit whose score reaches the threshold".

    Parameters
    ----------
    thresholds : ndarray [n_columns]
        As asked for.
    risk : ndarray [n_columns]
        Mean over units of the unit's mean loss per token.
    cost : ndarray [n_columns]
        Mean cost per token over all tokens, in `trace.cost_quantity`.
    trace : Trace
    loss : str
    warmup : int
    """

    thresholds: NDArray[np.float32]
    risk: NDArray[np.float64]
    cost: NDArray[np.float64]
    trace: Trace = field(repr=False)
    loss: str
    warmup: int = 0

    def unit_losses(self, column: int) -> NDArray[np.float64]:
        """Mean loss per token of every unit at ``thresholds[column]`` [n_units].

        A provider for `control_risk`: only the columns that are asked for are computed.
        """
        return stopped_means(
            self.trace, float(self.thresholds[column]), loss=self.loss, warmup=self.warmup
        )

    def errors(self) -> NDArray[np.int64]:
        """Count of units with loss 1 at every threshold [n_columns], for `binomial_log_p`.

        Raises
        ------
        InvalidArgumentError
            If the loss is not 0/1, a unit has several tokens, or units are weighted.
        """
        table = self.trace.losses[self.loss]
        binary = table.dtype == bool or bool(((table == 0) | (table == 1)).all())
        if not binary or self.trace.n_tokens != self.trace.n_units:
            raise InvalidArgumentError(
                "trace", f"loss {self.loss!r}", "of one token per unit with a 0/1 loss"
            )
        return _counts(self.risk, self.trace)

    def to_frame(self) -> pd.DataFrame:
        """One row per threshold."""
        import pandas as pd

        return pd.DataFrame(
            {"threshold": self.thresholds, "risk": self.risk, "cost": self.cost}
        ).rename_axis("column")


@dataclass(frozen=True, kw_only=True, eq=False)
class DepartureCurve:
    """How often a unit departs at all from full computation, and where it first does.

    Parameters
    ----------
    thresholds : ndarray [n_columns]
        As asked for.
    rate : ndarray [n_columns]
        Share of units with at least one token that stops where its loss is not zero.
    first : ndarray [n_units]
        Highest threshold at which the unit departs: walking down from ``inf``, the first one.
        ``-inf`` if it never does. Below it a unit may agree again: stopping earlier can be
        right where stopping later was wrong, so `rate` need not be monotone.
    trace : Trace
    loss : str
    warmup : int
    """

    thresholds: NDArray[np.float32]
    rate: NDArray[np.float64]
    first: NDArray[np.float32]
    trace: Trace = field(repr=False)
    loss: str
    warmup: int = 0

    def unit_losses(self, column: int) -> NDArray[np.float64]:
        """1 for every unit that departs at ``thresholds[column]``, else 0 [n_units]."""
        return stopped_departures(
            self.trace, float(self.thresholds[column]), loss=self.loss, warmup=self.warmup
        )

    def errors(self) -> NDArray[np.int64]:
        """Count of units that depart at every threshold [n_columns], for `binomial_log_p`.

        Raises
        ------
        InvalidArgumentError
            If units are weighted.
        """
        return _counts(self.rate, self.trace)

    def to_frame(self) -> pd.DataFrame:
        """One row per threshold."""
        import pandas as pd

        return pd.DataFrame({"threshold": self.thresholds, "rate": self.rate}).rename_axis("column")


def stop_stages(trace: Trace, threshold: float, *, warmup: int = 0) -> NDArray[np.int64]:
    """Stage at which every token stops: its first exit with ``score >= threshold``.

    Parameters
    ----------
    trace : Trace
    threshold : float
        Compared in float32, as the running rule does.
    warmup : int
        The first `warmup` tokens of every unit never stop early.

    Returns
    -------
    ndarray of int [n_tokens]
        0..n_exits-1, or ``n_exits`` for full computation.
    """
    stops = np.ones((trace.n_tokens, trace.n_exits + 1), dtype=bool)
    np.greater_equal(trace.scores, np.float32(threshold), out=stops[:, :-1])
    stages: NDArray[np.int64] = stops.argmax(axis=1).astype(np.int64, copy=False)
    if warmup:
        stages[trace.positions < warmup] = trace.n_exits
    return stages


def risk_curve(
    trace: Trace, thresholds: ArrayLike, *, loss: str = "disagreement", warmup: int = 0
) -> RiskCurve:
    r"""Exact risk and cost at every threshold, in one sort-and-count pass.

    With :math:`m_s` the largest score up to exit :math:`s`, a token stops at :math:`s` exactly
    for thresholds in :math:`(m_{s-1}, m_s]`. Its loss is therefore a step function of the
    threshold, and the curve is a sum of histograms of the :math:`m_s`.

    Parameters
    ----------
    trace : Trace
        With `weights`, units count in proportion to them.
    thresholds : array_like [n_columns]
        In any order, no NaN; ``inf`` is full computation. Compared in float32.
    loss : str
        Name of a loss of the trace.
    warmup : int
        The first `warmup` tokens of every unit never stop early.

    Returns
    -------
    RiskCurve

    Raises
    ------
    InvalidArgumentError
        If a threshold is NaN or the trace has no such loss.

    Notes
    -----
    Time :math:`O(\text{tokens} \cdot \text{exits} \cdot \log \text{thresholds})`; memory beyond
    the trace :math:`O(\text{tokens})` at most. The curve describes the trace; it promises
    nothing about new units. Where later tokens depend on earlier exits it describes stopping on
    the full model's own prefix.

    Examples
    --------
    >>> trace = Trace(
    ...     scores=[[0.2, 0.9], [0.8, 0.9]], losses={"disagreement": [[1, 0], [0, 0]]},
    ...     costs=[1.0, 2.0, 4.0], cost_quantity="FLOPs",
    ... )
    >>> curve = risk_curve(trace, [np.inf, 0.5, 0.1])
    >>> curve.risk.tolist(), curve.cost.tolist()
    ([0.0, 0.0, 0.5], [4.0, 1.5, 1.0])
    """
    values, ascending, order = _prepared(trace, thresholds, loss, warmup)
    share = _token_shares(trace)
    risk_steps = np.zeros(values.size + 1)
    cost_steps = np.zeros(values.size + 1)
    stage_saving = np.diff(trace.costs)
    table = trace.losses[loss]
    for rows, unit, counts in _stop_counts(trace, ascending, warmup):
        steps = _loss_steps(table[rows])
        if share is not None:
            steps *= share[unit]
        for stage in range(trace.n_exits):
            risk_steps += np.bincount(counts[stage], steps[stage], values.size + 1)
            tally = np.bincount(counts[stage], minlength=values.size + 1)
            cost_steps += stage_saving[stage] * tally
    risk = _tail_sums(risk_steps)
    if share is None:
        risk /= trace.n_units
    cost = trace.costs[-1] - _tail_sums(cost_steps) / trace.n_tokens
    return RiskCurve(
        thresholds=values,
        risk=_unsorted(risk, order),
        cost=_unsorted(cost, order),
        trace=trace,
        loss=loss,
        warmup=warmup,
    )


def departure_curve(
    trace: Trace, thresholds: ArrayLike, *, loss: str = "disagreement", warmup: int = 0
) -> DepartureCurve:
    """Share of units that depart at all, at every threshold, and where each first does.

    In exact mode with greedy decoding this describes free-running text too: up to its first
    departure a run reads the full model's own prefix, so one full-depth trace decides for every
    threshold whether the run departs.

    Parameters
    ----------
    trace, thresholds, loss, warmup
        As in `risk_curve`; a token departs where its loss is not zero.

    Returns
    -------
    DepartureCurve

    Raises
    ------
    InvalidArgumentError
        If a threshold is NaN or the trace has no such loss.
    """
    values, ascending, order = _prepared(trace, thresholds, loss, warmup)
    table, offsets = trace.losses[loss], trace.offsets
    first = np.full(trace.n_units, -np.inf, dtype=np.float32)
    spans: list[NDArray[np.int64]] = []
    for rows, unit, counts in _stop_counts(trace, ascending, warmup):
        wrong = table[rows] != 0
        if warmup:
            wrong &= (np.arange(rows.start, rows.stop) - offsets[unit] >= warmup)[:, None]
        _raise_first(first, trace.scores[rows], wrong, unit)
        starts = np.concatenate([np.zeros_like(counts[:1]), counts[:-1]])
        stage, token = np.nonzero(wrong.T & (starts < counts))
        spans.append(np.stack([unit[token], starts[stage, token], counts[stage, token]]))
    rate = _covered_share(np.concatenate(spans, axis=1), trace, values.size)
    return DepartureCurve(
        thresholds=values,
        rate=_unsorted(rate, order),
        first=first,
        trace=trace,
        loss=loss,
        warmup=warmup,
    )


def stopped_means(trace: Trace, threshold: float, *, loss: str, warmup: int) -> NDArray[np.float64]:
    """Return every unit's mean loss per token [n_units] when it stops at the threshold."""
    losses = _stopped_losses(trace, loss, threshold, warmup)
    if trace.n_tokens == trace.n_units:
        return losses
    mean: NDArray[np.float64] = np.add.reduceat(losses, trace.offsets[:-1]) / trace.lengths
    return mean


def stopped_departures(
    trace: Trace, threshold: float, *, loss: str, warmup: int
) -> NDArray[np.float64]:
    """Return 1 for every unit that departs at the threshold, else 0 [n_units]."""
    losses = _stopped_losses(trace, loss, threshold, warmup)
    departs = np.logical_or.reduceat(losses != 0.0, trace.offsets[:-1])
    return departs.astype(np.float64)


def _counts(mean: NDArray[np.float64], trace: Trace) -> NDArray[np.int64]:
    """Integer counts from their exactly rounded share: rounding n (k / n) gives k below 2**52."""
    if trace.weights is not None:
        raise InvalidArgumentError("trace", "weighted units", "unweighted for exact counts")
    return np.rint(mean * trace.n_units).astype(np.int64)


def _prepared(
    trace: Trace, thresholds: ArrayLike, loss: str, warmup: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.intp]]:
    with np.errstate(over="ignore"):  # beyond float32 a threshold is infinite
        values = as_floats("thresholds", thresholds).astype(np.float32)
    if values.ndim != 1 or values.size == 0 or np.isnan(values).any():
        raise InvalidArgumentError("thresholds", thresholds, "a non-empty vector without NaN")
    if loss not in trace.losses:
        names = ", ".join(map(repr, trace.losses))
        raise InvalidArgumentError("loss", loss, f"a loss of the trace: {names}")
    check_count("warmup", warmup, least=0)
    order = np.argsort(values, kind="stable")
    return values, values[order], order


def _token_shares(trace: Trace) -> NDArray[np.float64] | None:
    """Share in the risk of one token of each unit, or None if units are equal single tokens."""
    if trace.weights is None and trace.n_tokens == trace.n_units:
        return None
    weights = np.ones(trace.n_units) if trace.weights is None else trace.weights
    shares: NDArray[np.float64] = weights / weights.sum() / trace.lengths
    return shares


def _stop_counts(
    trace: Trace, ascending: NDArray[np.float32], warmup: int
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of rows, each with the rows' units and ``counts [n_exits, n_rows]``.

    ``counts[s]`` is the number of ascending thresholds at which the token has stopped by exit s.
    """
    count = threshold_counter(ascending)
    offsets = trace.offsets
    for start in range(0, trace.n_tokens, _BLOCK):
        stop = min(start + _BLOCK, trace.n_tokens)
        rows = slice(start, stop)
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        ends = np.minimum(offsets[first + 1 : last + 1], stop)
        unit = np.repeat(np.arange(first, last), ends - np.maximum(offsets[first:last], start))
        best = np.maximum.accumulate(np.ascontiguousarray(trace.scores[rows].T), axis=0)
        counts = count(best)
        if warmup:
            counts[:, start + np.arange(stop - start) - offsets[unit] < warmup] = 0
        yield rows, unit, counts


def _loss_steps(losses: NDArray[Any]) -> NDArray[np.float64]:
    """Loss at each exit less the loss at the next stage, [n_exits, n_rows] from [n_rows, n_exits].

    Full computation has loss 0, so the steps from any exit on sum to its loss.
    """
    steps = np.array(losses.T, dtype=np.float64)
    steps[:-1] -= steps[1:].copy()
    return steps


def _tail_sums(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of ``steps[j + 1:]`` for each j; exactly zero where nothing stops."""
    return np.cumsum(steps[:0:-1])[::-1].copy()


def _unsorted(values: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    placed = np.empty_like(values)
    placed[order] = values
    return placed


def _stopped_losses(trace: Trace, loss: str, threshold: float, warmup: int) -> NDArray[np.float64]:
    stages = stop_stages(trace, threshold, warmup=warmup)
    losses = np.zeros(trace.n_tokens)
    stopped = np.flatnonzero(stages < trace.n_exits)
    losses[stopped] = trace.losses[loss][stopped, stages[stopped]]
    return losses


def _raise_first(
    first: NDArray[np.float32],
    scores: NDArray[np.float32],
    wrong: NDArray[np.bool_],
    unit: NDArray[np.int64],
) -> None:
    """Raise each unit's first departure to the best score at which one of these tokens departs."""
    best = np.maximum.accumulate(scores, axis=1)
    fresh = np.ones_like(wrong)
    fresh[:, 1:] = best[:, 1:] > best[:, :-1]
    highest = np.where(fresh & wrong, best, np.float32(-np.inf)).max(axis=1)
    np.maximum.at(first, unit, highest)


def _covered_share(spans: NDArray[np.int64], trace: Trace, n_columns: int) -> NDArray[np.float64]:
    """Weighted share of units whose spans ``(unit, start, stop)`` cover each column."""
    unit, start, stop = spans[:, np.lexsort((spans[1], spans[0]))]
    offset = unit * (n_columns + 1)
    reach = np.maximum.accumulate(stop + offset)
    before = np.concatenate([[-1], reach[:-1]])
    begin = np.maximum(start + offset, before) - offset
    fresh = np.flatnonzero(begin < stop)
    weights = np.ones(trace.n_units) if trace.weights is None else trace.weights
    share = weights[unit[fresh]]
    steps = np.zeros(n_columns + 1)
    steps += np.bincount(stop[fresh], share, n_columns + 1)
    steps -= np.bincount(begin[fresh], share, n_columns + 1)
    covered: NDArray[np.float64] = _tail_sums(steps) / weights.sum()
    return covered
