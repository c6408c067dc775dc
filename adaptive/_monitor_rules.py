"""The rules of a monitor: its state machine as pure functions of state and unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptive._monitor_records import Event, EventKind, Status, Unit, Watched
from adaptive._monitor_state import MonitorState, Plan, Rules
from adaptive.calibration import (
    InvalidArgumentError,
    ScoreAudits,
    audit_coins,
    combine_evidence,
    corrected_losses,
)
from adaptive.calibration._validation import check_number

#: What a sign without labels says, in words.
_MOVED = {
    "score": "exit scores are not like the calibration's",
    "depth": "exit depths are not like the calibration's",
    "slowing": "exit scores return to their mean more slowly, or their mean or spread has moved",
}


def plan(rules: Rules, state: MonitorState) -> Plan:
    """Say what the next units run under."""
    member, warned = rules.member, state.status in ("warn", "probation")
    if state.status == "fallback":
        member = 0
    elif state.status == "warn":
        member = max(min(1, member), member - rules.tighten)
    return Plan(state.status, state.epoch, member, warned)


def audit(rules: Rules, planned: Plan, *, number: int, score: float | None) -> tuple[float, bool]:
    """Chance of an audit of a unit, and whether its coin says so; its loss is not looked at.

    In fallback comparing costs nothing, so every unit is.
    """
    if planned.status == "fallback":
        return 1.0, True
    expected = None if rules.curve is None else rules.curve([_number(score)])
    chance = rules.audits.probabilities(1, expected=expected, warned=[planned.warned])
    return float(chance[0]), bool(audit_coins(chance, seed=rules.seed, unit=number)[0])


def evidence(rules: Rules, state: MonitorState) -> float:
    """Evidence of the test in force: against the promise, or in fallback for the recovery."""
    if state.status == "fallback":
        return float(rules.recovery.evidence(state.recovery)[0])
    pair = [
        float(rules.detector.evidence(state.promise)[0]),
        float(rules.detector.evidence(state.curve)[0]),
    ]
    return float(combine_evidence(pair, weights=[1.0 - rules.curve_weight, rules.curve_weight]))


def observe(
    rules: Rules, state: MonitorState, unit: Unit, *, time: float
) -> tuple[MonitorState, Watched]:
    """State after a finished unit, and what became of the unit.

    The same state and unit always give the same result: this is what makes a journal replay. A unit
    that is to be labelled but has no loss yet is no evidence until :func:`label`.

    Raises
    ------
    InvalidArgumentError
        For an audited unit without a loss under audits by score: there a unit that was not audited
        counts with the loss its score lets expect, and that is fair only if the audited ones, whose
        scores differ, count at the same time.
    """
    missing = unit.audited and unit.loss is None
    if missing and isinstance(rules.audits, ScoreAudits) and unit.epoch == state.epoch:
        raise InvalidArgumentError(
            "loss",
            None,
            "known when an audited unit finishes, where audits go by score (`ScoreAudits`): use "
            "`UniformAudits` or `EvidenceAudits` for labels that come late or never",
        )
    state = replace(
        state, next_unit=max(state.next_unit, unit.number + 1), finished=state.finished + 1
    )
    state, events = _put(rules, _seen(rules, state, unit), unit, time)
    # an alarm that the unit itself caused has changed the epoch too
    inside = _inside(unit) and unit.epoch == state.epoch
    state = replace(state, outside=state.outside + (not inside))
    return state, Watched(unit, inside, state.status, evidence(rules, state), events)


def label(
    rules: Rules, state: MonitorState, *, number: int, loss: float, time: float
) -> tuple[MonitorState, Watched]:
    """State after the label of a unit that had finished before, and what the label caused.

    The unit counts as evidence when its label arrives. That is valid as long as when it arrives,
    and whether, does not depend on the loss. A label from before the last withdrawal or resumption
    is accepted and is no evidence.
    """
    waiting = {unit.number: unit for unit in state.awaiting}
    if number not in waiting:
        raise InvalidArgumentError(
            "number",
            number,
            f"that of an audited unit without a label, among the newest {rules.awaited} of them",
        )
    unit = replace(waiting.pop(number), loss=checked_loss(rules, loss))
    state = replace(state, awaiting=tuple(waiting.values()))
    state, events = _put(rules, state, unit, time)
    value = evidence(rules, state)
    return state, Watched(unit, _inside(unit), state.status, value, events, late=True)


def checked_loss(rules: Rules, loss: float) -> float:
    """Return a loss as a plain number in the range of the promise, whatever state it comes in."""
    value = float(loss) if isinstance(loss, bool | np.bool_) else check_number("loss", loss)
    low, high = rules.recovery.lower, rules.recovery.upper
    if not low <= value <= high:
        raise InvalidArgumentError("loss", loss, f"in [{low:g}, {high:g}]")
    return value


def trip(
    rules: Rules, state: MonitorState, *, reason: str, time: float
) -> tuple[MonitorState, tuple[Event, ...]]:
    """State after the policy was withdrawn by hand."""
    if state.status == "fallback":
        return state, ()
    event = _event(rules, state, "trip", "fallback", None, reason, time)
    return _withdrawn(rules, state), (event,)


def _inside(unit: Unit) -> bool:
    return unit.covered and unit.status != "fallback" and not unit.withdrawn


def _seen(rules: Rules, state: MonitorState, unit: Unit) -> MonitorState:
    """Put what needs no label to the signs, and wait for the label if there is to be one."""
    if unit.audited and unit.loss is None:
        waiting = (*state.awaiting, unit)
        state = replace(state, awaiting=waiting[max(0, len(waiting) - rules.awaited) :])
    # another member's scores and depths follow another law
    in_force = state.status != "fallback" and unit.epoch == state.epoch
    if in_force and unit.member == rules.member:
        signs = rules.signs.update(state.signs, score=unit.score, depth=unit.depth)
        state = replace(state, signs=signs)
    return state


def _put(
    rules: Rules, state: MonitorState, unit: Unit, time: float
) -> tuple[MonitorState, tuple[Event, ...]]:
    """Put a unit to the tests in force."""
    if unit.epoch != state.epoch:  # begun before the last withdrawal or resumption: no evidence
        return state, ()
    if state.status == "fallback":
        return _fallen(rules, state, unit, time)
    return _guarded(rules, state, unit, time)


def _guarded(
    rules: Rules, state: MonitorState, unit: Unit, time: float
) -> tuple[MonitorState, tuple[Event, ...]]:
    """While the policy is in force."""
    if not (unit.audited and unit.loss is None):
        state = _bet(rules, state, unit)
    value = evidence(rules, state)
    if value >= rules.detector.threshold:
        event = _event(rules, state, "alarm", "fallback", unit, _cause(rules, state), time)
        return _withdrawn(rules, state), (event,)
    if state.status == "probation":
        state = replace(state, remaining=state.remaining - (unit.loss is not None))
        if state.remaining > 0:
            return state, ()
        event = _event(rules, state, "clear", "ok", unit, "probation ended without an alarm", time)
        return replace(state, status="ok"), (event,)
    level = rules.detector.warn * rules.detector.threshold
    signs = rules.signs.warnings(state.signs)
    if state.status == "ok" and (value >= level or signs):
        reason = _cause(rules, state) if value >= level else _moved(signs)
        event = _event(rules, state, "warn", "warn", unit, reason, time)
        return replace(state, status="warn"), (event,)
    fading = rules.signs.warnings(state.signs, share=0.5)
    if state.status == "warn" and value < level / 2 and not fading:
        reason = "all evidence is below half of its warning's level"
        event = _event(rules, state, "calm", "ok", unit, reason, time)
        return replace(state, status="ok"), (event,)
    return state, ()


def _bet(rules: Rules, state: MonitorState, unit: Unit) -> MonitorState:
    """Put a unit to both bets; without a label it is a factor of 1."""
    seen = unit.loss is not None
    value = np.array([_number(unit.loss)])
    expected = None if rules.curve is None else rules.curve([_number(unit.score)])
    curve = state.curve
    if expected is not None:
        curve = rules.detector.update(curve, value, expected=expected, audited=[seen])
    if isinstance(rules.audits, ScoreAudits):
        assert expected is not None
        value = corrected_losses(
            value, expected=expected, audited=[seen], probabilities=[unit.probability]
        )
    labelled = [seen or isinstance(rules.audits, ScoreAudits)]
    promise = rules.detector.update(state.promise, value, audited=labelled)
    return replace(
        state,
        promise=promise,
        curve=curve,
        labelled=state.labelled + seen,
        loss_sum=state.loss_sum + (unit.loss or 0.0) / unit.probability,
        weight_sum=state.weight_sum + seen / unit.probability,
    )


def _fallen(
    rules: Rules, state: MonitorState, unit: Unit, time: float
) -> tuple[MonitorState, tuple[Event, ...]]:
    """While full computation is in force and early answers are compared."""
    if unit.loss is None:
        return state, ()
    state = replace(state, recovery=rules.recovery.update(state.recovery, [unit.loss]))
    if not bool(rules.recovery.resume(state.recovery)[0]):
        return state, ()
    reason = f"evidence that early answers along full depth's text are within {_bound(rules)} again"
    event = _event(rules, state, "resume", "probation", unit, reason, time)
    return (
        replace(
            state,
            status="probation",
            epoch=state.epoch + 1,
            remaining=rules.probation,
            promise=rules.detector.init(),
            curve=rules.detector.init(),
            signs=rules.signs.init(),
        ),
        (event,),
    )


def _withdrawn(rules: Rules, state: MonitorState) -> MonitorState:
    return replace(state, status="fallback", epoch=state.epoch + 1, recovery=rules.recovery.init())


def _cause(rules: Rules, state: MonitorState) -> str:
    """Say what the two bets show, and no more.

    Which of them has reached a warning's level is known; why, is not. A curve is an upper limit:
    that losses are not shown to exceed it does not show that scores explain them.
    """
    level = rules.detector.warn * rules.detector.threshold
    broken, unexplained = (
        float(rules.detector.evidence(bet)[0]) >= level for bet in (state.promise, state.curve)
    )
    promised = f"evidence that losses exceed the {_bound(rules)} promised"
    if rules.curve is None:
        return promised
    if not unexplained:
        return f"{promised}; none that they exceed what units with such scores may lose"
    if not broken:
        return "evidence that losses exceed what units with such scores may lose"
    return f"{promised}, and what units with such scores may lose: scores do not explain it"


def _moved(signs: Sequence[str]) -> str:
    return " and ".join(_MOVED[sign] for sign in signs) + "; no evidence from labels yet"


def _bound(rules: Rules) -> str:
    return f"{rules.detector.bound:g}"


def _event(
    rules: Rules,
    state: MonitorState,
    kind: EventKind,
    after: Status,
    unit: Unit | None,
    reason: str,
    time: float,
) -> Event:
    threshold = rules.detector.threshold
    if kind == "resume":
        threshold = rules.recovery.threshold
    elif kind in ("warn", "calm"):
        threshold *= rules.detector.warn
    return Event(
        kind=kind,
        before=state.status,
        after=after,
        finished=state.finished,
        unit=None if unit is None else unit.number,
        evidence=evidence(rules, state),
        threshold=threshold,
        reason=reason,
        time=time,
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
