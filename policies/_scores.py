"""Scores: how settled the answer looks after a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.policies._base import AbstractScore, Features, State, needed


@dataclass(frozen=True)
class ProbeScore(AbstractScore):
    """Probability of agreeing with the full model, read by the exit's linear probe.

    The default: one dot product per row, about 1% of a layer. A probe trained to halt gives the
    halting probability that :class:`QuantileExit` and :class:`SampledExit` read.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    upper: ClassVar[float] = 1.0

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Sigmoid of the probe's logit, in (0, 1)."""
        return torch.sigmoid(needed(features.probe, "probe").float()), state


@dataclass(frozen=True)
class NoScore(AbstractScore):
    """No score at all, for rules that read none: minus infinity, which never stops.

    Costs nothing: schedules, patience and full computation need no confidence.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Minus infinity, float32 [batch]."""
        nothing = torch.full_like(features.position, float("-inf"), dtype=torch.float32)
        return nothing, state


@dataclass(frozen=True)
class MaxProbability(AbstractScore):
    """Largest probability of the exit's readout, in (0, 1].

    Parameters
    ----------
    pruned : bool
        Read the exit's pruned vocabulary; the probability is then renormalised over it.
    """

    upper: ClassVar[float] = 1.0

    pruned: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The feature read."""
        return frozenset({"pruned_logits" if self.pruned else "logits"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """``exp(max - logsumexp)``: no full softmax is formed."""
        logits = readout(features, pruned=self.pruned)
        return torch.exp(logits.amax(dim=-1) - torch.logsumexp(logits, dim=-1)), state


@dataclass(frozen=True)
class Margin(AbstractScore):
    """Difference of the two largest probabilities of the exit's readout, in [0, 1].

    Parameters
    ----------
    pruned : bool
        Read the exit's pruned vocabulary.

    References
    ----------
    .. [1] Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022, section 3.5.
    """

    upper: ClassVar[float] = 1.0

    pruned: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The feature read."""
        return frozenset({"pruned_logits" if self.pruned else "logits"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Top two logits and one logsumexp: no full softmax is formed."""
        logits = readout(features, pruned=self.pruned)
        top = torch.topk(logits, 2, dim=-1).values
        weights = torch.exp(top - torch.logsumexp(logits, dim=-1, keepdim=True))
        return weights[..., 0] - weights[..., 1], state


@dataclass(frozen=True)
class Saturation(AbstractScore):
    """Cosine of the hidden states at successive exits, in [-1, 1].

    Undefined at the first exit, where the score is ``-inf`` and no finite threshold stops.

    References
    ----------
    .. [1] Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022, section 3.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "previous"})
    upper: ClassVar[float] = 1.0

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory: the loop keeps the state of the exit before."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Cosine similarity in float32."""
        hidden = needed(features.hidden, "hidden").float()
        if features.previous is None:
            return hidden.new_full(hidden.shape[:-1], float("-inf")), state
        return torch.cosine_similarity(hidden, features.previous.float(), dim=-1), state


def readout(features: Features, *, pruned: bool) -> Tensor:
    """Logits [batch, vocabulary] or [batch, kept] in float32."""
    if pruned:
        return needed(features.pruned_logits, "pruned_logits").float()
    return needed(features.logits, "logits").float()
