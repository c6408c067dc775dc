"""How soon a monitor finds a change: answered before it is switched on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._monitor import SAFE, AbstractRiskMonitor
from adaptive.calibration._unit_tables import vector
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
        First-order delay of the single bet that grows fastest: ln(threshold) over its growth per
        label (for 0/1 losses their divergence), in units.
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
    factor: float | None = None,
    losses: ArrayLike | None = None,
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
    factor : float, optional
        The mean loss after the change is ``factor * bound``; above 1, result below `upper`. 2 if
        neither this nor `losses` is given.
    losses : array_like [n], optional
        Losses of units after the change, as recorded, in place of `factor`: the plan draws from
        them with replacement. Their mean is above `bound`.
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
    Without `losses`, those planned for are `lower` or `upper`, the most spread-out law with that
    mean and the hardest to watch; graded losses are found several times sooner. A risk only just
    above the bound takes very long, whatever the monitor: the units go up with the inverse square
    of the excess.

    Examples
    --------
    >>> from adaptive.calibration import RiskMonitor
    >>> monitor = RiskMonitor(0.05, average_run_length=1e5)
    >>> print(plan_detection(monitor, audit_rate=0.1))
    A risk of 0.1 is found after about 2,020 units (median; 9 times in 10 within 4,228),
    202 of them with a label.
    False alarm in 10,000 quiet units before: at most 0.1.
    >>> graded = np.random.default_rng(0).beta(2.0, 18.0, 1000)  # mean 0.1
    >>> plan_detection(monitor, audit_rate=0.1, losses=graded).median_units < 400
    True
    """
    if not isinstance(monitor, AbstractRiskMonitor):
        raise InvalidTypeError("monitor", monitor, "a RiskMonitor or LifetimeRiskMonitor")
    if not 0.0 < check_number("audit_rate", audit_rate) <= 1.0:
        raise InvalidArgumentError("audit_rate", audit_rate, "in (0, 1]")
    if losses is not None and factor is not None:
        raise InvalidArgumentError("factor", factor, "left out where `losses` are given")
    if losses is None:
        law = _spread(monitor, 2.0 if factor is None else factor)
    else:
        law = _recorded(monitor, losses)
    least = math.log(monitor.threshold) / law.growth(monitor) / audit_rate
    if least > _LARGEST:
        raise InvalidArgumentError(
            "factor" if losses is None else "losses",
            f"a mean of {law.mean:g} beside a bound of {monitor.bound:g}",
            f"found within {_LARGEST:,} units: this takes about {least:.2g}",
        )
    check_count("replicates", replicates)
    check_count("quiet", quiet, least=0)
    labels = _Labels(monitor, audit_rate, as_generator(rng))
    units, audits = labels.until_alarm(labels.after(quiet, replicates), quiet, law)
    median = float(np.median(units))
    return DetectionPlan(
        law.mean,
        median,
        float(np.quantile(units, 0.9)),
        float(np.median(audits)),
        median * (law.mean - monitor.bound),
        quiet,
        monitor.false_alarm_limit(quiet),
        least,
    )


@dataclass(frozen=True)
class _Law:
    """Losses with finitely many values: `values` [n], and the shares up to each [n]."""

    values: Array
    cumulated: Array

    @property
    def mean(self) -> float:
        """Mean loss."""
        return float(self.values @ np.diff(self.cumulated, prepend=0.0))

    def draw(self, size: int, rng: np.random.Generator) -> Array:
        """Losses [size]."""
        places = np.searchsorted(self.cumulated, rng.random(size), side="right")
        return self.values[np.minimum(places, self.values.size - 1)]  # the last share rounds

    def growth(self, monitor: AbstractRiskMonitor) -> float:
        """Largest mean logarithm of a factor, over all single bets."""
        gains = (self.values - monitor.bound) / (monitor.bound - monitor.lower)
        shares = np.diff(self.cumulated, prepend=0.0)
        found = optimize.minimize_scalar(
            lambda bet: -float(shares @ np.log1p(bet * gains)), bounds=(0.0, 1.0 - 1e-9)
        )
        return max(-float(found.fun), 1e-300)


