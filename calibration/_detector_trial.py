"""Detectors on trial: false alarms, run length, delay and misses on streams with a known change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._drift import ScoreDrift
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._monitor import AbstractRiskMonitor
from adaptive.calibration._slowing_down import SlowingDown
from adaptive.calibration._validation import as_floats, check_count

Array = NDArray[np.float64]


class Detector(Protocol):
    """What a detector needs to be put on trial: river's two names."""

    @property
    def drift_detected(self) -> bool:
        """Whether the last update raised the alarm."""

    def update(self, x: Any) -> Any:
        """Read one more loss."""


class OnlineMonitor:
    """A monitor of one stream with river's names, for code written for those.

    Parameters
    ----------
    monitor : RiskMonitor, LifetimeRiskMonitor, ScoreDrift or SlowingDown
        The first two read losses, the others scores.
    restart : bool
        Begin anew at the update after an alarm, as river's detectors do; otherwise it stays on.

    Notes
    -----
    The one mutable object of this kind: it only holds the state (`state`) that the monitor's pure
    functions return.

    Examples
    --------
    >>> from adaptive.calibration import RiskMonitor
    >>> detector = OnlineMonitor(RiskMonitor(0.05))
    >>> for loss in [1, 1, 1, 1, 1, 1, 1, 1]:
    ...     detector.update(loss)
    >>> detector.warning_detected, detector.drift_detected
    (True, True)
    """

    def __init__(
        self, monitor: AbstractRiskMonitor | ScoreDrift | SlowingDown, *, restart: bool = False
    ) -> None:
        if not isinstance(monitor, AbstractRiskMonitor | ScoreDrift | SlowingDown):
            allowed = "a RiskMonitor, LifetimeRiskMonitor, ScoreDrift or SlowingDown"
            raise InvalidTypeError("monitor", monitor, allowed)
        self.monitor: Any = monitor
        self.restart = restart
        self.state: Any = monitor.init()

    def update(self, x: float, *, expected: float | None = None) -> None:
        """Read one more loss or score; a risk monitor takes the expected loss beside it."""
        if self.restart and self.drift_detected:
            self.state = self.monitor.restart(self.state, [0])
        beside = {} if expected is None else {"expected": [expected]}
        if beside and not isinstance(self.monitor, AbstractRiskMonitor):
            raise InvalidArgumentError("expected", expected, "left out: only losses have one")
        scores = isinstance(self.monitor, ScoreDrift)
        values = self.monitor.features([x]) if scores else [x]
        self.state = self.monitor.update(self.state, values, **beside)

    @property
    def drift_detected(self) -> bool:
        """Whether the alarm is on."""
        return bool(self.monitor.alarm(self.state)[0])

    @property
    def warning_detected(self) -> bool:
        """Whether the warning is on."""
        return bool(self.monitor.warning(self.state)[0])

    @property
    def evidence(self) -> float:
        """Evidence now; the alarm is on at ``monitor.threshold``."""
        return float(self.monitor.evidence(self.state)[0])


@dataclass(frozen=True, eq=False)
class DetectorTrial:
    """What a detector did on streams with a known change.

    Parameters
    ----------
    first_alarm : ndarray of int [n_streams]
        Unit (counted from 1) of the first alarm before the change; 0 for none.
    first_detection : ndarray of int [n_streams]
        Unit of the first alarm after the change, of a detector started anew at any false alarm;
        0 for none.
    alarms_before : ndarray of int [n_streams]
        Alarms before the change, the detector started anew after each.
    change, units : int
        Units before the change, and in all.
    """

    first_alarm: NDArray[np.int64]
    first_detection: NDArray[np.int64]
    alarms_before: NDArray[np.int64]
    change: int
    units: int

    @property
    def false_alarms(self) -> float:
        """Share of streams with an alarm before the change."""
        return float(np.mean(self.first_alarm > 0))

    @property
    def run_length(self) -> float:
        """Units before the change per false alarm; infinite if there was none."""
        alarms = int(self.alarms_before.sum())
        return self.change * self.first_alarm.size / alarms if alarms else float("inf")

    @property
    def missed(self) -> float:
        """Share of streams without an alarm after the change."""
        return float(np.mean(self.first_detection == 0)) if self.units > self.change else 0.0

    @property
    def delays(self) -> Array:
        """Units from the change to the alarm, the alarming one counted; infinite if missed."""
        found = self.first_detection
        return np.where(found > 0, found - self.change, np.inf)

    def summary(self) -> dict[str, float]:
        """Return false alarms, run length, delay (median, 90 % quantile) and the share missed."""
        median, q90 = np.quantile(self.delays, [0.5, 0.9], method="higher")
        return {
            "false_alarms": self.false_alarms,
            "run_length": self.run_length,
            "median_delay": float(median),
            "q90_delay": float(q90),
            "missed": self.missed,
        }


