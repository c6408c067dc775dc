"""Decisions that a batch takes together: who else is in the batch is then part of the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._over_rules import AbstractOverRules


@dataclass(frozen=True)
class AllRows(AbstractOverRules):
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

    together: ClassVar[bool] = True

    rule: AbstractRule

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rule."""
        return (self.rule,)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule, then let the running rows agree."""
        (stop,), state = self.ask(features, score, state)
        ready = stop if features.running is None else stop | ~features.running
        return ready.all().expand_as(stop), state

    def with_knob(self, knob: float) -> Self:
        """Move the rule."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob)}
        return replace(self, **changes)


@dataclass(frozen=True)
class LeastScore(AbstractOverRules):
    """Give the rule the smallest score of the running rows: CALM's released loop.

    Parameters
    ----------
    rule : AbstractRule
        Carries the knob.
    """

    together: ClassVar[bool] = True

    rule: AbstractRule

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rule."""
        return (self.rule,)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule about the least score; a NaN among the running rows stops nobody."""
        if features.running is not None:
            score = torch.where(features.running, score, math.inf)
        least = score.amin().expand_as(score)
        (stop,), state = self.ask(features, least, state)
        return stop, state

    def with_knob(self, knob: float) -> Self:
        """Move the rule."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob)}
        return replace(self, **changes)
