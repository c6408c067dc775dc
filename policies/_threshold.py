"""Stop at the first stage whose score reaches a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, Features, State


@dataclass(frozen=True)
class Threshold(AbstractRule):
    """Stop at the first asked stage with ``score >= threshold``.

    The knob is the threshold itself, shared by all stages: scores must live on one scale, which
    the default score (a calibrated probe) does. ``threshold = inf`` never stops early.

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

    threshold: float = math.inf
    warmup: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise InvalidArgumentError("threshold", self.threshold, "a number, not NaN")
        if self.warmup < 0:
            raise InvalidArgumentError("warmup", self.warmup, "an integer >= 0")

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Put the threshold on the device, so that recalibration never recaptures a graph."""
        return {"threshold": torch.tensor(self.threshold, dtype=torch.float32, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare in float32; a NaN score never stops."""
        stop = score >= state["threshold"]
        if self.warmup:
            stop = stop & (features.position >= self.warmup)
        return stop, state

    def with_knob(self, knob: float) -> Self:
        """Return the same rule at another threshold."""
        return replace(self, threshold=float(knob))

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then quantiles of the tokens' best scores, from high to low.

        Each value is a score that occurred, so ``>=`` moves at least one token.
        """
        if size < 2:
            raise InvalidArgumentError("size", size, "an integer >= 2")
        best = np.asarray(trace.scores, dtype=np.float32).max(axis=1)
        best = best[np.isfinite(best)]
        if best.size == 0:
            return (math.inf,)
        levels = np.linspace(1.0, 0.0, size - 1)
        values = np.unique(np.quantile(best, levels, method="higher"))[::-1]
        return (math.inf, *(float(value) for value in values))
