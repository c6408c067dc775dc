"""Learned gates: logistic regressions of agreement, fitted with balanced classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractScore, Features, State, named, needed, part
from adaptive.policies._labels import exit_losses
from adaptive.policies._readout_scores import entropy_of, finite_part
from adaptive.policies._scores import readout

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]
_SURE = 4.0  # logit given to an exit whose fit split holds one class only


@dataclass(frozen=True)
class LinearGate(AbstractScore):
    """Logistic regression on the hidden state, one per exit: CALM's learned exit classifier.

    Parameters
    ----------
    weights : tuple of tuple of float [n_exits, width]
    biases : tuple of float [n_exits]

    References
    ----------
    .. [1] Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022, section 3.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    per_exit: ClassVar[tuple[str, ...]] = ("weights",)
    upper: ClassVar[float] = 1.0

    weights: Matrix
    biases: Vector

    def __post_init__(self) -> None:
        _check_gate(self.weights, self.biases)

    @classmethod
    def fit(cls, hidden: ArrayLike, agree: ArrayLike) -> Self:
        """Fit every exit by itself; agreeing and disagreeing tokens weigh the same in total.

        Parameters
        ----------
        hidden : array_like [n_tokens, n_exits, width]
            Hidden states of the fit split.
        agree : array_like of bool [n_tokens, n_exits]
            Whether the exit's answer is the full model's.
        """
        inputs, label = np.asarray(hidden, dtype=np.float64), np.asarray(agree, dtype=bool)
        check_labels("hidden", inputs.shape, label.shape)
        return cls(*_logistic(inputs, label))

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Weights and biases, on the device."""
        return _tables(self.weights, self.biases, device)

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Sigmoid of one dot product, float32 [batch]."""
        return _gated(needed(features.hidden, "hidden").float(), features.stage, state), state


@dataclass(frozen=True)
class StatisticsGate(AbstractScore):
    """Logistic regression on four statistics of the exit's readout, one per exit: JEI-DNN's gate.

    The statistics are the largest probability, the entropy, the margin of the two largest
    probabilities and the entropy of the normalised squared probabilities.

    Parameters
    ----------
    weights : tuple of tuple of float [n_exits, 4]
    biases : tuple of float [n_exits]

    References
    ----------
    .. [1] Chataoui et al., "Jointly-learned exit and inference for a dynamic neural network:
       JEI-DNN", ICLR 2024.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    per_exit: ClassVar[tuple[str, ...]] = ("weights",)
    upper: ClassVar[float] = 1.0

    weights: Matrix
    biases: Vector

    def __post_init__(self) -> None:
        _check_gate(self.weights, self.biases)

    @classmethod
    def fit(cls, logits: ArrayLike, agree: ArrayLike) -> Self:
        """Fit every exit by itself, with balanced classes.

        Parameters
        ----------
        logits : array_like [n_tokens, n_exits, vocabulary]
            Readouts of the fit split.
        agree : array_like of bool [n_tokens, n_exits]
        """
        given = torch.from_numpy(np.array(logits, dtype=np.float32))
        label = np.asarray(agree, dtype=bool)
        check_labels("logits", tuple(given.shape), label.shape)
        return cls(*_logistic(statistics_of(given).double().numpy(), label))

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Weights and biases, on the device."""
        return _tables(self.weights, self.biases, device)

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        inputs = statistics_of(readout(features, pruned=False))
        return _gated(inputs, features.stage, state), state


