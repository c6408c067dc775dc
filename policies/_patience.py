"""Patience: stop when successive stages keep giving the same answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import Features, State, needed
from adaptive.policies._statistic import AbstractStatisticRule, check_knob


@dataclass(frozen=True)
class Patience(AbstractStatisticRule):
    """Stop when the answer has stayed the same ``patience`` times in a row: PABEE.

    The counter starts at 0 with the first answer, so a patience of t takes t + 1 equal answers.
    LGViT counts answers instead: its 7 is a patience of 6 (:meth:`equal_answers`).

    Parameters
    ----------
    patience : float
        At least 1; ``inf`` never stops early (PABEE's special case 0 means that: say ``inf``).

    References
    ----------
    .. [1] Zhou et al., "BERT loses patience", NeurIPS 2020.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    knob_name: ClassVar[str] = "patience"

    patience: float = math.inf

    def __post_init__(self) -> None:
        _check_patience(self.patience)

    @classmethod
    def equal_answers(cls, count: int) -> Self:
        """Patience that stops at the ``count``-th equal answer in a row, at least 2."""
        return cls(patience=count - 1)

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Answer before, and how often it has been repeated."""
        return {
            "before": torch.full((batch_size,), -1, dtype=torch.int64, device=device),
            "count": torch.zeros(batch_size, device=device),
        }

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Repetitions in a row; minus infinity before the first."""
        answer = needed(features.answer, "answer")
        count = torch.where(answer == state["before"], state["count"] + 1.0, 0.0)
        new = state | {"before": answer, "count": count}
        return torch.where(count > 0, count, -math.inf), new


@dataclass(frozen=True)
class ValuePatience(AbstractStatisticRule):
    """PABEE for regression: the score is the prediction, equal means closer than a tolerance.

    Parameters
    ----------
    tolerance : float
        Positive; PABEE suggests 0.1.
    patience : float
        At least 1; ``inf`` never stops early.
    """

    knob_name: ClassVar[str] = "patience"

    tolerance: float
    patience: float = math.inf

    def __post_init__(self) -> None:
        _check_patience(self.patience)
        if not self.tolerance > 0.0:
            raise InvalidArgumentError("tolerance", self.tolerance, "positive")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Prediction before (NaN at the start), and how often it has been repeated."""
        return {
            "before": torch.full((batch_size,), math.nan, device=device),
            "count": torch.zeros(batch_size, device=device),
        }

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Repetitions in a row; minus infinity before the first."""
        close = (score - state["before"]).abs() < self.tolerance
        count = torch.where(close, state["count"] + 1.0, 0.0)
        new = state | {"before": score, "count": count}
        return torch.where(count > 0, count, -math.inf), new


@dataclass(frozen=True)
class WindowedPatience(AbstractStatisticRule):
    """Stop when ``agreeing`` of the last ``window`` answers before this one equal it.

    Parameters
    ----------
    window : int
        At least 1; ``agreeing = window`` is :class:`Patience`.
    agreeing : float
        At least 1; above ``window`` it never stops early.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    knob_name: ClassVar[str] = "agreeing"

    window: int
    agreeing: float = math.inf

    def __post_init__(self) -> None:
        _check_patience(self.agreeing)
        if self.window < 1:
            raise InvalidArgumentError("window", self.window, "an integer >= 1")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Last answers, int64 [batch, window]; -1 where there is none yet."""
        size = (batch_size, self.window)
        return {"answers": torch.full(size, -1, dtype=torch.int64, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Count the equal answers in the window; minus infinity if none."""
        answer = needed(features.answer, "answer")[:, None]
        count = (state["answers"] == answer).sum(dim=1).float()
        new = torch.cat([state["answers"][:, 1:], answer], dim=1)
        return torch.where(count > 0, count, -math.inf), state | {"answers": new}


@dataclass(frozen=True)
class AccumulatedConfidence(AbstractStatisticRule):
    """Stop when the weighted confidence of successive agreeing stages adds up: BEEM.

    The sum restarts when the answer changes; an exit without a score adds and stops nothing. With
    every confidence 1 and every weight 1, a threshold of t + 1 is a patience of t.

    Parameters
    ----------
    weights : tuple of float
        Weight of each exit, positive; one per exit.
    threshold : float
        ``inf`` never stops early.

    References
    ----------
    .. [1] Bajpai and Hanawal, "BEEM: boosting performance of early exit DNNs using multi-exit
       classifiers as experts", ICLR 2025.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    per_exit: ClassVar[tuple[str, ...]] = ("weights",)
    knob_name: ClassVar[str] = "threshold"

    weights: tuple[float, ...]
    threshold: float = math.inf

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)
        if not self.weights or not all(0.0 < weight < math.inf for weight in self.weights):
            raise InvalidArgumentError("weights", self.weights, "positive numbers, one per exit")

    def tables(self, *, device: torch.device) -> State:
        """Weights, float32 [n_exits]."""
        return {"weights": torch.tensor(self.weights, dtype=torch.float32, device=device)}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Answer before, and the confidence that has added up for it."""
        return {
            "before": torch.full((batch_size,), -1, dtype=torch.int64, device=device),
            "total": torch.zeros(batch_size, device=device),
        }

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Confidence added up over the agreeing stages."""
        answer = needed(features.answer, "answer")
        carried = torch.where(answer == state["before"], state["total"], 0.0)
        missing = score == -math.inf
        total = carried + torch.where(missing, 0.0, state["weights"][features.stage] * score)
        value = torch.where(missing, -math.inf, total)
        return value, state | {"before": answer, "total": total}


def _check_patience(patience: float) -> None:
    if not patience >= 1.0:
        raise InvalidArgumentError("patience", patience, "at least 1 (inf never stops early)")
