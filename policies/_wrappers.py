"""Scores of the history of another score over the stages of a token, and votes over stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import special
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import AbstractScore, Features, State, named, needed, part


@dataclass(frozen=True)
class MovingMean(AbstractScore):
    """Exponential moving mean of a score over the stages of a token.

    ``m <- (1 - weight) m + weight x``, started at the first finite value: :class:`Saturation` has
    none at the first exit.

    Parameters
    ----------
    base : AbstractScore
        A score without memory across tokens.
    weight : float
        In (0, 1].
    """

    base: AbstractScore
    weight: float

    def __post_init__(self) -> None:
        _check_base(self.base)
        _check_weight(self.weight)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

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
        """Mean so far, NaN before the first stage, beside the base's memory."""
        return _wrapped(self.base, batch_size, device) | {
            "mean": torch.full((batch_size,), math.nan, device=device)
        }

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        value, base = self.base.score(features, part(state, "base"))
        before = state["mean"]
        mean = torch.where(torch.isfinite(before), torch.lerp(before, value, self.weight), value)
        return mean, named(base, "base") | {"mean": mean}

    def advance(self, state: State) -> State:
        """Forget the stages of the token that is finished."""
        return named(self.base.advance(part(state, "base")), "base") | {
            "mean": torch.full_like(state["mean"], math.nan)
        }


