"""The monitor of a certified policy in use: what runs next, what became of it, what to tell."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from adaptive._monitor_journal import Journal, Snapshot
from adaptive._monitor_outcome import Outcome, Ticket, checked
from adaptive._monitor_records import Event, JournalError, Status, Unit, Watched
from adaptive._monitor_replay import label_record, replayed, unit_record
from adaptive._monitor_rules import audit, evidence, label, observe, plan, trip
from adaptive._monitor_setup import rules_for
from adaptive._monitor_state import MonitorState, Rules, first_state
from adaptive.calibration import (
    AbstractAudits,
    AbstractRiskMonitor,
    InvalidArgumentError,
    ScoreAudits,
)
from adaptive.calibration._validation import check_count
from adaptive.policies import Policy

_log = logging.getLogger(__name__)
_LOUD = frozenset({"warn", "alarm", "trip"})


class Monitor:
    """Watches a certified policy in use; falls back to full depth and comes back on evidence.

    Make one with :meth:`for_policy` and pass it to :func:`~adaptive.generate` with every call, or
    put the units of a loop of your own to it: :meth:`begin`, :meth:`audits`, :meth:`finish`. It may
    be shared by threads.

    Parameters
    ----------
    policy : Policy
        With its certificate.
    rules : Rules
        Everything that is fixed beforehand.
    journal : str or Path, optional
        File with one line per unit. An existing one is gone on with: its units are put to the
        rules again, and must give what they gave. Without one nothing outlives the process.
    snapshot_every : int
        Units after which the state is written beside the journal, so that a start need not read
        all of it.
    on_event, on_unit : callable, optional
        Receive every :class:`Event` and every :class:`Watched` after it is on disk. What they
        raise is logged.
    clock : callable
        Seconds since 1970.

    Raises
    ------
    JournalError
        If the journal is damaged, in use, or belongs to another policy or other settings.
    """

    def __init__(
        self,
        policy: Policy,
        rules: Rules,
        *,
        journal: str | Path | None = None,
        snapshot_every: int = 1000,
        on_event: Callable[[Event], None] | None = None,
        on_unit: Callable[[Watched], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        snapshot_every = check_count("snapshot_every", snapshot_every)
        self.policy, self.rules = policy, rules
        self.events: deque[Event] = deque(maxlen=100)
        self._on_event, self._on_unit, self._clock = on_event, on_unit, clock
        self._every = snapshot_every
        self._lock = threading.RLock()
        self._state = first_state(rules)
        self._header = {"policy": policy_fingerprint(policy), "rules": rules.to_dict()} | {
            "promise": rules.detector.bound,
            "warn": rules.detector.warn * rules.detector.threshold,
            "alarm": rules.detector.threshold,
            "resume": rules.recovery.threshold,
        }
        self._journal: Journal | None = None
        if journal is not None:
            self._journal = Journal(Path(journal), self._header)
            try:
                self._resume(self._journal)
            except BaseException:
                self._journal.close()
                raise
        self._next = self._state.next_unit
        self._saved = self._state.finished

    @classmethod
    def for_policy(
        cls,
        policy: Policy,
        *,
        journal: str | Path | None = None,
        alpha: float = 0.05,
        beta: float = 0.05,
        detector: AbstractRiskMonitor | None = None,
        audits: AbstractAudits | None = None,
        curve_weight: float = 0.0,
        tighten: int = 0,
        probation: int = 50,
        seed: int = 0,
        snapshot_every: int = 1000,
        on_event: Callable[[Event], None] | None = None,
        on_unit: Callable[[Watched], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Build a monitor from a policy's certificate alone.

        Parameters
        ----------
        policy : Policy
            From :func:`~adaptive.calibrate`.
        journal, snapshot_every, on_event, on_unit, clock
            As in the class.
        alpha : float
            P(a false alarm, ever, until the first withdrawal) <= alpha, if the risk is what the
            certificate promises; that it is not has probability delta, which comes on top. After a
            resumption the count begins anew.
        beta : float
            P(resume, ever) <= beta in a fallback during which the early answers, compared along
            the full model's own text, miss it in the mean at least as often as promised. See
            *Wrong resumes* in the documentation for what that says of delivered texts.
        detector : AbstractRiskMonitor, optional
            Another promise about false alarms, say ``RiskMonitor(0.1, average_run_length=1e5)``;
            ``alpha`` is then not read.
        audits : AbstractAudits, optional
            Chance that a unit is labelled. By default 1 in ``exact`` mode, where settling gives
            labels; in ``propagate`` mode a tenth, and half of the units while a warning is on.
        curve_weight : float
            Share of the alarm's evidence taken from bets on the excess over the certificate's
            curve of expected loss given the score, in [0, 1]. At 1 bursts of difficult units that
            their scores show never alarm, and the promise is that the curve holds.
        tighten : int
            Steps back towards safer certified members while a warning is on.
        probation : int
            Labelled units after a resumption that are audited as often as under a warning.
        seed : int
            Of the audit coins.

        Raises
        ------
        InvalidArgumentError
            If the policy has no certificate, its certificate lacks what a setting needs, or a
            setting is out of range.
        UnsupportedError
            If the certificate promises several risks, or the mode is ``verify``.
        """
        rules = rules_for(
            policy,
            alpha=alpha,
            beta=beta,
            detector=detector,
            audits=audits,
            curve_weight=curve_weight,
            tighten=tighten,
            probation=probation,
            seed=seed,
        )
        return cls(
            policy,
            rules,
            journal=journal,
            snapshot_every=snapshot_every,
            on_event=on_event,
            on_unit=on_unit,
            clock=clock,
        )

    @property
    def state(self) -> MonitorState:
        """Where the monitor stands."""
        return self._state

    @property
    def status(self) -> Status:
        """One of ``"ok"``, ``"warn"``, ``"fallback"``, ``"probation"``."""
        return self._state.status

    @property
    def evidence(self) -> float:
        """Evidence against the promise, in fallback for the recovery."""
        return evidence(self.rules, self._state)

    @property
    def threshold(self) -> float:
        """Level at which the evidence acts."""
        fallen = self._state.status == "fallback"
        return self.rules.recovery.threshold if fallen else self.rules.detector.threshold

    @property
    def risk_so_far(self) -> float:
        """Mean loss of the policy's units, estimated from those with a label; NaN before the first.

        A label counts by the units it stands for, one over its chance of an audit: labels are more
        frequent while a warning is on.
        """
        state = self._state
        return state.loss_sum / state.weight_sum if state.weight_sum else math.nan

    def __repr__(self) -> str:
        state = self._state
        return (
            f"Monitor({state.status}, {state.finished} units, {state.labelled} labelled, risk so "
            f"far {self.risk_so_far:.3g} of {self.rules.detector.bound:g} promised, evidence "
            f"{self.evidence:.3g} of {self.threshold:g})"
        )

    def begin(self, units: int, *, policy: Policy | None = None) -> Ticket:
        """Give numbers to units that begin now, and say what they run under.

        Parameters
        ----------
        units : int
            At least 1.
        policy : Policy, optional
            Checked to be the monitored one.
        """
        units = check_count("units", units)
        if policy is not None and policy is not self.policy:
            found = policy_fingerprint(policy)
            if found != self._header["policy"]:
                raise InvalidArgumentError(
                    "monitor",
                    f"one for the policy {self._header['policy']}",
                    f"made for the policy that runs, {found}",
                )
        with self._lock:
            planned = plan(self.rules, self._state)
            numbers = range(self._next, self._next + units)
            self._next += units
        return Ticket(numbers, planned, self._member(planned.member))

    def audits(
        self, ticket: Ticket, scores: Sequence[float | None] | None = None
    ) -> list[tuple[float, bool]]:
        """Chance of an audit and outcome of its coin for each unit, before any loss is known.

        Parameters
        ----------
        ticket : Ticket
        scores : sequence of float or None, optional
            Mean exit score of each unit; read by `ScoreAudits` only.
        """
        if ticket.coins is not None:
            return ticket.coins
        known = [None] * len(ticket.numbers) if scores is None else scores
        coins = [
            audit(self.rules, ticket.plan, number=number, score=score)
            for number, score in zip(ticket.numbers, known, strict=True)
        ]
        if not isinstance(self.rules.audits, ScoreAudits):
            ticket.coins = coins
        return coins

    def may_audit(self, ticket: Ticket) -> bool:
        """Whether some unit may need a label, as far as that can be said before it has run."""
        return isinstance(self.rules.audits, ScoreAudits) or any(
            audited for _, audited in self.audits(ticket)
        )

    def withdrawn(self, ticket: Ticket) -> bool:
        """Whether the policy has been withdrawn since these units began. Costs nothing to ask."""
        if self._state.epoch == ticket.plan.epoch or self._state.status != "fallback":
            return False
        ticket.withdrawn = ticket.plan.status != "fallback"
        return ticket.withdrawn

    def finish(
        self, ticket: Ticket, outcomes: Sequence[Outcome], *, covered: bool = True
    ) -> tuple[Watched, ...]:
        """Put finished units to the rules and to the journal; return when they are on disk.

        A loss that is given although the coin said no is left out.

        Parameters
        ----------
        ticket : Ticket
        outcomes : sequence of Outcome
            One per unit, in their order.
        covered : bool
            Whether the run met the conditions of the certificate.

        Raises
        ------
        InvalidArgumentError
            If the ticket's units have finished before, or an outcome is out of range. Nothing is
            counted then.
        """
        seen = checked(ticket, outcomes, self.rules)
        coins = self.audits(ticket, [outcome.score for outcome in seen])
        units = [
            Unit(
                number=number,
                epoch=ticket.plan.epoch,
                status=ticket.plan.status,
                member=ticket.plan.member,
                probability=probability,
                audited=audited,
                loss=outcome.loss if audited else None,
                score=outcome.score,
                depth=outcome.depth,
                tokens=outcome.tokens,
                covered=covered,
                withdrawn=ticket.withdrawn,
            )
            for number, (probability, audited), outcome in zip(
                ticket.numbers, coins, seen, strict=True
            )
        ]
        with self._lock:
            state, now, found = self._state, self._clock(), []
            for unit in units:
                state, watched = observe(self.rules, state, unit, time=now)
                found.append(watched)
            if ticket.finished:
                raise InvalidArgumentError("ticket", ticket.numbers, "of units not yet finished")
            self._commit(state, [unit_record(watched, now) for watched in found])
            ticket.finished = True
        self._tell([event for watched in found for event in watched.events], found)
        return tuple(found)

    def label(self, number: int, loss: float) -> Watched:
        """Put the label of a unit that has finished without one; return when it is on disk.

        A unit whose coin said yes waits for its label, and is evidence when it comes: that is valid
        as long as when it comes, and whether, does not depend on the loss. The newest 1000 are
        waited for; one that never comes is no evidence.

        Parameters
        ----------
        number : int
            Of the unit (``Watched.unit.number``).
        loss : float

        Raises
        ------
        InvalidArgumentError
            If no label of that unit is waited for, or the loss is out of range.
        """
        with self._lock:
            now = self._clock()
            state, watched = label(self.rules, self._state, number=number, loss=loss, time=now)
            self._commit(state, [label_record(watched, now)])
        self._tell(watched.events, [watched])
        return watched

    def trip(self, reason: str) -> None:
        """Withdraw the policy by hand; units that are running finish at full depth.

        The recovery test brings the policy back on evidence, as after an alarm.
        """
        with self._lock:
            now = self._clock()
            state, events = trip(self.rules, self._state, reason=reason, time=now)
            if events:
                said = [event.to_dict() for event in events]
                self._commit(
                    state, [{"kind": "trip", "time": now, "reason": reason, "events": said}]
                )
        self._tell(events, [])

    def save(self) -> None:
        """Write the state beside the journal."""
        if self._journal is None:
            return
        with self._lock:
            snapshot = Snapshot(self._journal.size, self._state.to_dict(self.rules))
            snapshot.write(_beside(self._journal.path), self._header)
            self._saved = self._state.finished

    def close(self) -> None:
        """Save, and let go of the journal; the monitor takes no units afterwards."""
        if self._journal is not None and not self._journal.closed:
            self.save()
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _member(self, index: int) -> Policy | None:
        if index == 0:
            return None
        if index == self.rules.member:
            return self.policy
        assert self.policy.certificate is not None
        knob = float(self.policy.certificate.evidence["knobs"][index])
        return replace(self.policy.member(knob), certificate=self.policy.certificate)

    def _commit(self, state: MonitorState, records: list[dict[str, Any]]) -> None:
        """Put records on disk, then move on: a failure leaves the state as it was."""
        if self._journal is not None:
            self._journal.append(records)
        self._state = state
        if state.finished - self._saved >= self._every:
            self.save()

    def _resume(self, journal: Journal) -> None:
        snapshot = Snapshot.read(_beside(journal.path), self._header)
        offset = journal.start
        if snapshot is not None:
            if snapshot.offset > journal.size:
                raise JournalError(
                    f"{journal.path} is shorter than its snapshot says: lines that had been "
                    "acknowledged are missing"
                )
            offset = snapshot.offset
            self._state = MonitorState.from_dict(snapshot.state, self.rules)
        for record in journal.read(offset):
            self._state, events = replayed(self.rules, self._state, record)
            self.events.extend(events)

    def _tell(self, events: Sequence[Event], units: Sequence[Watched]) -> None:
        for event in events:
            self.events.append(event)
            _log.log(logging.WARNING if event.kind in _LOUD else logging.INFO, "%s", event)
            _call(self._on_event, event)
        for watched in units:
            _call(self._on_unit, watched)


def policy_fingerprint(policy: Policy) -> str:
    """Hash of everything a policy says, its certificate included."""
    text = json.dumps(policy.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _beside(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.state")


def _call(callback: Callable[[Any], None] | None, value: Any) -> None:
    """Call back; a callback that fails must not take the generation down with it."""
    if callback is None:
        return
    try:
        callback(value)
    except Exception:
        _log.exception("a monitor's callback failed")
