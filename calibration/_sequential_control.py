"""Risk control that looks after every unit and spends new units only where it is undecided."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._certificate import Certificate, Verification
from adaptive.calibration._differences import compared
from adaptive.calibration._eprocess import BETS, MeanEProcess
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import (
    as_floats,
    check_count,
    check_number,
    check_probability,
    check_risk,
)

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
Draw = Callable[[int, int, int], ArrayLike]


class Verdict(enum.Enum):
    """How testing of a column ended."""

    CERTIFIED = "the evidence reached 1/delta"
    HOPELESS = "the evidence that the risk is above the promise reached its limit"
    OUT_OF_REACH = "even the best losses on all remaining units could not certify it"


@dataclass(frozen=True)
class ColumnRecord:
    """What was spent on one column and what came of it.

    Parameters
    ----------
    column : int
    verdict : Verdict
    units : int
        Units after which it was decided.
    drawn : int
        Losses asked for; more than `units` where they came in batches.
    log_e : float
        Largest log e-value against "the risk is above the promise".
    mean : float
        Mean loss of the units up to the decision.
    """

    column: int
    verdict: Verdict
    units: int
    drawn: int
    log_e: float
    mean: float


@dataclass(frozen=True, repr=False)
class SequentialResult:
    """Outcome of `control_sequentially`.

    Parameters
    ----------
    index : int or None
        Last certified column; None means full computation is to be used.
    certified : ndarray of bool [n_columns]
        Column 0 is true: its loss is zero by construction.
    records : tuple of ColumnRecord
        One per visited column, in order.
    certificate : Certificate
    """

    index: int | None
    certified: NDArray[np.bool_]
    records: tuple[ColumnRecord, ...]
    certificate: Certificate

    @property
    def drawn(self) -> int:
        """Losses asked for, over all columns."""
        return sum(record.drawn for record in self.records)

    def to_frame(self) -> pd.DataFrame:
        """One row per visited column."""
        import pandas as pd

        rows = [{**vars(record), "verdict": record.verdict.name} for record in self.records]
        return pd.DataFrame(rows, columns=list(ColumnRecord.__annotations__))

    def __repr__(self) -> str:
        return f"SequentialResult(index={self.index}, drawn={self.drawn}; {self.certificate})"


def control_sequentially(
    draw: Draw,
    *,
    n_columns: int,
    risk: float,
    max_units: int,
    delta: float = 0.05,
    bound: float = 1.0,
    least: float = 0.0,
    batch: int = 1,
    start: int = 1,
    futility: float = 0.05,
    bets: tuple[float, ...] = BETS,
    loss: str = "loss",
    unit: str = "unit",
) -> SequentialResult:
    r"""Certify columns in order, each with as few units as its evidence needs.

    Each column is tested by an e-process (`MeanEProcess`), looked at after every unit. A column
    is certified as soon as the e-value reaches 1/delta, and the next column begins; the whole
    ends with the first column that is given up.

    Parameters
    ----------
    draw : callable
        ``draw(column, first, last)`` gives the losses of units ``first .. last - 1`` at a column,
        [last - first]. Units come in an order fixed beforehand (a random permutation of the
        calibration units), the same for every column.
    n_columns : int
        Columns from safest to cheapest; column 0 is full computation and is not tested.
    risk : float
        Promise, in (0, bound).
    max_units : int
        Units available.
    delta : float
        Error probability, in (0, 1).
    bound, least : float
        Declared bounds of the loss; a loss outside is an error. Only `bound` matters for the
        guarantee; `least` says when to give up.
    batch : int
        Losses asked for at a time; evidence is looked at after every unit all the same.
    start : int
        First column to test, chosen without looking at these losses; columns before it are not
        certified.
    futility : float
        Give a column up when an e-process for "the risk is above the promise" reaches
        1/futility: at most this chance of giving up a column whose risk is at the promise or
        below. Small keeps power, large saves units.
    bets : tuple of float
        As in `MeanEProcess`.
    loss, unit : str
        Names for the certificate.

    Returns
    -------
    SequentialResult

    Raises
    ------
    InvalidArgumentError
        If a loss is NaN or outside its bounds, or `draw` gives the wrong number of them.

    Notes
    -----
    Guarantee: P(every certified column has risk <= promise) >= 1 - delta, for independent units,
    whatever the stopping: a false certificate needs the e-process of the first column that
    breaks the promise to reach 1/delta, ever, which has probability at most delta (Ville).
    Giving up early never invalidates it. On clearly safe columns fewer units are needed than
    for a test of fixed size, on narrow ones more.

    References
    ----------
    Zecchin, Park and Simeone (2025), Adaptive learn-then-test, arXiv:2409.15844. Waudby-Smith
    and Ramdas (2024), doi:10.1093/jrsssb/qkad009.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> table = rng.random((500, 4)) < [0.0, 0.005, 0.01, 0.3]
    >>> result = control_sequentially(
    ...     lambda column, first, last: table[first:last, column],
    ...     n_columns=4, risk=0.1, max_units=500,
    ... )
    >>> result.index, result.drawn < 200
    (2, True)
    """
    level, upper = check_risk(risk, bound)
    check_probability("delta", delta)
    check_probability("futility", futility)
    check_count("n_columns", n_columns, least=2)
    check_count("max_units", max_units)
    check_count("batch", batch)
    if not 1 <= check_count("start", start) < n_columns:
        raise InvalidArgumentError("start", start, f"in 1..{n_columns - 1}")
    if check_number("least", least) >= level:
        raise InvalidArgumentError("least", least, f"below `risk` = {level:g}")
    test = _ColumnTest(
        draw=draw,
        safe=MeanEProcess(level=level, bound=upper, bets=bets),
        unsafe=MeanEProcess(level=-level, bound=-least, bets=bets),
        least=float(least),
        target=-math.log(delta),
        futile=-math.log(futility),
        max_units=max_units,
        batch=batch,
    )
    records: list[ColumnRecord] = []
    for column in range(start, n_columns):
        records.append(test.run(column))
        if records[-1].verdict is not Verdict.CERTIFIED:
            break
    passed = [record.column for record in records if record.verdict is Verdict.CERTIFIED]
    certified = np.zeros(n_columns, dtype=bool)
    certified[[0, *passed]] = True
    index = passed[-1] if passed else None
    settings = {
        "n_columns": n_columns,
        "max_units": max_units,
        "least": float(least),
        "start": start,
        "futility": float(futility),
        "bets": list(bets),
    }
    certificate = _certificate(
        tuple(records), index, level, upper, delta, settings, loss=loss, unit=unit
    )
    return SequentialResult(index, certified, tuple(records), certificate)


def verify_sequential(certificate: Certificate, draw: Draw) -> Verification:
    """Draw the losses of a sequential certificate again and say what differs.

    `Certificate.verify` does the same for losses that are at hand as an array.

    Parameters
    ----------
    certificate : Certificate
        From `control_sequentially`.
    draw : callable
        As given to it; only the units that were read are asked for, one by one.

    Returns
    -------
    Verification
        True if the same columns are visited, decided after the same units with the same evidence
        (to 1e-6 relative), and the recorded decision follows.

    Raises
    ------
    InvalidArgumentError
        If the certificate is of another kind.
    """
    if certificate.method != "e-process" or "settings" not in certificate.evidence:
        raise InvalidArgumentError("certificate", certificate.method, "by `control_sequentially`")
    return compared(certificate, again_from(certificate, draw, batch=1))


def again_from(certificate: Certificate, draw: Draw, *, batch: int) -> Certificate:
    """Return the certificate that the same settings give for losses drawn again."""
    evidence = certificate.evidence
    settings = {**evidence["settings"], "bets": tuple(evidence["settings"]["bets"])}
    return control_sequentially(
        draw,
        risk=float(certificate.risk),  # type: ignore[arg-type]
        bound=float(certificate.bound),  # type: ignore[arg-type]
        delta=certificate.delta,
        batch=batch,
        loss=certificate.loss,
        unit=certificate.unit,
        **settings,
    ).certificate


@dataclass(frozen=True)
class _ColumnTest:
    draw: Draw
    safe: MeanEProcess
    unsafe: MeanEProcess
    least: float
    target: float
    futile: float
    max_units: int
    batch: int

    def run(self, column: int) -> ColumnRecord:
        safe = np.zeros(len(self.safe.bets))
        unsafe = np.zeros(len(self.unsafe.bets))
        seen, total, peak = 0, 0.0, -math.inf
        while self._within_reach(safe, seen):
            last = min(seen + self.batch, self.max_units)
            losses = self._losses(column, seen, last)
            log_e, safe = self.safe.path(losses, start=safe)
            against, unsafe = self.unsafe.path(-losses, start=unsafe)
            certified = np.flatnonzero(log_e >= self.target)
            hopeless = np.flatnonzero(against >= self.futile)
            stop = min((int(hits[0]) + 1 for hits in (certified, hopeless) if hits.size), default=0)
            read = stop or losses.size
            total += float(losses[:read].sum())
            peak = max(peak, float(log_e[:read].max()))
            if stop:
                units = seen + stop
                found = peak >= self.target
                verdict = Verdict.CERTIFIED if found else Verdict.HOPELESS
                return ColumnRecord(column, verdict, units, last, peak, total / units)
            seen = last
        mean = total / seen if seen else math.nan
        return ColumnRecord(column, Verdict.OUT_OF_REACH, seen, seen, peak, mean)

    def _within_reach(self, wealth: Array, seen: int) -> bool:
        left = self.max_units - seen
        if left <= 0:
            return False
        bets = np.asarray(self.safe.bets) / (self.safe.bound - self.safe.level)
        best = wealth + left * np.log1p(bets * (self.safe.level - self.least))
        return bool(np.logaddexp.reduce(best) - math.log(bets.size) >= self.target)

    def _losses(self, column: int, first: int, last: int) -> Array:
        losses = as_floats("draw", self.draw(column, first, last))
        if losses.shape != (last - first,):
            raise InvalidArgumentError(
                "draw", f"shape {losses.shape} for column {column}", f"of shape ({last - first},)"
            )
        wrong = ~((losses >= self.least) & (losses <= self.safe.bound))
        if wrong.any():
            unit = int(np.argmax(wrong))
            place = f"{losses[unit]:.17g} at column {column}, unit {first + unit}"
            limits = f"finite losses in [{self.least:g}, {self.safe.bound:g}]"
            raise InvalidArgumentError("draw", place, limits)
        return losses


def _certificate(
    records: tuple[ColumnRecord, ...],
    index: int | None,
    risk: float,
    bound: float,
    delta: float,
    settings: dict[str, Any],
    *,
    loss: str,
    unit: str,
) -> Certificate:
    last = records[-1]
    notes = []
    if last.verdict is not Verdict.CERTIFIED:
        notes.append(
            f"Testing ended at column {last.column} after {last.units} units: {last.verdict.value}."
        )
    return Certificate(
        holds=index is not None,
        risk=risk,
        delta=delta,
        method="e-process",
        procedure="fixed-sequence, looking after every unit",
        n=max(record.units for record in records),
        index=index,
        evidence={
            "losses": [
                {
                    "name": loss,
                    "risk": risk,
                    "bound": bound,
                    "loss_type": "bounded",
                    "test": "e-process",
                }
            ],
            "n_columns": settings["n_columns"],
            "settings": settings,
            "columns": [record.column for record in records],
            "certified": [r.column for r in records if r.verdict is Verdict.CERTIFIED],
            "log_e_values": [max(record.log_e, -1e300) for record in records],
            "units": [record.units for record in records],
            "means": [None if math.isnan(r.mean) else r.mean for r in records],
        },
        bound=bound,
        assumptions=(
            "units are independent draws from one distribution",
            f"no loss exceeds {bound:g}",
            "the order of the units was fixed before the losses were looked at",
        ),
        split={"n_test": max(record.units for record in records)},
        notes=tuple(notes),
        loss=loss,
        unit=unit,
    )