@dataclass(frozen=True)
class Steadiness(AbstractScore):
    """Minus the exponential moving variance of a score over the stages of a token, at most 0.

    ``m <- (1 - a) m + a x``, then ``v <- (1 - a) v + a (x - m)^2`` with the *updated* mean, from
    ``m = x_0``, ``v = 0``. The variance means nothing during the first steps, so the score is
    ``-inf`` there, and where the base has no score, which counts as no step. This is EAT when the
    stages are reasoning steps and the base is the entropy after a forced end of thinking.

    Parameters
    ----------
    base : AbstractScore
        A score without memory across tokens.
    weight : float
        ``a``, in (0, 1].
    warmup : int
        Number of stages seen before the score counts, at least 1; EAT uses ``4 / a``.
    """

    upper: ClassVar[float] = 0.0

    base: AbstractScore
    weight: float
    warmup: int

    def __post_init__(self) -> None:
        _check_base(self.base)
        _check_weight(self.weight)
        if self.warmup < 1:
            raise InvalidArgumentError("warmup", self.warmup, "an integer >= 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the base reads."""
        return self.base.needs

    @property
    def first(self) -> int | None:  # type: ignore[override]
        """As the base."""
        return self.base.first

    def needs_at(self, stage: int) -> frozenset[str]:
        """As the base."""
        return self.base.needs_at(stage)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Mean, variance and number of stages so far, beside the base's memory."""
        return _wrapped(self.base, batch_size, device) | {
            "mean": torch.full((batch_size,), math.nan, device=device),
            "variance": torch.zeros(batch_size, device=device),
            "seen": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        value, base = self.base.score(features, part(state, "base"))
        missing = value == -math.inf
        first = state["seen"] == 0
        mean = torch.where(first, value, torch.lerp(state["mean"], value, self.weight))
        spread = torch.lerp(state["variance"], (value - mean) ** 2, self.weight)
        variance = torch.where(first, torch.where(torch.isnan(value), value, 0.0), spread)
        mean = torch.where(missing, state["mean"], mean)
        variance = torch.where(missing, state["variance"], variance)
        seen = state["seen"] + (~missing).to(torch.int64)
        score = torch.where(~missing & (seen >= self.warmup), -variance, -math.inf)
        return score, named(base, "base") | {"mean": mean, "variance": variance, "seen": seen}

    def advance(self, state: State) -> State:
        """Forget the stages of the token that is finished."""
        return named(self.base.advance(part(state, "base")), "base") | {
            "mean": torch.full_like(state["mean"], math.nan),
            "variance": torch.zeros_like(state["variance"]),
            "seen": torch.zeros_like(state["seen"]),
        }


@dataclass(frozen=True)
class VoteShare(AbstractScore):
    """Share of the votes so far that the current stage's answer has, in (0, 1].

    Stages may be layers, sampled answers or models of a cascade. A plain share is 1 after one
    vote already, so every threshold stops at the first stage or never; some votes against from
    the start make ``m`` equal votes of ``m`` count for ``m / (m + against)``, which grows with
    them.

    Parameters
    ----------
    n_stages : int
        Most votes that a token can collect (the number of exits), at least 1.
    against : float
        Votes against from the start, at least 0, where the score is the plain share.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    per_exit: ClassVar[tuple[str, ...]] = ("n_stages",)
    upper: ClassVar[float] = 1.0

    n_stages: int
    against: float = 1.0

    def __post_init__(self) -> None:
        _check_votes(self.n_stages)
        if not 0.0 <= self.against < math.inf:
            raise InvalidArgumentError("against", self.against, "finite, at least 0")

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Votes so far, int64 [batch, n_stages], and their number [batch]."""
        return _ballot(batch_size, self.n_stages, device)

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        answer = needed(features.answer, "answer")
        state = _voted(answer, state)
        same = (state["votes"] == answer[:, None]).sum(dim=1)
        return same / (state["cast"] + self.against), state

    def advance(self, state: State) -> State:
        """Start a new ballot."""
        return _new_ballot(state)


@dataclass(frozen=True)
class BetaMajority(AbstractScore):
    """Probability that the leading answer has the majority over the second, in [0.5, 1).

    With ``a >= b`` the two largest vote counts, ``P(p > 1/2)`` under ``p ~ Beta(a + 1, b + 1)``:
    Adaptive-Consistency stops at 0.95. The answer to emit is the leading one, not the last.

    Parameters
    ----------
    n_stages : int
        Most votes that a token can collect, at least 1.

    References
    ----------
    .. [1] Aggarwal et al., "Let's sample step by step: Adaptive-Consistency", EMNLP 2023.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    per_exit: ClassVar[tuple[str, ...]] = ("n_stages",)
    upper: ClassVar[float] = 1.0

    n_stages: int

    def __post_init__(self) -> None:
        _check_votes(self.n_stages)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Votes so far, their number, and the table of probabilities [votes + 1, votes + 1]."""
        table = torch.tensor(majority_table(self.n_stages), dtype=torch.float32, device=device)
        return _ballot(batch_size, self.n_stages, device) | {"table": table}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Float32 [batch]."""
        state = state | _voted(needed(features.answer, "answer"), state)
        votes = state["votes"]
        counts = ((votes[:, :, None] == votes[:, None, :]) & (votes >= 0)[:, None, :]).sum(dim=2)
        lead = counts.amax(dim=1)
        leader = votes.gather(1, counts.argmax(dim=1, keepdim=True))
        second = torch.where(votes == leader, 0, counts).amax(dim=1)
        return state["table"][lead, second], state

    def advance(self, state: State) -> State:
        """Start a new ballot."""
        return state | _new_ballot(state)


def majority_table(n_votes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``P(p > 1/2)`` for ``p ~ Beta(a + 1, b + 1)`` at row ``a``, column ``b``, both 0..n_votes.

    Examples
    --------
    >>> float(majority_table(4)[4, 0])
    0.96875
    """
    counts = np.arange(n_votes + 1)
    table: np.ndarray[tuple[int, int], np.dtype[np.float64]] = special.betainc(
        counts[None, :] + 1.0, counts[:, None] + 1.0, 0.5
    )
    return table


def _ballot(batch_size: int, n_stages: int, device: torch.device) -> State:
    return {
        "votes": torch.full((batch_size, n_stages), -1, dtype=torch.int64, device=device),
        "cast": torch.zeros(batch_size, dtype=torch.int64, device=device),
    }


def _voted(answer: Tensor, state: State) -> State:
    slots = torch.arange(state["votes"].shape[1], device=answer.device)
    votes = torch.where(slots == state["cast"][:, None], answer[:, None], state["votes"])
    return {"votes": votes, "cast": state["cast"] + 1}


def _new_ballot(state: State) -> State:
    return {
        "votes": torch.full_like(state["votes"], -1),
        "cast": torch.zeros_like(state["cast"]),
    }


def _check_votes(n_stages: int) -> None:
    if n_stages < 1:
        raise InvalidArgumentError("n_stages", n_stages, "an integer >= 1")


def _check_base(base: AbstractScore) -> None:
    if base.across_tokens:
        raise InvalidArgumentError("base", base, "a score without memory across tokens")


def _check_weight(weight: float) -> None:
    if not 0.0 < weight <= 1.0:
        raise InvalidArgumentError("weight", weight, "in (0, 1]")


def _wrapped(base: AbstractScore, batch_size: int, device: torch.device) -> State:
    return named(base.init(batch_size, device=device), "base")
