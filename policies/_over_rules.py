"""Rules that ask other rules: what they share."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.calibration import Trace
from adaptive.policies._base import AbstractRule, Features, Scope, State, named, part


class AbstractOverRules(AbstractRule):
    """A rule that asks other rules and combines what they say; the first carries the knob.

    All of them are asked every time, also where the word of one does not count, so that each
    keeps its memory.

    ``together`` says that rows of a batch decide together whatever the rules' own scope. ``armed``
    is on the device in the state: a combination that is not armed never stops early.
    """

    together: ClassVar[bool] = False
    armed: bool = True

    @property
    @abc.abstractmethod
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rules."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any of the rules reads."""
        return frozenset().union(*(rule.needs for rule in self.asked))

    @property
    def nested(self) -> bool:  # type: ignore[override]
        """As the first rule: the others do not move."""
        return self.asked[0].nested

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """Batch if rows decide together here or in any of the rules."""
        shared = self.together or any(rule.scope == "batch" for rule in self.asked)
        return "batch" if shared else "row"

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """States of the rules, by their place."""
        state = {"armed": torch.tensor(self.armed, device=device)}
        for place, rule in enumerate(self.asked):
            state |= named(rule.init(batch_size, device=device), str(place))
        return state

    def ask(self, features: Features, score: Tensor, state: State) -> tuple[list[Tensor], State]:
        """Ask every rule; what each says, bool [batch], and the new state."""
        stops = []
        for place, rule in enumerate(self.asked):
            stop, own = rule.decide(features, score, part(state, str(place)))
            stops.append(stop)
            state = state | named(own, str(place))
        return stops, state

    def advance(self, state: State) -> State:
        """Advance every rule."""
        for place, rule in enumerate(self.asked):
            state = state | named(rule.advance(part(state, str(place))), str(place))
        return state

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Path of the first rule."""
        return self.asked[0].knobs(trace, size=size)
