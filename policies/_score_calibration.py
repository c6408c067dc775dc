"""Maps from a score to a probability: monotone piecewise-linear tables, and temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace, fit_temperature
from adaptive.policies._base import AbstractScore, Features, Head, State, named, part
from adaptive.policies._labels import exit_losses

#: A monotone table: inputs, strictly ascending, and outputs, non-decreasing.
Table = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Calibrated(AbstractScore):
    """A score mapped, exit by exit, to a probability by a monotone piecewise-linear table.

    The order of tokens within an exit is kept (up to ties), and exits become comparable, which a
    threshold shared by all exits needs. Outside the table the map is constant.

    Parameters
    ----------
    base : AbstractScore
    tables : tuple of tables
        One per exit: ``(inputs, outputs)``, inputs strictly ascending, outputs non-decreasing.
    """

    per_exit: ClassVar[tuple[str, ...]] = ("tables",)
    upper: ClassVar[float] = 1.0

    base: AbstractScore
    tables: tuple[Table, ...]

    def __post_init__(self) -> None:
        for inputs, outputs in self.tables:
            rising = all(b > a for a, b in pairwise(inputs))
            if len(inputs) < 2 or len(inputs) != len(outputs) or not rising:
                raise InvalidArgumentError("tables", inputs, "at least two ascending inputs each")
            if any(b < a for a, b in pairwise(outputs)):
                raise InvalidArgumentError("tables", outputs, "non-decreasing outputs")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

    @property
    def across_tokens(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base.across_tokens

    @classmethod
    def fit(
        cls,
        base: AbstractScore,
        trace: Trace,
        *,
        method: Callable[..., Callable[[ArrayLike], NDArray[Any]]],
        loss: str = "disagreement",
    ) -> Self:
        """Fit one table per exit on a trace of the base score.

        Parameters
        ----------
        base : AbstractScore
        trace : Trace
            The fit split.
        method : callable
            `fit_isotonic`, `fit_platt`, `fit_beta_calibration`, `fit_histogram` of
            `adaptive.calibration`, or your own: scores and labels [n_tokens] to a function from
            scores to probabilities. It is tabulated at 257 quantiles of the scores.
        loss : str
            The column that is zero where the exit was right.
        """
        if not callable(method):
            raise InvalidTypeError("method", method, "a function such as fit_isotonic")
        right = exit_losses(trace, loss) == 0
        scores = np.asarray(trace.scores, dtype=np.float64)
        columns = zip(scores.T, right.T, strict=True)
        return cls(base, tuple(_tabulated(method, s, y) for s, y in columns))

    @property
    def first(self) -> int | None:  # type: ignore[override]
        """As the base."""
        return self.base.first

    def needs_at(self, stage: int) -> frozenset[str]:
        """As the base."""
        return self.base.needs_at(stage)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Tables, on the device, beside the base's memory."""
        state = named(self.base.init(batch_size, device=device), "base")
        for stage, (inputs, outputs) in enumerate(self.tables):
            state[f"x{stage}"] = torch.tensor(inputs, dtype=torch.float32, device=device)
            state[f"y{stage}"] = torch.tensor(outputs, dtype=torch.float32, device=device)
        return state

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]; minus infinity and NaN stay what they are."""
        value, base = self.base.score(features, part(state, "base"))
        x, y = state[f"x{features.stage}"], state[f"y{features.stage}"]
        mapped = torch.where(value > -math.inf, interpolate(value, x, y), value)
        return mapped, state | named(base, "base")

    def advance(self, state: State) -> State:
        """As the base."""
        base = self.base.advance(part(state, "base"))
        return state | named(base, "base")


@dataclass(frozen=True)
class Tempered(AbstractScore):
    """A score read from logits divided by a temperature per exit.

    With :class:`MaxProbability` and a threshold this is "The Right Tool for the Job".

    Parameters
    ----------
    base : AbstractScore
        A score that reads ``logits``, ``pruned_logits`` or ``probe``.
    temperatures : tuple of float
        One per exit, positive.

    References
    ----------
    .. [1] Schwartz et al., "The Right Tool for the Job", ACL 2020.
    """

    per_exit: ClassVar[tuple[str, ...]] = ("temperatures",)

    base: AbstractScore
    temperatures: tuple[float, ...]

    @classmethod
    def fit(cls, base: AbstractScore, logits: ArrayLike, labels: ArrayLike) -> Self:
        """Fit one temperature per exit by the negative log-likelihood of the labels.

        Parameters
        ----------
        base : AbstractScore
        logits : array_like [n_tokens, n_exits, n_classes]
        labels : array_like of int [n_tokens]
            The full model's choice (agreement) or the truth (correctness).
        """
        given = np.asarray(logits, dtype=np.float64)
        fitted = [fit_temperature(given[:, exit], labels) for exit in range(given.shape[1])]
        return cls(base, tuple(found.temperature for found in fitted))

    def __post_init__(self) -> None:
        if not self.temperatures or not all(0.0 < t < math.inf for t in self.temperatures):
            raise InvalidArgumentError("temperatures", self.temperatures, "positive, one per exit")
        if not self.base.needs & {"logits", "pruned_logits", "probe"}:
            expected = "a score that reads logits or the probe: a temperature divides those"
            raise InvalidArgumentError("base", type(self.base).__name__, expected)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

    @property
    def across_tokens(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base.across_tokens

    @property
    def upper(self) -> float:  # type: ignore[override]
        """As the base."""
        return self.base.upper

    @property
    def first(self) -> int | None:  # type: ignore[override]
        """As the base."""
        return self.base.first

    def needs_at(self, stage: int) -> frozenset[str]:
        """As the base."""
        return self.base.needs_at(stage)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Temperatures, on the device, beside the base's memory."""
        base = self.base.init(batch_size, device=device)
        table = torch.tensor(self.temperatures, dtype=torch.float32, device=device)
        return named(base, "base") | {"temperatures": table}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        temperature = state["temperatures"][features.stage]
        cooled = replace(
            features,
            logits=_over(features.logits, temperature),
            head=_head_over(features.head, temperature),
            pruned_logits=_over(features.pruned_logits, temperature),
            probe=_over(features.probe, temperature),
        )
        value, base = self.base.score(cooled, part(state, "base"))
        return value, state | named(base, "base")

    def advance(self, state: State) -> State:
        """As the base."""
        base = self.base.advance(part(state, "base"))
        return state | named(base, "base")


