"""Units on their way through a monitor: what begins, and what is seen of it at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive._monitor_rules import checked_loss
from adaptive._monitor_state import Plan, Rules
from adaptive.calibration import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import check_count, check_number
from adaptive.policies import Policy


@dataclass(frozen=True)
class Outcome:
    """What is seen of one unit.

    Parameters
    ----------
    loss : float, optional
        Observed loss, in fallback that of the early answers; ``None`` where it is not known, or
        not yet (:meth:`Monitor.label`; not with `ScoreAudits`).
    score : float, optional
        Mean exit score; ``None`` where no exit was asked.
    depth : float
        Mean layers (or any cost) per token.
    tokens : int
    """

    loss: float | None
    score: float | None
    depth: float
    tokens: int


@dataclass
class Ticket:
    """Units that have begun together.

    Parameters
    ----------
    numbers : range
        Their numbers.
    plan : Plan
        What they run under.
    policy : Policy, optional
        The member that runs; ``None`` for full computation.
    withdrawn : bool
        Set by :meth:`Monitor.withdrawn` when the policy was withdrawn while they ran.
    coins : list of (float, bool), optional
        Chances and outcomes of their audits, where these do not depend on scores.
    finished : bool
        Set by :meth:`Monitor.finish`: units are counted once.
    """

    numbers: range
    plan: Plan
    policy: Policy | None
    withdrawn: bool = False
    coins: list[tuple[float, bool]] | None = None
    finished: bool = False


def checked(ticket: Ticket, outcomes: Sequence[Outcome], rules: Rules) -> list[Outcome]:
    """Return the outcomes of a ticket's units as plain numbers in their ranges."""
    if len(outcomes) != len(ticket.numbers):
        allowed = f"one Outcome for each of the {len(ticket.numbers)} units"
        raise InvalidArgumentError("outcomes", f"{len(outcomes)} of them", allowed)
    return [_checked(outcome, rules) for outcome in outcomes]


def _checked(outcome: Outcome, rules: Rules) -> Outcome:
    if not isinstance(outcome, Outcome):
        raise InvalidTypeError("outcomes", outcome, "an Outcome for every unit")
    return Outcome(
        loss=None if outcome.loss is None else checked_loss(rules, outcome.loss),
        score=None if outcome.score is None else check_number("score", outcome.score),
        depth=check_number("depth", outcome.depth),
        tokens=check_count("tokens", outcome.tokens, least=0),
    )
