"""Which exits are worth asking at: the value of a check beside what it costs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace, UnsupportedError
from adaptive.policies._labels import stage_losses
from adaptive.policies._outcome import unit_means
from adaptive.policies._policy import Policy
from adaptive.policies._simulate import asked_at, exit_stages

#: How finely the knob is searched.
_GRID = 384


def choose_stages(
    policy: Policy,
    trace: Trace,
    *,
    risk: float,
    checks: ArrayLike,
    loss: str = "disagreement",
    reduction: Literal["mean", "any"] = "mean",
    margin: float = 0.25,
    seed: int = 0,
) -> Policy:
    """Leave out the exits at which asking costs more than it saves.

    A token costs the stages it passes and the checks on its way, in the mean::

        cost = mean over tokens of costs[stop] + sum of checks[asked exits up to stop]

    The knob is the cheapest within ``risk`` on the trace. At that knob, the value of asking at an
    exit is what the stages would cost more without it, and its price is what the checks would
    cost less. Of the exits not worth their price, the one without which a token costs least is
    left out, with the knob found anew; and again, until every exit is worth its price.

    Parameters
    ----------
    policy : Policy
        Its ``stages`` are where the search begins; its knob does not matter.
    trace : Trace
        Of the fit split, never of the test split, scored at all the policy's exits. Its ``costs``
        are those of the stages without checks.
    risk : float
        Largest mean loss of a unit on the trace, at least 0.
    checks : array_like, scalar or [n_exits]
        Cost of asking at each exit, in ``trace.cost_quantity``, at least 0.
    loss : str
        Name of a loss of the trace.
    reduction : {"mean", "any"}
        Whether a unit loses the mean of its tokens' losses, or 1 if any is positive.
    margin : float
        In [0, 1). An exit is left out only if it is not worth its price where all checks cost
        ``1 - margin`` times what was said, nor where they cost ``1 + margin`` times that: a
        measurement that is a little off should not change the schedule.
    seed : int
        Of the keyed noise, for rules that read it.

    Returns
    -------
    Policy
        The policy asked at the chosen exits, at least one, without certificate. Its predicted
        cost is never above that of the policy given.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind.
    UnsupportedError
        If the rule's rows decide together: a trace does not say what their batch costs.

    Notes
    -----
    The search is greedy and deterministic: the same trace, costs and checks give the same exits.
    Values are compared at one knob, so an exit does not go merely because the others would use
    its share of the risk a little better on these units: that gain was found not to last on other
    ones. The knob is found by bisection, which takes the risk to rise along the path. Scores are
    read off the trace as they are, so one that looks at the exit before (:class:`Saturation`,
    :class:`MovingMean`) has others once an exit is left out: the choice is then a guess. An exit
    without which the policy could not be made stays. No certificate depends on the choice, as
    long as the test split has no part in it.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive import Policy, Threshold, Trace
    >>> from adaptive.policies import ProbeScore, choose_stages
    >>> trace = Trace(
    ...     scores=[[0.1, 0.9], [0.2, 0.8], [0.3, 0.1], [0.1, 0.2]],
    ...     losses={"disagreement": np.array([[1, 0], [1, 0], [1, 1], [1, 1]])},
    ...     costs=[1.0, 2.0, 4.0],
    ...     cost_quantity="layers",
    ... )
    >>> policy = Policy(ProbeScore(), Threshold(), stages=(0, 1))
    >>> choose_stages(policy, trace, risk=0.0, checks=0.1).stages  # exit 0 never stops anything
    (1,)
    """
    if not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    if policy.scope == "batch":
        raise UnsupportedError(
            f"rows of {type(policy.rule).__name__} decide together, and a trace does not say what "
            "their batch costs: choose its `stages` by measured time"
        )
    if not isinstance(margin, Real) or not 0.0 <= margin < 1.0:
        raise InvalidArgumentError("margin", margin, "a number in [0, 1)")
    table = _Table.of(trace, risk=risk, checks=checks, loss=loss, reduction=reduction, seed=seed)
    while True:
        here = table.cheapest(policy)
        spent = table.cost(here)
        found = [
            (table.cost(table.cheapest(fewer)).at(1.0), fewer.stages, fewer)
            for fewer, same_knob in _one_less(policy, here)
            if table.cost(same_knob).at_most(spent, margin)
        ]
        cheaper = [one for one in found if one[0] <= spent.at(1.0)]
        if not cheaper:
            return replace(policy, certificate=None)
        policy = min(cheaper, key=lambda one: one[:2])[2]


def expected_cost(
    policy: Policy,
    trace: Trace,
    *,
    risk: float,
    checks: ArrayLike,
    loss: str = "disagreement",
    reduction: Literal["mean", "any"] = "mean",
    seed: int = 0,
) -> float:
    """Cost per token that :func:`choose_stages` predicts for a policy's exits, checks included.

    Parameters
    ----------
    policy, trace, risk, checks, loss, reduction, seed
        As for :func:`choose_stages`.

    Returns
    -------
    float
        In ``trace.cost_quantity``, at the cheapest knob within ``risk`` on the trace.
    """
    table = _Table.of(trace, risk=risk, checks=checks, loss=loss, reduction=reduction, seed=seed)
    return table.cost(table.cheapest(policy)).at(1.0)


@dataclass(frozen=True)
class _Cost:
    """Mean cost per token of the stages passed, and of the checks made."""

    stages: float
    checks: float

    def at(self, scale: float) -> float:
        """Cost where checks cost ``scale`` times what was said."""
        return self.stages + scale * self.checks

    def at_most(self, other: _Cost, margin: float) -> bool:
        """Whether it is not above another, the checks of both being off by up to the margin."""
        return all(self.at(1.0 + off) <= other.at(1.0 + off) for off in (-margin, margin))


@dataclass(frozen=True)
class _Table:
    """A trace, the losses of its stages, and what asking costs."""

    trace: Trace
    losses: NDArray[np.float64]
    checks: NDArray[np.float64]
    risk: float
    any_token: bool
    seed: int

    @classmethod
    def of(
        cls, trace: Trace, *, risk: float, checks: ArrayLike, loss: str, reduction: str, seed: int
    ) -> _Table:
        """Check the arguments of the public functions."""
        if not isinstance(trace, Trace):
            raise InvalidTypeError("trace", trace, "a Trace")
        if not isinstance(risk, Real) or not 0.0 <= risk < math.inf:
            raise InvalidArgumentError("risk", risk, "a finite number >= 0")
        if reduction not in ("mean", "any"):
            raise InvalidArgumentError("reduction", reduction, "'mean' or 'any'")
        given = np.asarray(checks, dtype=np.float64)
        if given.shape not in ((), (trace.n_exits,)):
            expected = f"a number, or one per exit ({trace.n_exits})"
            raise InvalidArgumentError("checks", f"shape {given.shape}", expected)
        if not (np.isfinite(given) & (given >= 0.0)).all():
            raise InvalidArgumentError("checks", checks, "finite numbers >= 0")
        each = np.broadcast_to(given, (trace.n_exits,))
        losses = stage_losses(trace, loss)
        return cls(trace, losses, each, float(risk), reduction == "any", seed)

    def cheapest(self, policy: Policy) -> Policy:
        """Member of the policy's family at the cheapest knob whose mean loss is within the risk."""
        knobs = policy.rule.knobs(asked_at(self.trace, policy.stages), size=_GRID)
        # the first never stops early, and so is within any risk
        count = bisect.bisect_right(
            knobs, self.risk, lo=1, key=lambda knob: self._loss(policy.member(knob))
        )
        return policy.member(knobs[count - 1])

    def cost(self, member: Policy) -> _Cost:
        """Mean cost per token of a member."""
        stops = self._stops(member)
        asked = np.isin(np.arange(self.trace.n_exits), member.stages)
        paid = np.cumsum(np.where(asked, self.checks, 0.0))
        last = np.minimum(stops, self.trace.n_exits - 1)
        return _Cost(float(self.trace.costs[stops].mean()), float(paid[last].mean()))

    def _stops(self, member: Policy) -> NDArray[np.int64]:
        return exit_stages(member.rule, self.trace, stages=member.stages, seed=self.seed)

    def _loss(self, member: Policy) -> float:
        lost = self.losses[np.arange(self.trace.n_tokens), self._stops(member)]
        if self.any_token:
            return float((unit_means((lost > 0).astype(np.float64), self.trace) > 0).mean())
        return float(unit_means(lost, self.trace).mean())


def _one_less(policy: Policy, member: Policy) -> Iterator[tuple[Policy, Policy]]:
    """Yield a policy and its member without each of the exits, as far as they can be made."""
    for exit in policy.stages:
        stages = tuple(other for other in policy.stages if other != exit)
        try:
            fewer = replace(policy, stages=stages, certificate=None)
            yield fewer, replace(member, stages=stages)
        except InvalidArgumentError:
            continue
