"""Stop at the first stage whose score reaches a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import Features, State
from adaptive.policies._statistic import AbstractStatisticRule, check_knob


@dataclass(frozen=True)
class Threshold(AbstractStatisticRule):
    """Stop at the first asked stage with ``score >= threshold``.

    The knob is the threshold itself, shared by all stages: scores must live on one scale, which
    the default score (a calibrated probe) does. ``threshold = inf`` never stops early. BranchyNet,
    DeeBERT, EE-LLM, LITE and MuE are this rule with another score.

    Parameters
    ----------
    threshold : float
        Any float but NaN.
    warmup : int
        The first ``warmup`` generated tokens always go to full depth. At least 0.

    Raises
    ------
    InvalidArgumentError
        If ``threshold`` is NaN or ``warmup`` is negative.

    Examples
    --------
    >>> rule = Threshold(0.9)
    >>> state = rule.init(2, device=torch.device("cpu"))
    >>> here = Features(stage=0, position=torch.zeros(2, dtype=torch.int64))
    >>> stop, state = rule.decide(here, torch.tensor([0.95, 0.5]), state)
    >>> stop.tolist()
    [True, False]
    """

    knob_name: ClassVar[str] = "threshold"
    on_score: ClassVar[bool] = True

    threshold: float = math.inf
    warmup: int = 0

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)
        if self.warmup < 0:
            raise InvalidArgumentError("warmup", self.warmup, "an integer >= 0")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """None."""
        return {}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the score itself, and minus infinity while warming up."""
        if self.warmup:
            cold = features.position < self.warmup
            return torch.where(cold, float("-inf"), score), state
        return score, state
