"""Maps from a score to a probability: monotone piecewise-linear tables, and temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractScore, Features, State, named, part

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
        method: Callable[[NDArray[Any], NDArray[np.bool_]], Table],
        loss: str = "disagreement",
    ) -> Self:
        """Fit one table per exit on a trace of the base score.

        Parameters
        ----------
        base : AbstractScore
        trace : Trace
            The fit split.
        method : callable
            `isotonic_table`, `platt_table`, `beta_table`, `histogram_table` or your own: scores
            and labels [n_tokens] to a table.
        loss : str
            The column that is zero where the exit was right.
        """
        right = np.asarray(trace.losses[loss]) == 0
        scores = np.asarray(trace.scores, dtype=np.float64)
        return cls(base, tuple(method(s, y) for s, y in zip(scores.T, right.T, strict=True)))

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
        One per exit, positive (`fit_temperatures`).

    References
    ----------
    .. [1] Schwartz et al., "The Right Tool for the Job", ACL 2020.
    """

    base: AbstractScore
    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.temperatures or not all(0.0 < t < math.inf for t in self.temperatures):
            raise InvalidArgumentError("temperatures", self.temperatures, "positive, one per exit")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

    @property
    def across_tokens(self) -> bool:  # type: ignore[override]
        """As the base."""
        return self.base.across_tokens

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
            pruned_logits=_over(features.pruned_logits, temperature),
            probe=_over(features.probe, temperature),
        )
        value, base = self.base.score(cooled, part(state, "base"))
        return value, state | named(base, "base")

    def advance(self, state: State) -> State:
        """As the base."""
        base = self.base.advance(part(state, "base"))
        return state | named(base, "base")


def fit_temperatures(logits: ArrayLike, labels: ArrayLike) -> tuple[float, ...]:
    """Temperature per exit that minimises the negative log-likelihood of the labels.

    Parameters
    ----------
    logits : array_like [n_tokens, n_exits, n_classes]
    labels : array_like of int [n_tokens]
        The full model's choice (agreement) or the truth (correctness).
    """
    from scipy import optimize, special

    given = np.asarray(logits, dtype=np.float64)
    label = np.asarray(labels)

    def loss(log_temperature: float, stage: int) -> float:
        log_p = special.log_softmax(given[:, stage] / math.exp(log_temperature), axis=1)
        return -float(log_p[np.arange(label.size), label].mean())

    found = [
        optimize.minimize_scalar(loss, args=(stage,), bounds=(-5.0, 5.0), method="bounded")
        for stage in range(given.shape[1])
    ]
    return tuple(math.exp(float(result.x)) for result in found)


def isotonic_table(scores: NDArray[Any], labels: NDArray[np.bool_]) -> Table:
    """Isotonic regression of the labels on the scores."""
    from sklearn.isotonic import IsotonicRegression

    x, y = _usable(scores, labels)
    if np.unique(x).size < 2:
        return _flat(x, y)
    model = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    return _table(model.X_thresholds_, model.y_thresholds_)


def platt_table(scores: NDArray[Any], labels: NDArray[np.bool_]) -> Table:
    """Logistic regression of the labels on the scores, tabulated (a falling fit becomes flat)."""
    x, y = _usable(scores, labels)
    return _regressed(x[:, None], y, x)


def beta_table(scores: NDArray[Any], labels: NDArray[np.bool_]) -> Table:
    """Beta calibration: logistic regression on ``log s`` and ``-log(1 - s)``, scores in [0, 1].

    References
    ----------
    .. [1] Kull, Silva Filho and Flach, "Beta calibration", AISTATS 2017.
    """
    x, y = _usable(scores, labels)
    clipped = np.clip(x, 1e-6, 1 - 1e-6)
    return _regressed(np.stack([np.log(clipped), -np.log1p(-clipped)], axis=1), y, x)


def histogram_table(scores: NDArray[Any], labels: NDArray[np.bool_], *, n_bins: int = 15) -> Table:
    """Mean label per bin of equal mass, made monotone: PCEE's binned accuracy."""
    x, y = _usable(scores, labels)
    parts = np.array_split(np.argsort(x, kind="stable"), min(n_bins, x.size))
    centres = np.array([x[part].mean() for part in parts])
    return isotonic_table(centres, np.array([y[part].mean() for part in parts]))


def interpolate(value: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise-linear map of ``value [batch]`` through ascending ``x`` and ``y``, clamped."""
    right = torch.searchsorted(x, value.contiguous()).clamp(1, x.shape[0] - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    share = ((value - x0) / (x1 - x0)).clamp(0.0, 1.0)
    return y0 + share * (y1 - y0)


def _regressed(inputs: NDArray[Any], y: NDArray[Any], x: NDArray[Any]) -> Table:
    from sklearn.linear_model import LogisticRegression

    if np.unique(x).size < 2 or np.unique(y).size < 2:
        return _flat(x, y)
    model = LogisticRegression(C=1e6, max_iter=1000).fit(inputs, y)
    order = np.argsort(x, kind="stable")
    chosen = np.unique(np.linspace(0, order.size - 1, 129).astype(int))
    fitted = model.predict_proba(inputs[order[chosen]])[:, 1]
    return _table(x[order[chosen]], np.maximum.accumulate(fitted))


def _table(x: NDArray[Any], y: NDArray[Any]) -> Table:
    """Distinct float32 inputs with the largest output of each."""
    inputs, group = np.unique(x.astype(np.float32), return_inverse=True)
    if inputs.size < 2:
        return _flat(x, y)
    outputs = np.zeros(inputs.size)
    np.maximum.at(outputs, group, y)
    rising = np.maximum.accumulate(outputs)
    return tuple(float(v) for v in inputs), tuple(float(v) for v in rising)


def _flat(x: NDArray[Any], y: NDArray[Any]) -> Table:
    level = float(y.mean())
    return (float(x[0]), float(x[0]) + 1.0), (level, level)


def _usable(scores: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    finite = np.isfinite(scores)
    if not finite.any():
        return np.zeros(1), np.zeros(1)
    return scores[finite].astype(np.float64), labels[finite]


def _over(value: Tensor | None, temperature: Tensor) -> Tensor | None:
    return None if value is None else value.float() / temperature
