"""How soon a monitor finds a change: answered before it is switched on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._monitor import SAFE, AbstractRiskMonitor
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_count,
    check_number,
    check_positive,
)

Array = NDArray[np.float64]
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
    quiet : int
        Units before the change.
    false_alarm_limit : float
        P(false alarm among them) is at most this.
    least_units : float
        First-order delay of a single bet that is right: ln(threshold)/KL labels, in units.
    """

    changed_risk: float
    median_units: float
    q90_units: float
    median_audits: float
    median_excess: float
    quiet: int
    false_alarm_limit: float
    least_units: float

    def __str__(self) -> str:
        return (
            f"A risk of {self.changed_risk:g} is found after about {self.median_units:,.0f} units "
            f"(median; 9 times in 10 within {self.q90_units:,.0f}),\n"
            f"{self.median_audits:,.0f} of them with a label.\n"
            f"False alarm in {self.quiet:,} quiet units before: at most "
            f"{self.false_alarm_limit:.3g}."
        )


def plan_detection(
    monitor: AbstractRiskMonitor,
    *,
    factor: float = 2.0,
    audit_rate: float = 1.0,
    quiet: int = 10_000,
    replicates: int = 1000,
    rng: Rng = None,
) -> DetectionPlan:
    """Units until a risk monitor finds that the risk has become a multiple of its bound.

    Parameters
    ----------
    monitor : RiskMonitor or LifetimeRiskMonitor
        With the promise and the false-alarm rate to plan for.
    factor : float
        The mean loss after the change is ``factor * bound``; above 1, result below `upper`.
    audit_rate : float
        Share of units with a label, in (0, 1]: 1 in `exact` mode, where settling labels all.
    quiet : int
        Units before the change, at the bound. For a `RiskMonitor` 0 is the worst moment and quiet
        time costs nothing; a `LifetimeRiskMonitor` is slower the longer it has been on.
    replicates : int
        Simulated streams.
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
    >>> from adaptive.calibration import RiskMonitor
    >>> monitor = RiskMonitor(0.05, average_run_length=1e5)
    >>> print(plan_detection(monitor, audit_rate=0.1))
    A risk of 0.1 is found after about 2,020 units (median; 9 times in 10 within 4,228),
    202 of them with a label.
    False alarm in 10,000 quiet units before: at most 0.1.
    """
    if not isinstance(monitor, AbstractRiskMonitor):
        raise InvalidTypeError("monitor", monitor, "a RiskMonitor or LifetimeRiskMonitor")
    if not 0.0 < check_number("audit_rate", audit_rate) <= 1.0:
        raise InvalidArgumentError("audit_rate", audit_rate, "in (0, 1]")
    bound, changed = monitor.bound, check_positive("factor", factor) * monitor.bound
    if not bound < changed < monitor.upper:
        allowed = f"such that factor x bound is in ({bound:g}, {monitor.upper:g})"
        raise InvalidArgumentError("factor", factor, allowed)
    check_count("replicates", replicates)
    check_count("quiet", quiet, least=0)
    labels = _Labels(monitor, audit_rate, as_generator(rng))
    units, audits = labels.until_alarm(labels.after(quiet, replicates), quiet, changed)
    median = float(np.median(units))
    return DetectionPlan(
        changed,
        median,
        float(np.quantile(units, 0.9)),
        float(np.median(audits)),
        median * (changed - bound),
        quiet,
        monitor.false_alarm_limit(quiet),
        _lorden(monitor, changed) / audit_rate,
    )


@dataclass(frozen=True)
class _Labels:
    """A monitor simulated label by label; between labels lie units without one."""

    monitor: AbstractRiskMonitor
    rate: float
    rng: np.random.Generator

    def after(self, quiet: int, replicates: int) -> Array:
        """Statistics [replicates, n_bets] after quiet units at the bound."""
        statistics = np.zeros((replicates, self.monitor.bet_sizes.size))
        units = np.zeros(replicates, np.int64)
        while (units < quiet).any():
            gaps = self.rng.geometric(self.rate, replicates)
            reached = units + gaps <= quiet
            gaps = np.minimum(gaps, quiet - units)
            factors = np.where(reached[:, None], self._factors(self.monitor.bound, replicates), 1.0)
            statistics = factors * (statistics + self.monitor.spend(units, gaps)[:, None])
            statistics[statistics.mean(axis=1) >= self.monitor.threshold] = 0.0
            units += gaps
        return statistics

    def until_alarm(
        self, statistics: Array, quiet: int, risk: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Units and labels from the change to the alarm [replicates]."""
        replicates = statistics.shape[0]
        units = np.zeros(replicates, np.int64)
        audits = np.zeros(replicates, np.int64)
        running = np.arange(replicates)
        while running.size:
            gaps = self.rng.geometric(self.rate, running.size)
            spent = self.monitor.spend(units[running] + quiet, gaps)
            statistics = self._factors(risk, running.size) * (statistics + spent[:, None])
            units[running] += gaps
            audits[running] += 1
            evidence = statistics.mean(axis=1) + self.monitor.reserve(units[running] + quiet)
            going = evidence < self.monitor.threshold
            running, statistics = running[going], statistics[going]
            if units.max() > _LARGEST:
                raise InvalidArgumentError("factor", risk, f"found within {_LARGEST:,} units")
        return units, audits

    def _factors(self, risk: float, size: int) -> Array:
        monitor = self.monitor
        span = monitor.upper - monitor.lower
        lost = self.rng.random(size) < (risk - monitor.lower) / span
        gains = np.where(lost, monitor.upper, monitor.lower) - monitor.bound
        safe = np.minimum(monitor.bet_sizes, SAFE / (monitor.bound - monitor.lower))
        return np.asarray(1.0 + safe * gains[:, None])


def _lorden(monitor: AbstractRiskMonitor, risk: float) -> float:
    """ln(A) over the divergence of 0/1 losses at the two risks."""
    span = monitor.upper - monitor.lower
    q, m = (risk - monitor.lower) / span, (monitor.bound - monitor.lower) / span
    divergence = q * math.log(q / m) + (1.0 - q) * math.log((1.0 - q) / (1.0 - m))
    return math.log(monitor.threshold) / divergence
