"""Scores of the exit's readout beyond its largest probability: entropy, energy, logit margin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import AbstractScore, Features, State, needed
from adaptive.policies._scores import readout


@dataclass(frozen=True)
class NegativeEntropy(AbstractScore):
    """Minus the Shannon entropy of the exit's readout, in nats: ``[-log(vocabulary), 0]``.

    Computed as ``sum p x - logsumexp(x)`` on logits shifted by their largest, so logits of any
    size give a finite score (released DeeBERT code sums raw exponentials and overflows).

    References
    ----------
    .. [1] Teerapittayanon et al., "BranchyNet", ICPR 2016.
    .. [2] Xin et al., "DeeBERT", ACL 2020.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    upper: ClassVar[float] = 0.0

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        return _negative_entropy(readout(features, pruned=False)), state


@dataclass(frozen=True)
class Concentration(AbstractScore):
    """One minus the entropy over its largest possible value, in [0, 1].

    The same order of tokens as :class:`NegativeEntropy`, on a scale that does not depend on the
    size of the vocabulary.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    upper: ClassVar[float] = 1.0

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        logits = readout(features, pruned=False)
        return 1.0 + _negative_entropy(logits) / math.log(logits.shape[-1]), state


@dataclass(frozen=True)
class Energy(AbstractScore):
    """Minus the free energy of the logits, ``T logsumexp(x / T)``: unbounded.

    Parameters
    ----------
    temperature : float
        Positive.

    References
    ----------
    .. [1] Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise InvalidArgumentError("temperature", self.temperature, "positive and finite")

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        logits = readout(features, pruned=False)
        return self.temperature * torch.logsumexp(logits / self.temperature, dim=-1), state


@dataclass(frozen=True)
class LogitMargin(AbstractScore):
    """Difference of the two largest logits, at least 0: no normalisation is needed at all.

    Parameters
    ----------
    pruned : bool
        Read the exit's pruned vocabulary.
    """

    pruned: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The feature read."""
        return frozenset({"pruned_logits" if self.pruned else "logits"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """No memory."""
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        top = torch.topk(readout(features, pruned=self.pruned), 2, dim=-1).values
        return top[..., 0] - top[..., 1], state


@dataclass(frozen=True)
class DynamicVocabulary(AbstractScore):
    """Top-two probability margin within the tokens that the first asked exit found likely.

    The first asked exit forms all logits and keeps the ids of the ``kept[first]`` best; a later
    exit reads the first ``kept[stage]`` of them only, and only those rows of the head are
    multiplied. The ids are ids of the full vocabulary, so nothing has to be mapped back. When an
    exit's two best tokens are among the kept ones, the score is the full margin divided by the
    kept mass: never below it. When the best token was dropped, it can be anything: thresholds must
    be calibrated on this score itself.

    Parameters
    ----------
    kept : tuple of int
        Tokens kept at each exit, 0..K-2, non-increasing, at least 2 (`decaying_vocabulary`).
    first : int
        The first asked exit.

    References
    ----------
    .. [1] Vincenti et al., "Dynamic vocabulary pruning in early-exit LLMs", ENLSP workshop 2024.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "head"})
    per_exit: ClassVar[tuple[str, ...]] = ("kept",)
    upper: ClassVar[float] = 1.0

    kept: tuple[int, ...]
    first: int = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        rising = any(b > a for a, b in pairwise(self.kept))
        if not self.kept or rising or self.kept[-1] < 2:
            raise InvalidArgumentError("kept", self.kept, "non-increasing integers >= 2, per exit")
        if not 0 <= self.first < len(self.kept):
            raise InvalidArgumentError("first", self.first, f"an exit in 0..{len(self.kept) - 1}")

    def needs_at(self, stage: int) -> frozenset[str]:
        """All logits at the first asked exit, rows of the head behind it."""
        return frozenset({"logits" if stage == self.first else "head"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Ids chosen at the first asked exit, best first, int64 [batch, kept[first]]."""
        size = (batch_size, self.kept[self.first])
        return {"ids": torch.zeros(size, dtype=torch.int64, device=device)}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        if features.stage == self.first:
            logits = needed(features.logits, "logits").float()
            if logits.shape[-1] < self.kept[self.first]:
                expected = f"at most {logits.shape[-1]}, the size of the vocabulary"
                raise InvalidArgumentError("kept", self.kept[self.first], expected)
            kept, ids = torch.topk(logits, self.kept[self.first], dim=-1)
        else:
            ids = state["ids"]
            kept = _rows(features, ids[:, : self.kept[features.stage]])
        top = torch.topk(torch.softmax(kept, dim=-1), 2, dim=-1).values
        return top[:, 0] - top[:, 1], {"ids": ids}

    def advance(self, state: State) -> State:
        """Choose anew for the next token."""
        return {"ids": torch.zeros_like(state["ids"])}


def _rows(features: Features, ids: Tensor) -> Tensor:
    """Logits of some tokens, float32 [batch, n]: picked where all are given, else asked for."""
    if features.logits is not None:
        return features.logits.float().gather(-1, ids)
    if features.head is None:
        needed(None, "head")
    assert features.head is not None
    return features.head(ids).float()


def decaying_vocabulary(first: int, last: int, *, n_exits: int) -> tuple[int, ...]:
    """Sizes ``max(last, first / (1 + (first - last) / last * i / n_exits))`` at exits ``i``.

    Examples
    --------
    >>> decaying_vocabulary(256, 64, n_exits=4)
    (256, 146, 102, 78)
    """
    if not 2 <= last <= first:
        raise InvalidArgumentError("last", last, f"in 2..{first}")
    slope = (first - last) / last
    return tuple(max(last, int(first / (1 + slope * i / n_exits))) for i in range(n_exits))


def _negative_entropy(logits: Tensor) -> Tensor:
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = torch.exp(shifted)
    return -entropy_of(weights, weights * finite_part(shifted))


def finite_part(shifted: Tensor) -> Tensor:
    """Logits shifted to a largest of 0, minus infinity replaced where the weight is 0 anyway."""
    return shifted.clamp(min=-1e4)


def entropy_of(weights: Tensor, terms: Tensor) -> Tensor:
    """Entropy of ``p = w / sum w`` from ``w`` and ``w log w``, over the last axis, in nats."""
    total = weights.sum(dim=-1)
    return torch.log(total) - terms.sum(dim=-1) / total