@dataclass(frozen=True)
class RecurrentGate(AbstractScore):
    """Gate with a memory of the sequence: logistic regression on a score and its running means.

    The memory holds exponential means, over the tokens of the sequence, of the base score at the
    first asked exit, which every token visits: what it holds therefore does not depend on where
    earlier tokens stopped, and a full-depth trace foretells the loop exactly. It starts at zero
    with every sequence. A stand-in for DYNAMAX's recurrent classifiers.

    Parameters
    ----------
    base : AbstractScore
        A score without memory across tokens.
    decays : tuple of float [n_means]
        Decay per token of each mean, in (0, 1).
    weights : tuple of tuple of float [n_exits, 1 + n_means]
        Weight of the base score, then of the means.
    biases : tuple of float [n_exits]
    first : int
        The first asked exit.

    References
    ----------
    .. [1] "DYNAMAX: Dynamic computing for transformers and Mamba", arXiv 2504.20922.
    """

    across_tokens: ClassVar[bool] = True
    per_exit: ClassVar[tuple[str, ...]] = ("weights",)
    upper: ClassVar[float] = 1.0

    base: AbstractScore
    decays: Vector
    weights: Matrix
    biases: Vector
    first: int = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check_gate(self.weights, self.biases)
        if not self.decays or not all(0.0 < decay < 1.0 for decay in self.decays):
            raise InvalidArgumentError("decays", self.decays, "numbers in (0, 1)")
        if self.base.across_tokens:
            raise InvalidArgumentError("base", self.base, "a score without memory across tokens")
        if self.base.first not in (None, self.first):
            raise InvalidArgumentError("first", self.first, f"{self.base.first}, as the base's")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

    @classmethod
    def fit(
        cls,
        base: AbstractScore,
        trace: Trace,
        *,
        decays: Vector = (0.5, 0.9, 0.99),
        first: int = 0,
        loss: str = "disagreement",
    ) -> Self:
        """Fit on a trace of the base score, with balanced classes."""
        scores = np.asarray(trace.scores, dtype=np.float64)
        means = _running_means(scores[:, first], trace.positions, decays)
        inputs = np.concatenate(
            [scores[:, :, None], np.repeat(means[:, None], scores.shape[1], 1)], axis=2
        )
        weights, biases = _logistic(inputs, exit_losses(trace, loss) == 0)
        return cls(base=base, decays=decays, weights=weights, biases=biases, first=first)

    def needs_at(self, stage: int) -> frozenset[str]:
        """As the base."""
        return self.base.needs_at(stage)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Means so far, float32 [batch, n_means], tables, and the base's memory."""
        base = self.base.init(batch_size, device=device)
        return named(base, "base") | {
            "means": torch.zeros(batch_size, len(self.decays), device=device),
            "decays": torch.tensor(self.decays, dtype=torch.float32, device=device),
            **_tables(self.weights, self.biases, device),
        }

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        value, base = self.base.score(features, part(state, "base"))
        means = state["means"]
        if features.stage == self.first:
            means = torch.lerp(value[:, None], means, state["decays"])
        inputs = torch.cat([value[:, None], means], dim=1)
        state = state | named(base, "base") | {"means": means}
        return _gated(inputs, features.stage, state), state

    def advance(self, state: State) -> State:
        """Keep the means; let the base forget the token."""
        base = self.base.advance(part(state, "base"))
        return state | named(base, "base")


def statistics_of(logits: Tensor) -> Tensor:
    """Largest probability, entropy, margin, entropy of normalised squares: float32 [..., 4]."""
    top = torch.topk(logits, 2, dim=-1).values
    shifted = logits - top[..., :1]
    weights = torch.exp(shifted)
    squares, terms = weights * weights, weights * finite_part(shifted)
    best = weights.sum(dim=-1).reciprocal()
    margin = best * (1.0 - torch.exp(top[..., 1] - top[..., 0]))
    entropies = entropy_of(weights, terms), entropy_of(squares, 2.0 * weights * terms)
    return torch.stack([best, entropies[0], margin, entropies[1]], dim=-1)


def _gated(inputs: Tensor, stage: int, state: State) -> Tensor:
    width = state["weights"].shape[1]
    if inputs.shape[-1] != width:
        expected = f"of width {width}, as what the gate was fitted on"
        raise InvalidArgumentError("hidden", f"width {inputs.shape[-1]}", expected)
    return torch.sigmoid(inputs @ state["weights"][stage] + state["biases"][stage])


def _tables(weights: Matrix, biases: Vector, device: torch.device) -> State:
    return {
        "weights": torch.tensor(weights, dtype=torch.float32, device=device),
        "biases": torch.tensor(biases, dtype=torch.float32, device=device),
    }


def _logistic(inputs: NDArray[Any], agree: NDArray[np.bool_]) -> tuple[Matrix, Vector]:
    """Balanced logistic regression per exit; an exit with one class only gets that class's sign."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    weights, biases = [], []
    for stage in range(inputs.shape[1]):
        finite = np.isfinite(inputs[:, stage]).all(axis=1)
        given, label = inputs[finite, stage], agree[finite, stage]
        if np.unique(label).size < 2:
            weights.append((0.0,) * inputs.shape[2])
            biases.append(_SURE if label.any() else -_SURE)
            continue
        scaler = StandardScaler().fit(given)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit(scaler.transform(given), label)
        slope = model.coef_[0] / scaler.scale_
        weights.append(tuple(float(value) for value in slope))
        biases.append(float(model.intercept_[0] - slope @ scaler.mean_))
    return tuple(weights), tuple(biases)


def check_labels(name: str, inputs: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Raise unless inputs are [n_tokens, n_exits, width], with one label per token and exit."""
    if len(inputs) != 3:
        raise InvalidArgumentError(name, f"shape {inputs}", "of shape [n_tokens, n_exits, width]")
    if inputs[:2] != labels:
        raise InvalidArgumentError(
            "agree", f"shape {labels}", f"of shape {inputs[:2]}, one label per input"
        )


def _running_means(
    values: NDArray[np.float64], positions: NDArray[np.int64], decays: Vector
) -> NDArray[np.float64]:
    rates = np.asarray(decays)
    means = np.zeros((values.size, rates.size))
    last = np.zeros(rates.size)
    for token, value in enumerate(values):
        last = (0.0 if positions[token] == 0 else last) * rates + (1.0 - rates) * value
        means[token] = last
    return means


def _check_gate(weights: Matrix, biases: Vector) -> None:
    if not weights or len(weights) != len(biases) or len({len(row) for row in weights}) != 1:
        raise InvalidArgumentError(
            "weights", f"{len(weights)} rows", "one row of equal width and one bias per exit"
        )
