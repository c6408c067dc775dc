"""Rules made of rules: all of, any of, veto, two-sided, bounds on the stage, protected regions.

The knob of a combination moves its first rule; the others keep their setting. At ``inf`` the
whole combination never stops early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._over_rules import AbstractOverRules
from adaptive.policies._statistic import AbstractStatisticRule, check_knob


@dataclass(frozen=True)
class AllOf(AbstractOverRules):
    """Stop where every rule says so.

    SpecExit (three signals at once) and LGViT's "patient and confident" are of this kind.

    Parameters
    ----------
    rules : tuple of AbstractRule
        At least two; the knob moves the first.
    armed : bool
        False never stops early.
    """

    rules: tuple[AbstractRule, ...]
    armed: bool = True

    def __post_init__(self) -> None:
        _check_rules(self.rules)

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rules."""
        return self.rules

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask every rule, so that each keeps its memory."""
        stops, state = self.ask(features, score, state)
        return torch.stack(stops).all(dim=0) & state["armed"], state

    def with_knob(self, knob: float) -> Self:
        """Move the first rule; ``inf`` disarms the combination."""
        return _moved(self, self.rules, knob)


@dataclass(frozen=True)
class AnyOf(AbstractOverRules):
    """Stop where at least one rule says so.

    Parameters
    ----------
    rules : tuple of AbstractRule
        At least two; the knob moves the first. The others stop at every finite knob.
    armed : bool
        False never stops early.
    """

    rules: tuple[AbstractRule, ...]
    armed: bool = True

    def __post_init__(self) -> None:
        _check_rules(self.rules)

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rules."""
        return self.rules

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask every rule, so that each keeps its memory."""
        stops, state = self.ask(features, score, state)
        return torch.stack(stops).any(dim=0) & state["armed"], state

    def with_knob(self, knob: float) -> Self:
        """Move the first rule; ``inf`` disarms the combination."""
        return _moved(self, self.rules, knob)


@dataclass(frozen=True)
class Veto(AbstractOverRules):
    """Stop where the first rule says so and the second does not object.

    Parameters
    ----------
    rules : tuple of two AbstractRule
        The rule, then the objection: where it says stop, nothing stops.
    """

    rules: tuple[AbstractRule, AbstractRule]

    def __post_init__(self) -> None:
        if len(self.rules) != 2:
            raise InvalidArgumentError("rules", self.rules, "a rule and an objection")

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rules."""
        return self.rules

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask both rules, so that each keeps its memory."""
        (stop, objection), state = self.ask(features, score, state)
        return stop & ~objection, state

    def with_knob(self, knob: float) -> Self:
        """Move the first rule."""
        changes: dict[str, Any] = {"rules": (self.rules[0].with_knob(knob), self.rules[1])}
        return replace(self, **changes)


@dataclass(frozen=True)
class Within(AbstractOverRules):
    """Bounds on the stage: never before ``first``, always at ``last`` (a hard compute cap).

    Parameters
    ----------
    rule : AbstractRule
        Carries the knob; at ``inf`` the cap does not hold either.
    first : int
        No stop at exits below this index.
    last : float
        A stop at the first asked exit with at least this index; ``inf`` for no cap.
    armed : bool
        False never stops early.
    """

    rule: AbstractRule
    first: int = 0
    last: float = math.inf
    armed: bool = True

    def __post_init__(self) -> None:
        if self.first < 0:
            raise InvalidArgumentError("first", self.first, "an integer >= 0")
        if not self.last >= self.first:
            raise InvalidArgumentError("last", self.last, f"at least `first` = {self.first}")

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rule."""
        return (self.rule,)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule even where its word does not count, so that it keeps its memory."""
        (stop,), state = self.ask(features, score, state)
        if features.stage < self.first:
            return torch.zeros_like(stop), state
        if features.stage >= self.last:
            return torch.ones_like(stop) & state["armed"], state
        return stop & state["armed"], state

    def with_knob(self, knob: float) -> Self:
        """Move the rule; ``inf`` disarms the cap."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob), "armed": knob < math.inf}
        return replace(self, **changes)


@dataclass(frozen=True)
class Protected(AbstractOverRules):
    """No stop in protected stages or during the first tokens, whatever the rule says.

    Parameters
    ----------
    rule : AbstractRule
        Carries the knob. It is asked everywhere, so that it keeps its memory.
    stages : tuple of int
        Exits at which nothing stops.
    tokens : int
        Tokens at positions below this go to full depth.
    """

    rule: AbstractRule
    stages: tuple[int, ...] = ()
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InvalidArgumentError("tokens", self.tokens, "an integer >= 0")

    @property
    def asked(self) -> tuple[AbstractRule, ...]:
        """The rule."""
        return (self.rule,)

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Ask the rule, then leave out what is protected."""
        (stop,), state = self.ask(features, score, state)
        if features.stage in self.stages:
            return torch.zeros_like(stop), state
        return stop & (features.position >= self.tokens), state

    def with_knob(self, knob: float) -> Self:
        """Move the rule."""
        changes: dict[str, Any] = {"rule": self.rule.with_knob(knob)}
        return replace(self, **changes)


@dataclass(frozen=True)
class TwoSided(AbstractStatisticRule):
    """Accept where the score is at least a threshold, give up where it is hopeless.

    Both end the computation. Which of the two it was stays in the state as ``verdict`` (1
    accepted, -1 given up, 0 neither) until the token is finished: an abstaining caller reads it
    there. The knob moves acceptance; the two ends carry different risks, to be certified apart.

    Parameters
    ----------
    hopeless : float
        Give up at or below this score; ``-inf`` for never.
    threshold : float
        Accept at or above this score; ``inf`` never stops early, on either side.

    References
    ----------
    .. [1] "Conformal thinking: risk control for reasoning on a compute budget", ICML 2026.
    """

    knob_name: ClassVar[str] = "threshold"

    hopeless: float
    threshold: float = math.inf

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)
        if not self.hopeless < self.threshold:
            raise InvalidArgumentError("hopeless", self.hopeless, f"below {self.threshold:g}")

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Verdict on each row, int64."""
        return {"verdict": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the score, replaced by the largest finite number where it is hopeless."""
        hopeless = (score <= self.hopeless) & (score > -math.inf)
        accepted = score >= state["knob"]
        verdict = accepted.to(torch.int64) - (hopeless & ~accepted).to(torch.int64)
        value = torch.where(hopeless, torch.finfo(score.dtype).max, score)
        return value, state | {"verdict": verdict}


def _check_rules(rules: tuple[AbstractRule, ...]) -> None:
    if len(rules) < 2:
        raise InvalidArgumentError("rules", rules, "at least two rules")


_Combination = TypeVar("_Combination", bound=AllOf | AnyOf)


def _moved(combination: _Combination, rules: tuple[AbstractRule, ...], knob: float) -> _Combination:
    changes: dict[str, Any] = {"rules": (rules[0].with_knob(knob), *rules[1:])}
    return replace(combination, armed=knob < math.inf, **changes)
