"""How soon a monitor finds a change: answered before it is switched on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._monitor import RiskMonitor
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_count,
    check_number,
    check_positive,
)

_LARGEST = 10_000_000


@dataclass(frozen=True)
class DetectionPlan:
    """What to expect of a monitor when the risk rises.

    Parameters
    ----------
    changed_risk : float
        Mean loss after the change.
    median_units, q90_units : float
        Units from the change to the alarm: median and 90 % quantile.
    median_audits : float
        Labels among them.
    median_excess : float
        Loss beyond the promise that the units up to a median alarm carry together.
    false_alarm_limit : float
        P(false alarm within `horizon` units) is at most this.
    horizon : int
    least_units : float
        ln(A)/KL per label, in units: what no method with this promise can much undercut when the
        change comes at the worst moment.
    """

    changed_risk: float
    median_units: float
    q90_units: float
    median_audits: float
    median_excess: float
    false_alarm_limit: float
    horizon: int
    least_units: float

    def __str__(self) -> str:
        return (
            f"A risk of {self.changed_risk:g} is found after about {self.median_units:,.0f} units "
            f"(median; 9 times in 10 within {self.q90_units:,.0f}),\n"
            f"{self.median_audits:,.0f} of them with a label.\n"
            f"False alarm within {self.horizon:,} units: at most {self.false_alarm_limit:.3g}."
        )


def plan_detection(
    bound: float,
    *,
    average_run_length: float = 1e5,
    audit_rate: float = 1.0,
    factor: float = 2.0,
    lower: float = 0.0,
    upper: float = 1.0,
    horizon: int = 10_000,
    replicates: int = 1000,
    rng: Rng = None,
) -> DetectionPlan:
    """Units until a `RiskMonitor` finds that the risk has become a multiple of its bound.

    Parameters
    ----------
    bound, average_run_length, lower, upper
        Of the monitor.
    audit_rate : float
        Share of units with a label, in (0, 1]: 1 in `exact` mode, where settling labels all.
    factor : float
        The mean loss after the change is ``factor * bound``; above 1, result below `upper`.
    horizon : int
        Units that the false-alarm limit is stated for.
    replicates : int
        Simulated streams. The change comes at the first unit, the worst moment for this monitor.
    rng : int, Generator or None
        Seed of the simulation.

    Returns
    -------
    DetectionPlan

    Notes
    -----
    The losses planned for are `lower` or `upper`, the most spread-out law with that mean and the
    hardest to watch; graded losses are found several times sooner.

    Examples
    --------
    >>> print(plan_detection(0.05, average_run_length=1e5, audit_rate=0.1))
    A risk of 0.1 is found after about 2,524 units (median; 9 times in 10 within 5,000),
    253 of them with a label.
    False alarm within 10,000 units: at most 0.1.
    """
    monitor = RiskMonitor(bound, average_run_length=average_run_length, lower=lower, upper=upper)
    if not 0.0 < check_number("audit_rate", audit_rate) <= 1.0:
        raise InvalidArgumentError("audit_rate", audit_rate, "in (0, 1]")
    changed = check_positive("factor", factor) * bound
    if not bound < changed < upper:
        allowed = f"such that factor x bound is in ({bound:g}, {upper:g})"
        raise InvalidArgumentError("factor", factor, allowed)
    check_count("replicates", replicates)
    check_count("horizon", horizon)
    units, audits = _simulate(monitor, changed, audit_rate, replicates, as_generator(rng))
    median = float(np.median(units))
    return DetectionPlan(
        changed,
        median,
        float(np.quantile(units, 0.9)),
        float(np.median(audits)),
        median * (changed - bound),
        min(1.0, horizon / monitor.threshold),
        horizon,
        _lorden(monitor, changed) / audit_rate,
    )


def _simulate(
    monitor: RiskMonitor, risk: float, rate: float, replicates: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units and labels until the alarm [replicates]; a step is a label, after a geometric gap."""
    bets = monitor.bet_sizes
    span, low = monitor.upper - monitor.lower, monitor.lower
    share = (risk - low) / span
    statistics = np.zeros((replicates, bets.size))
    units = np.zeros(replicates, np.int64)
    audits = np.zeros(replicates, np.int64)
    running = np.arange(replicates)
    while running.size:
        gaps = rng.geometric(rate, running.size)
        losses = low + span * (rng.random(running.size) < share)
        factors = 1.0 + bets * (losses - monitor.bound)[:, None]
        statistics = factors * (statistics + gaps[:, None])
        units[running] += gaps
        audits[running] += 1
        going = statistics.mean(axis=1) < monitor.threshold
        running, statistics = running[going], statistics[going]
        if units.max() > _LARGEST:
            raise InvalidArgumentError("factor", risk, f"found within {_LARGEST:,} units")
    return units, audits


def _lorden(monitor: RiskMonitor, risk: float) -> float:
    """ln(A) over the divergence of 0/1 losses at the two risks."""
    span = monitor.upper - monitor.lower
    q, m = (risk - monitor.lower) / span, (monitor.bound - monitor.lower) / span
    divergence = q * math.log(q / m) + (1.0 - q) * math.log((1.0 - q) / (1.0 - m))
    return math.log(monitor.threshold) / divergence