def try_detector(make: Callable[[], Detector], losses: ArrayLike, *, change: int) -> DetectorTrial:
    """Put any detector with `update` and `drift_detected` on trial, stream by stream.

    Parameters
    ----------
    make : callable
        A new detector: ``lambda: OnlineMonitor(RiskMonitor(0.05))``,
        ``lambda: river_detector("ADWIN")``, or one of your own.
    losses : array_like [units, n_streams] or [units]
        Simulated (`BernoulliStream`, ...) or recorded losses, or whatever the detector reads.
    change : int
        Units before the change; all of them for streams without one.

    Returns
    -------
    DetectorTrial

    Notes
    -----
    After an alarm a new detector is made, so every detector counts alarms alike. The one that
    meets the change is the one that has run since the last false alarm.

    Examples
    --------
    >>> from adaptive.calibration import BernoulliStream, RiskMonitor
    >>> losses = BernoulliStream(0.05, after=0.3).draw(600, 300, streams=20, rng=0)
    >>> trial = try_detector(lambda: OnlineMonitor(RiskMonitor(0.05)), losses, change=300)
    >>> trial.false_alarms, trial.missed
    (0.0, 0.0)
    """
    table = _table(losses, change)
    if not callable(make):
        raise InvalidTypeError("make", make, "a function that makes a new detector")
    counts = np.zeros((3, table.shape[1]), np.int64)
    for j in range(table.shape[1]):
        detector = make()
        for t, value in enumerate(table[:, j].tolist(), start=1):
            detector.update(value)
            if not detector.drift_detected:
                continue
            if t > change:
                counts[1, j] = t
                break
            counts[0, j] = counts[0, j] or t
            counts[2, j] += 1
            detector = make()
    return DetectorTrial(counts[0], counts[1], counts[2], change, table.shape[0])


def try_monitor(
    monitor: AbstractRiskMonitor,
    losses: ArrayLike,
    *,
    change: int,
    expected: ArrayLike | None = None,
    audited: ArrayLike | None = None,
) -> DetectorTrial:
    """Put a risk monitor on trial, all streams at once; a stream alarmed falsely begins anew.

    Parameters
    ----------
    monitor : RiskMonitor or LifetimeRiskMonitor
    losses, change
        As in `try_detector`.
    expected, audited : array_like, the shape of `losses`, optional
        As in `RiskMonitor.update`.
    """
    table = _table(losses, change)
    if not isinstance(monitor, AbstractRiskMonitor):
        raise InvalidTypeError("monitor", monitor, "a RiskMonitor or LifetimeRiskMonitor")
    streams = table.shape[1]
    others = [
        None if other is None else _companion(name, other, np.shape(losses)).reshape(table.shape)
        for name, other in (("expected", expected), ("audited", audited))
    ]
    counts = np.zeros((3, streams), np.int64)
    state = monitor.init(streams)
    for t, row in enumerate(table, start=1):
        levels, seen = (None if other is None else other[t - 1] for other in others)
        state = monitor.update(state, row, expected=levels, audited=seen)
        alarm = monitor.alarm(state)
        if not alarm.any():
            continue
        if t > change:
            counts[1, alarm & (counts[1] == 0)] = t
            continue
        counts[0, alarm & (counts[0] == 0)] = t
        counts[2] += alarm
        state = monitor.restart(state, alarm)
    return DetectorTrial(counts[0], counts[1], counts[2], change, table.shape[0])


def _companion(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != shape:
        raise InvalidArgumentError(name, f"shape {array.shape}", f"of shape {shape}, as `losses`")
    return array


def _table(losses: ArrayLike, change: int) -> Array:
    table = as_floats("losses", losses)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.size == 0:
        raise InvalidArgumentError("losses", f"shape {table.shape}", "[units, n_streams]")
    if check_count("change", change, least=0) > table.shape[0]:
        raise InvalidArgumentError("change", change, f"at most {table.shape[0]}, the units")
    return table
