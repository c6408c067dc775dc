"""Rules that stop when one running statistic of the scores reaches the knob."""

from __future__ import annotations

import abc
import math
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace
from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._simulate import largest


class AbstractStatisticRule(AbstractRule):
    """Stop at the first asked stage where a statistic is at or above the knob.

    A final subclass says what the statistic is and what it remembers within a token; memory is
    cleared when a token is finished. Such a family is nested by construction: the statistic does
    not depend on the knob, so a lower knob is reached no later.

    ``knob_name`` is the dataclass field that holds the knob. ``strict`` replaces "at or above" by
    "above", where the published rule says so.
    """

    knob_name: ClassVar[str]
    strict: ClassVar[bool] = False

    @abc.abstractmethod
    def tables(self, *, device: torch.device) -> State:
        """Constant device tensors that the statistic reads."""

    @abc.abstractmethod
    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """State at the start of a token, remembered from stage to stage: tensors [batch, ...]."""

    @abc.abstractmethod
    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Statistic of every row, float32 [batch], and the new state; NaN never stops."""

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Knob, tables and memory, on the device."""
        knob = comparable(getattr(self, self.knob_name), device=device)
        tables = self.tables(device=device)
        return {"knob": knob} | tables | self.memory(batch_size, device=device)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare in float32; an infinite knob and a statistic of minus infinity never stop."""
        value, state = self.statistic(features, score, state)
        return value > state["knob"] if self.strict else value >= state["knob"], state

    def advance(self, state: State) -> State:
        """Clear what was remembered within the token."""
        fresh = self.memory(1, device=state["knob"].device)
        cleared = {key: row.expand_as(state[key]).contiguous() for key, row in fresh.items()}
        return state | cleared

    def with_knob(self, knob: float) -> Self:
        """Return the same rule at another value of the knob."""
        changes: dict[str, Any] = {self.knob_name: float(knob)}
        return replace(self, **changes)  # type: ignore[type-var]  # final rules are dataclasses

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then quantiles of the tokens' largest statistics, from high to low."""
        critical = largest(self, self.statistic, trace)
        if self.strict:
            critical = np.nextafter(critical, np.float32(-np.inf))
        return knob_path(critical, size=size)


def knob_path(critical: NDArray[np.floating[Any]], *, size: int) -> tuple[float, ...]:
    """Infinity, then at most ``size - 1`` quantiles of the finite values, from high to low.

    Each value occurred, so each step of the path moves at least one token of the trace.
    """
    if size < 2:
        raise InvalidArgumentError("size", size, "an integer >= 2")
    finite = critical[np.isfinite(critical)]
    if finite.size == 0:
        return (math.inf,)
    levels = np.linspace(1.0, 0.0, size - 1)
    values = np.unique(np.quantile(finite, levels, method="higher"))[::-1]
    return (math.inf, *(float(value) for value in values))


def thinned(knobs: tuple[float, ...], *, size: int) -> tuple[float, ...]:
    """At most ``size`` of the knobs, evenly spaced, both ends kept."""
    if size < 2:
        raise InvalidArgumentError("size", size, "an integer >= 2")
    if len(knobs) <= size:
        return knobs
    chosen = np.unique(np.linspace(0, len(knobs) - 1, size).round().astype(int))
    return tuple(knobs[index] for index in chosen)


def comparable(threshold: float | tuple[float, ...], *, device: torch.device) -> Tensor:
    """Thresholds as float32 on the device, such that one comparison decides.

    Infinity becomes NaN, which no score reaches, not even an infinite one; minus infinity becomes
    the lowest finite number, which a score of minus infinity ("no score") does not reach.
    """
    given = torch.tensor(threshold, dtype=torch.float32, device=device)
    return torch.where(given < math.inf, given.clamp(min=torch.finfo(given.dtype).min), math.nan)


def check_knob(name: str, value: float) -> None:
    """Raise if a knob is NaN or no number."""
    if not isinstance(value, Real):
        raise InvalidTypeError(name, value, "a number")
    if math.isnan(value):
        raise InvalidArgumentError(name, value, "a number, not NaN")
