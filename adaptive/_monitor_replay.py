"""Journal lines of a monitor, and putting them to its rules again."""

from __future__ import annotations

import math
from typing import Any

from adaptive._monitor_records import Event, JournalError, Unit, Watched
from adaptive._monitor_rules import label, observe, trip
from adaptive._monitor_state import MonitorState, Rules
from adaptive.calibration import InvalidArgumentError, audit_coins


def unit_record(watched: Watched, time: float) -> dict[str, Any]:
    """Journal line of a unit."""
    return {"kind": "unit", "time": time} | watched.unit.to_dict() | _came(watched)


def label_record(watched: Watched, time: float) -> dict[str, Any]:
    """Journal line of a label that came late."""
    named = {"number": watched.unit.number, "loss": watched.unit.loss}
    return {"kind": "label", "time": time} | named | _came(watched)


def _came(watched: Watched) -> dict[str, Any]:
    """Return what came of a line, in the form that replay compares."""
    return {
        "inside": watched.inside,
        "after": watched.status,
        "evidence": watched.evidence,
        "events": [event.to_dict() for event in watched.events],
    }


def replayed(
    rules: Rules, state: MonitorState, record: dict[str, Any]
) -> tuple[MonitorState, tuple[Event, ...]]:
    """Put a journal line to the rules again; what it says came out must come out.

    Raises
    ------
    JournalError
        If it does not, or the line is of an unknown kind.
    """
    try:
        kind, time = record["kind"], record["time"]
        if kind == "trip":
            return trip(rules, state, reason=record["reason"], time=time)
        if kind == "label":
            number, loss = record["number"], record["loss"]
            state, watched = label(rules, state, number=number, loss=loss, time=time)
        elif kind == "unit":
            unit = Unit.from_dict({name: record[name] for name in Unit.__dataclass_fields__})
            _check_coin(rules, unit)
            state, watched = observe(rules, state, unit, time=time)
        else:
            raise JournalError(f"a journal line of unknown kind {kind!r}")
        _check_same(record, watched)
    except KeyError as error:
        raise JournalError(f"a journal line lacks {error}") from error
    except InvalidArgumentError as error:
        raise JournalError(f"a journal line does not follow: {error}") from error
    return state, watched.events


def _check_coin(rules: Rules, unit: Unit) -> None:
    if bool(audit_coins([unit.probability], seed=rules.seed, unit=unit.number)[0]) != unit.audited:
        raise JournalError(
            f"unit {unit.number} of the journal says audited = {unit.audited}, which does not "
            "follow from its coin"
        )


def _check_same(record: dict[str, Any], watched: Watched) -> None:
    said = (record["inside"], record["after"], [event["kind"] for event in record["events"]])
    came = (watched.inside, watched.status, [event.kind for event in watched.events])
    if said != came or not math.isclose(record["evidence"], watched.evidence, rel_tol=1e-9):
        raise JournalError(
            f"unit {watched.unit.number} of the journal does not follow from what came before it: "
            f"the journal says {said} at evidence {record['evidence']}, replay gives {came} at "
            f"{watched.evidence}"
        )
