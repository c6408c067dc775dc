"""A small network as a gate: trained by gradient steps, with balanced classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import AbstractScore, Features, State, needed
from adaptive.policies._gates import Matrix, check_labels


@dataclass(frozen=True)
class HaltingGate(AbstractScore):
    """Halting probability of a small network: PALBERT's lambda layer.

    Layers of ``tanh(W x + b)`` and a last linear one, on the hidden state, the hidden state at
    the exit before (zeros at the first) and a learned embedding of the exit; shared by all exits.
    The score is the probability of stopping here given that nothing stopped before, as
    :class:`QuantileExit` and :class:`SampledExit` read it; a threshold reads it as well.

    Parameters
    ----------
    layers : tuple of matrices
        Weights ``[out, in]`` of each layer; the first takes ``2 width + embedding``, the last
        gives 1.
    biases : tuple of tuple of float
        One vector per layer.
    embedding : tuple of tuple of float [n_exits, embedding]
        May be of width 0.

    References
    ----------
    .. [1] Balagansky and Gavrilov, "PALBERT: teaching ALBERT to ponder", NeurIPS 2022.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "previous"})
    per_exit: ClassVar[tuple[str, ...]] = ("embedding",)
    upper: ClassVar[float] = 1.0

    layers: tuple[Matrix, ...]
    biases: Matrix
    embedding: Matrix

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.biases) or len(self.layers[-1]) != 1:
            raise InvalidArgumentError(
                "layers", f"{len(self.layers)} layers", "one bias vector per layer, one last output"
            )

    @classmethod
    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(
        cls,
        hidden: ArrayLike,
        agree: ArrayLike,
        *,
        width: int = 32,
        embedding: int = 4,
        steps: int = 300,
        rng: int = 0,
    ) -> Self:
        """Train by Adam on the balanced binary cross-entropy, all exits together.

        Parameters
        ----------
        hidden : array_like [n_tokens, n_exits, width]
        agree : array_like of bool [n_tokens, n_exits]
        width, embedding : int
            Units of the three hidden layers and of the exit embedding.
        steps : int
            Full-batch steps at learning rate 0.01.
        rng : int
            Seed of the initial weights.
        """
        states = torch.from_numpy(np.array(hidden, dtype=np.float32))
        target = torch.from_numpy(np.array(agree, dtype=np.float32))
        check_labels("hidden", tuple(states.shape), tuple(target.shape))
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        seed = torch.Generator("cpu").manual_seed(rng)
        sizes = [2 * states.shape[2] + embedding, width, width, width, 1]
        weights = [
            (torch.randn(b, a, generator=seed, device="cpu") / math.sqrt(a)).requires_grad_()
            for a, b in pairwise(sizes)
        ]
        biases = [torch.zeros(b, requires_grad=True, device="cpu") for b in sizes[1:]]
        table = 0.1 * torch.randn(states.shape[1], embedding, generator=seed, device="cpu")
        table.requires_grad_()
        positive = target.mean().clamp(1e-6, 1 - 1e-6)
        balance = torch.where(target > 0, 0.5 / positive, 0.5 / (1 - positive))
        optimiser = torch.optim.Adam([*weights, *biases, table], lr=0.01)
        for _ in range(steps):
            placed = table.expand(states.shape[0], -1, -1)
            logit = _network(torch.cat([states, before, placed], dim=-1), weights, biases)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, balance)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return cls(
            layers=tuple(_nested(weight) for weight in weights),
            biases=tuple(tuple(bias.tolist()) for bias in biases),
            embedding=_nested(table),
        )

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Weights, biases and embedding, on the device."""
        state = {
            f"weight{i}": torch.tensor(layer, device=device) for i, layer in enumerate(self.layers)
        }
        state |= {
            f"bias{i}": torch.tensor(bias, device=device) for i, bias in enumerate(self.biases)
        }
        return state | {"embedding": torch.tensor(self.embedding, device=device)}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        hidden = needed(features.hidden, "hidden").float()
        before = torch.zeros_like(hidden) if features.previous is None else features.previous
        placed = state["embedding"][features.stage].expand(hidden.shape[0], -1)
        weights = [state[f"weight{i}"] for i in range(len(self.layers))]
        biases = [state[f"bias{i}"] for i in range(len(self.layers))]
        inputs = torch.cat([hidden, before.float(), placed], dim=-1)
        return torch.sigmoid(_network(inputs, weights, biases)), state


def _network(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inputs = torch.tanh(inputs @ weight.T + bias)
    return (inputs @ weights[-1].T + biases[-1])[..., 0]


def _nested(weight: Tensor) -> Matrix:
    return tuple(tuple(row) for row in weight.detach().tolist())