def interpolate(value: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise-linear map of ``value [batch]`` through ascending ``x`` and ``y``, clamped."""
    right = torch.searchsorted(x, value.contiguous()).clamp(1, x.shape[0] - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    share = ((value - x0) / (x1 - x0)).clamp(0.0, 1.0)
    return y0 + share * (y1 - y0)


def _tabulated(
    method: Callable[..., Callable[[ArrayLike], NDArray[Any]]],
    scores: NDArray[Any],
    labels: NDArray[np.bool_],
) -> Table:
    """Table of a fitted map at the quantiles of the finite scores; a falling map becomes flat."""
    finite = np.isfinite(scores)
    if not finite.any():
        return (0.0, 1.0), (0.0, 0.0)
    given, label = scores[finite], labels[finite]
    inputs = np.unique(np.quantile(given, np.linspace(0.0, 1.0, _POINTS), method="nearest"))
    if inputs.size < 2 or np.unique(label).size < 2:
        level = float(label.mean())
        return (float(inputs[0]), float(inputs[0]) + 1.0), (level, level)
    outputs = np.maximum.accumulate(method(given, label)(inputs))
    return tuple(map(float, inputs)), tuple(map(float, outputs))


_POINTS = 257


def _over(value: Tensor | None, temperature: Tensor) -> Tensor | None:
    return None if value is None else value.float() / temperature


def _head_over(head: Head | None, temperature: Tensor) -> Head | None:
    return None if head is None else lambda ids: head(ids).float() / temperature
