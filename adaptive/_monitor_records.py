"""What a monitor knows of a unit, what it tells of a transition, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from adaptive.calibration import AdaptiveError

#: What a monitor can be in.
Status = Literal["ok", "warn", "fallback", "probation"]
#: What an event says has happened.
EventKind = Literal["warn", "calm", "alarm", "trip", "resume", "clear"]


class JournalError(AdaptiveError, ValueError):
    """A journal or a snapshot is damaged, or belongs to another policy or other settings."""


class _Plain:
    """JSON form: the fields, under their names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises
        ------
        JournalError
            If fields are missing or unknown.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(data, Mapping) or set(data) != known:
            names = sorted(known ^ set(data)) if isinstance(data, Mapping) else type(data).__name__
            raise JournalError(f"not the fields of a {cls.__name__}: {names}")
        return cls(**data)


@dataclass(frozen=True)
class Unit(_Plain):
    """One finished unit, as it is put to the monitor.

    Parameters
    ----------
    number : int
        Place in the order in which units were begun; the audit coin is keyed by it.
    epoch : int
        Number of times the policy had been withdrawn or resumed when the unit began. Evidence is
        gathered per epoch: a unit that ends in another one than it began in is not evidence.
    status : {"ok", "warn", "fallback", "probation"}
        In force when the unit began.
    member : int
        Member of the path that ran; 0 is full computation.
    probability : float
        Chance that the unit would be audited, fixed before its loss was known.
    audited : bool
        Whether the coin said so. In fallback every unit is: comparing is free there.
    loss : float, optional
        Observed loss; in fallback, that of the early answers along the full model's text. ``None``
        where it is not known, or not yet.
    score : float, optional
        Mean score at the exits asked last; ``None`` where no exit was asked.
    depth : float
        Mean layers per generated token.
    tokens : int
        Generated tokens.
    covered : bool
        Whether the run met the conditions of the policy's certificate.
    withdrawn : bool
        Whether the policy was withdrawn while the unit ran: it was finished at full depth.
    """

    number: int
    epoch: int
    status: Status
    member: int
    probability: float
    audited: bool
    loss: float | None
    score: float | None
    depth: float
    tokens: int
    covered: bool = True
    withdrawn: bool = False


@dataclass(frozen=True)
class Event(_Plain):
    """A transition of a monitor.

    Parameters
    ----------
    kind : {"warn", "calm", "alarm", "trip", "resume", "clear"}
        Warning on, warning over, promise broken, withdrawn by hand, policy resumed, probation over.
    before, after : str
        States.
    finished : int
        Units finished before the transition, the one that caused it included.
    unit : int or None
        Number of that unit; ``None`` for a withdrawal by hand.
    evidence, threshold : float
        Of the test that decided, and the level at which it decides.
    reason : str
        In words.
    time : float
        Seconds since 1970, UTC.
    """

    kind: EventKind
    before: Status
    after: Status
    finished: int
    unit: int | None
    evidence: float
    threshold: float
    reason: str
    time: float

    def __str__(self) -> str:
        return (
            f"{self.before} -> {self.after} after {self.finished} units: {self.reason} "
            f"(evidence {self.evidence:.3g}, level {self.threshold:.3g})"
        )


@dataclass(frozen=True)
class Watched:
    """What became of a unit.

    Parameters
    ----------
    unit : Unit
    inside : bool
        Whether the certificate applies to it: its conditions were met, and neither did the unit run
        in fallback nor did an alarm fall into it.
    status : str
        State of the monitor after it.
    evidence : float
        Of the test in force after it: against the promise, or in fallback for the recovery.
    events : tuple of Event
        Transitions that the unit, or its label, caused.
    late : bool
        Whether this is the label of a unit that had finished before.
    """

    unit: Unit
    inside: bool
    status: Status
    evidence: float
    events: tuple[Event, ...] = ()
    late: bool = False
