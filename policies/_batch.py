"""Decisions that a batch takes together: who else is in the batch is then part of the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptive.calibration import Trace
from adaptive.policies._base import AbstractRule, Features, Scope, State, named, part


@dataclass(frozen=True)
class AllRows(AbstractRule):
    """Stop the whole batch once the rule says stop for every running row: Miao et al.

    Parameters
    ----------
    rule : AbstractRule
        Carries the knob.

    References
    ----------
    .. [1] Miao et al., "An efficient inference framework for early-exit large language models",
       arXiv 2407.20272.
    """

    scope: ClassVar[Scope] = "batch"

    rule: AbstractRule

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """As the rule."""
        return self.rule.needs

    @property
    def nested(self) -> bool:  # type: ignore[override]
        """As the rule."""
        return self.rule.nested

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """State of the rule."""
        return named(self.rule.init(batch_size, device=device), "rule")

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule, then let the running rows agree."""
        stop, own = self.rule.decide(features, score, part(state, "rule"))
        ready = stop if features.running is None else stop | ~features.running
        return ready.all().expand_as(stop), named(own, "rule")

    def advance(self, state: State) -> State:
        """Advance the rule."""
        return named(self.rule.advance(part(state, "rule")), "rule")

    def with_knob(self, knob: float) -> Self:
        """Move the rule."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Path of the rule."""
        return self.rule.knobs(trace, size=size)


@dataclass(frozen=True)
class LeastScore(AbstractRule):
    """Give the rule the smallest score of the running rows: CALM's released loop.

    Parameters
    ----------
    rule : AbstractRule
        Carries the knob.
    """

    scope: ClassVar[Scope] = "batch"

    rule: AbstractRule

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """As the rule."""
        return self.rule.needs

    @property
    def nested(self) -> bool:  # type: ignore[override]
        """As the rule."""
        return self.rule.nested

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """State of the rule."""
        return named(self.rule.init(batch_size, device=device), "rule")

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule about the least score; a NaN among the running rows stops nobody."""
        if features.running is not None:
            score = torch.where(features.running, score, math.inf)
        least = score.amin().expand_as(score)
        stop, own = self.rule.decide(features, least, part(state, "rule"))
        return stop, named(own, "rule")

    def advance(self, state: State) -> State:
        """Advance the rule."""
        return named(self.rule.advance(part(state, "rule")), "rule")

    def with_knob(self, knob: float) -> Self:
        """Move the rule."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Path of the rule."""
        return self.rule.knobs(trace, size=size)
