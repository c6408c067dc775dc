"""Optimal stopping by backward induction on the binned score of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._labels import exit_losses
from adaptive.policies._sequential import bin_of, equal_mass_edges
from adaptive.policies._statistic import thinned

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class OptimalStopping(AbstractRule):
    """Stop where the price of the expected loss is below the expected cost of going on.

    With the score of a stage cut into bins, the cheapest plan at price ``c`` per unit of loss is
    found from the last exit backwards, with full computation free of loss::

        stop(l, b)  = c * loss(l, b) + cost(l)
        go_on(l, b) = sum_b' P(b' at l + 1 | b at l) min(stop, go_on)(l + 1, b')
        go_on(last exit, b) = cost(full)

    This is the Bayes-optimal plan when the bin is all that matters of the past; the version over
    whole paths grows exponentially with the number of exits. A member asks at all exits.

    Parameters
    ----------
    edges : tuple of tuple of float [n_exits, n_bins - 1]
        Ascending inner edges of the bins of each exit's score.
    losses : tuple of tuple of float [n_exits, n_bins]
        Expected loss of stopping, per bin.
    transitions : tuple [n_exits - 1] of tuple of tuple of float [n_bins, n_bins]
        Law of the next exit's bin given this one's.
    costs : tuple of float [n_exits + 1]
        Cumulative cost of each stage.
    price : float
        Cost that one unit of loss is worth, non-negative; ``inf`` never stops early.

    Notes
    -----
    Not nested: at a higher price another plan is optimal, and it may stop some tokens later.

    References
    ----------
    .. [1] Ferguson, "Optimal stopping and applications", chapter 2.
    """

    per_exit: ClassVar[tuple[str, ...]] = ("edges",)
    nested: ClassVar[bool] = False

    edges: Rows
    losses: Rows
    transitions: tuple[Rows, ...]
    costs: tuple[float, ...]
    price: float = math.inf

    def __post_init__(self) -> None:
        if not self.price >= 0.0:
            raise InvalidArgumentError("price", self.price, "at least 0")
        if not len(self.edges) == len(self.losses) == len(self.transitions) + 1:
            raise InvalidArgumentError("edges", f"{len(self.edges)} rows", "one row per exit")
        if len(self.costs) != len(self.edges) + 1:
            raise InvalidArgumentError("costs", self.costs, "one per stage, full depth included")

    @classmethod
    def fit(cls, trace: Trace, *, n_bins: int = 16, loss: str = "disagreement") -> Self:
        """Estimate losses and transitions on the fit split, with a pseudo-token of loss 1 per bin.

        Empty bins are thereby never trusted, and no bin is free of expected loss.
        """
        if n_bins < 2:
            raise InvalidArgumentError("n_bins", n_bins, "an integer >= 2")
        harm = exit_losses(trace, loss)
        edges = [equal_mass_edges(s, n_bins=n_bins) for s in np.asarray(trace.scores).T]
        pairs = zip(edges, np.asarray(trace.scores).T, strict=True)
        bins = [np.searchsorted(edge, score, side="right") for edge, score in pairs]
        expected, moves = [], []
        for stage, here in enumerate(bins):
            count = np.bincount(here, minlength=n_bins) + 1.0
            expected.append((np.bincount(here, harm[:, stage], minlength=n_bins) + 1.0) / count)
            if stage + 1 < len(bins):
                moved = np.full((n_bins, n_bins), 1.0 / n_bins)
                np.add.at(moved, (here, bins[stage + 1]), 1.0)
                moves.append(moved / moved.sum(axis=1, keepdims=True))
        return cls(
            edges=_rows(edges),
            losses=_rows(expected),
            transitions=tuple(_rows(move) for move in moves),
            costs=tuple(float(cost) for cost in trace.costs),
        )

    def plan(self) -> NDArray[np.bool_]:
        """Whether to stop, by backward induction: bool [n_exits, n_bins]."""
        stops = np.zeros((len(self.losses), len(self.losses[0])), dtype=bool)
        if math.isinf(self.price):
            return stops
        value = np.full(stops.shape[1], self.costs[-1])
        for stage in range(len(stops) - 1, -1, -1):
            if stage < len(self.transitions):
                value = np.asarray(self.transitions[stage]) @ value
            now = self.price * np.asarray(self.losses[stage]) + self.costs[stage]
            stops[stage] = now <= value
            value = np.minimum(now, value)
        return stops

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Edges and the plan, on the device."""
        return {
            "edges": torch.tensor(self.edges, dtype=torch.float32, device=device),
            "plan": torch.tensor(self.plan(), device=device),
        }

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Look the bin up in the plan; NaN and minus infinity never stop."""
        stop = state["plan"][features.stage][bin_of(score, state["edges"][features.stage])]
        return stop & (score > -math.inf), state

    def with_knob(self, knob: float) -> Self:
        """Return the optimal plan at another price."""
        changes: dict[str, Any] = {"price": float(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then prices at which the plan differs from the plan before, high to low."""
        least = max(min(min(row) for row in self.losses), 1e-9)
        highest = (self.costs[-1] - self.costs[0]) / least
        path, before = [math.inf], replace(self, price=math.inf).plan()
        for price in np.geomspace(highest, highest * least * 1e-3, 4 * size):
            plan = replace(self, price=float(price)).plan()
            if (plan != before).any():
                path.append(float(price))
                before = plan
        return thinned(tuple(path), size=size)


def _rows(rows: Any) -> Rows:
    return tuple(tuple(float(value) for value in row) for row in rows)