def _spread(monitor: AbstractRiskMonitor, factor: float) -> _Law:
    """Losses of `lower` or `upper` with a multiple of the bound as mean."""
    bound, changed = monitor.bound, check_positive("factor", factor) * monitor.bound
    if not bound < changed < monitor.upper:
        allowed = f"such that factor x bound is in ({bound:g}, {monitor.upper:g})"
        raise InvalidArgumentError("factor", factor, allowed)
    return _spread_at(monitor, changed)


def _spread_at(monitor: AbstractRiskMonitor, mean: float) -> _Law:
    share = (mean - monitor.lower) / (monitor.upper - monitor.lower)
    return _Law(np.array([monitor.upper, monitor.lower]), np.array([share, 1.0]))


def _recorded(monitor: AbstractRiskMonitor, losses: ArrayLike) -> _Law:
    """Give each recorded loss the share it had."""
    seen = vector("losses", losses)
    outside = (seen < monitor.lower) | (seen > monitor.upper)
    if outside.any():
        place = int(np.argmax(outside))
        allowed = f"in [{monitor.lower:g}, {monitor.upper:g}]"
        raise InvalidArgumentError("losses", f"{seen[place]} at position {place}", allowed)
    if not seen.mean() > monitor.bound:
        allowed = f"such that the mean is above the bound {monitor.bound:g}"
        raise InvalidArgumentError("losses", f"a mean of {seen.mean():g}", allowed)
    values, counts = np.unique(seen, return_counts=True)
    return _Law(values, np.cumsum(counts) / seen.size)


@dataclass(frozen=True)
class _Labels:
    """A monitor simulated label by label; between labels lie units without one."""

    monitor: AbstractRiskMonitor
    rate: float
    rng: np.random.Generator

    def after(self, quiet: int, replicates: int) -> Array:
        """Statistics [replicates, n_bets] after quiet units at the bound."""
        statistics = np.zeros((replicates, self.monitor.bet_sizes.size))
        law = _spread_at(self.monitor, self.monitor.bound)
        units = np.zeros(replicates, np.int64)
        while (units < quiet).any():
            gaps = self.rng.geometric(self.rate, replicates)
            reached = units + gaps <= quiet
            gaps = np.minimum(gaps, quiet - units)
            factors = np.where(reached[:, None], self._factors(law, replicates), 1.0)
            statistics = factors * (statistics + self.monitor.spend(units, gaps)[:, None])
            statistics[statistics.mean(axis=1) >= self.monitor.threshold] = 0.0
            units += gaps
        return statistics

    def until_alarm(
        self, statistics: Array, quiet: int, law: _Law
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Units and labels from the change to the alarm [replicates]."""
        replicates = statistics.shape[0]
        units = np.zeros(replicates, np.int64)
        audits = np.zeros(replicates, np.int64)
        running = np.arange(replicates)
        while running.size:
            gaps = self.rng.geometric(self.rate, running.size)
            spent = self.monitor.spend(units[running] + quiet, gaps)
            statistics = self._factors(law, running.size) * (statistics + spent[:, None])
            units[running] += gaps
            audits[running] += 1
            evidence = statistics.mean(axis=1) + self.monitor.reserve(units[running] + quiet)
            going = evidence < self.monitor.threshold
            running, statistics = running[going], statistics[going]
            if units.max() > _LARGEST:
                raise InvalidArgumentError(
                    "monitor", self.monitor, f"one that alarms within {_LARGEST:,} units"
                )
        return units, audits

    def _factors(self, law: _Law, size: int) -> Array:
        monitor = self.monitor
        gains = law.draw(size, self.rng) - monitor.bound
        safe = np.minimum(monitor.bet_sizes, SAFE / (monitor.bound - monitor.lower))
        return np.asarray(1.0 + safe * gains[:, None])
