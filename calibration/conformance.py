"""A conformance suite for risk control: whether a method keeps the guarantee it states.

Give it any `p_value(losses, level)`, `upper_bound(losses, delta)` or
`control(losses, risk, delta)` callable, of this library or of another. It is run on laws whose
mean is known, at the exact null where a valid method has the least room, and compared with exact
binomial limits; small cases are enumerated completely; and relations that every valid method
obeys are checked on examples. Use it in a test as ``assert check_p_value(mine).passed``.

Examples
--------
>>> import numpy as np
>>> from scipy import stats
>>> def exact(losses, level):
...     return stats.binom.cdf(losses.sum(), losses.size, level)
>>> check_p_value(exact, laws="binary", replicates=300).passed
True
>>> def floor_of_a_float32_mean(losses, level):
...     mean = float(losses.mean(dtype=np.float32))
...     return stats.binom.cdf(losses.size * mean, losses.size, level)
>>> check_p_value(floor_of_a_float32_mean, laws="binary", replicates=300).passed
False
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from adaptive.calibration._conformance_checks import (
    ENUMERATED,
    Finding,
    columns_apart,
    enumerated,
    enumerated_bound,
    enumerated_control,
    nothing_for_total_loss,
    relations,
)
from adaptive.calibration._conformance_laws import LAWS, SCENARIOS, Law, Scenario
from adaptive.calibration._validation import Rng, as_generator, check_choice, check_probability

Array = NDArray[np.float64]
PValue = Callable[[Array, float], Any]
UpperBound = Callable[[Array, float], Any]
Control = Callable[[Array, float, float], int | None]

__all__ = [
    "LAWS",
    "SCENARIOS",
    "ConformanceReport",
    "Finding",
    "Law",
    "Scenario",
    "check_control",
    "check_p_value",
    "check_upper_bound",
    "violation_limit",
    "violations",
]


@dataclass(frozen=True)
class ConformanceReport:
    """All findings about one method.

    Parameters
    ----------
    name : str
    findings : tuple of Finding
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that do not hold."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def to_frame(self) -> Any:
        """Return one row per check as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([vars(finding) for finding in self.findings])

    def __str__(self) -> str:
        head = f"{self.name}: {len(self.findings) - len(self.failures)}/{len(self.findings)} checks"
        lines = [
            f"  FAILED {f.check}: {f.found:.6g}, limit {f.limit:.6g} {f.detail}".rstrip()
            for f in self.failures
        ]
        return "\n".join([head, *lines])


def violation_limit(replicates: int, delta: float, *, confidence: float = 0.999) -> int:
    """Return how many violations in `replicates` a method with true rate delta may show.

    The exact binomial quantile: a method that keeps its promise exceeds it with probability at
    most 1 - confidence.

    Examples
    --------
    >>> violation_limit(2000, 0.05)
    131
    """
    return int(stats.binom.ppf(confidence, replicates, delta))


def check_p_value(
    p_value: PValue,
    *,
    name: str = "p_value",
    laws: str = "bounded",
    ordered: bool = False,
    batched: bool = False,
    sizes: Sequence[int] = (12, 100),
    levels: Sequence[float] = (0.05, 0.2),
    deltas: Sequence[float] = (0.05, 0.1),
    replicates: int = 2000,
    confidence: float = 0.999,
    rng: Rng = None,
) -> ConformanceReport:
    """Check a p-value of H: E L > level (small p is evidence that the mean loss is below it).

    Parameters
    ----------
    p_value : callable
        `p_value(losses [n], level) -> p`; with `batched`, `(losses [n, replicates], level) -> [.]`.
    name : str
        Name in the report.
    laws : {"binary", "bounded", "signed"}
        What losses the method is stated for: 0/1, [0, 1], or [-1, 1]; each includes the former.
    ordered : bool
        The p-value depends on the order of the units: relations between samples are not checked.
    sizes, levels, deltas : sequences
        Numbers of units, null means and error levels of the simulation.
    replicates : int
        Simulated samples per law, size and level.
    confidence : float
        Of the binomial limit, per check.
    rng : int, Generator or None
        Seed.

    Returns
    -------
    ConformanceReport
        Type-I error at the exact null for every law; exact type-I error by enumeration of all 0/1
        samples of 4, 8 and 12 units; relations between samples and, if `batched`, between columns.
    """
    check_choice("laws", laws, tuple(LAWS))
    run = p_value if batched else _each(p_value)
    generator = as_generator(rng)
    findings = []
    for law, n, level in itertools.product(LAWS[laws], sizes, levels):
        p = run(law.draw(generator, (n, replicates), level), level)
        for delta in deltas:
            check_probability("delta", delta)
            limit = violation_limit(replicates, delta, confidence=confidence)
            found = int(np.count_nonzero(p <= delta))
            label = f"type I error, {law.name}, n={n}, level={level:g}, delta={delta:g}"
            findings.append(Finding(label, found <= limit, found / replicates, limit / replicates))
    cases = itertools.product(ENUMERATED, (0.1, 0.3, 0.5))
    findings += [enumerated(run, n, level) for n, level in cases]
    findings += relations(run, ordered)
    if batched:
        findings.append(columns_apart(run, 0.25))
    return ConformanceReport(name, tuple(findings))


def check_upper_bound(
    upper_bound: UpperBound,
    *,
    name: str = "upper_bound",
    laws: str = "bounded",
    batched: bool = False,
    sizes: Sequence[int] = (12, 100),
    means: Sequence[float] = (0.05, 0.2),
    deltas: Sequence[float] = (0.05, 0.1),
    replicates: int = 2000,
    confidence: float = 0.999,
    rng: Rng = None,
) -> ConformanceReport:
    """Check `upper_bound(losses, delta)`: P(mean > bound) <= delta; see `check_p_value`.

    Returns
    -------
    ConformanceReport
        Miscoverage for every law; exact miscoverage by enumeration of all 0/1 samples of 4 and 8
        units; if `batched`, that a column's bound does not depend on the other columns.
    """
    check_choice("laws", laws, tuple(LAWS))
    run = upper_bound if batched else _each(upper_bound)
    generator = as_generator(rng)
    findings = []
    for law, n, mean, delta in itertools.product(LAWS[laws], sizes, means, deltas):
        upper = run(law.draw(generator, (n, replicates), mean), delta)
        limit = violation_limit(replicates, delta, confidence=confidence)
        found = int(np.count_nonzero(upper < mean - 1e-12))
        label = f"miscoverage, {law.name}, n={n}, mean={mean:g}, delta={delta:g}"
        findings.append(Finding(label, found <= limit, found / replicates, limit / replicates))
    cases = itertools.product(ENUMERATED[:2], means, deltas)
    findings += [enumerated_bound(run, n, mean, delta) for n, mean, delta in cases]
    if batched:
        findings.append(columns_apart(run, 0.1))
    return ConformanceReport(name, tuple(findings))


def violations(
    control: Control,
    scenario: Scenario,
    *,
    n_units: int,
    risk: float,
    delta: float,
    replicates: int,
    rng: Rng = None,
) -> int:
    """Return how often `control` returned a column whose true risk exceeds the promise.

    Parameters
    ----------
    control : callable
        `control(losses, risk, delta) -> column or None`, losses [n_units, n_columns], or
        [n_units, n_tokens, n_columns] for scenarios whose units have parts.
    scenario : Scenario
        Law of the losses with known true risk of every column.
    n_units, risk, delta, replicates, rng
        Size of each calibration, the promise, the number of calibrations, the seed.
    """
    generator = as_generator(rng)
    truth = scenario.true_risks(risk)
    wrong = 0
    for _ in range(replicates):
        index = control(scenario.draw(generator, n_units, risk), risk, delta)
        wrong += index is not None and bool(truth[index] > risk * (1.0 + 1e-12))
    return wrong


def check_control(
    control: Control,
    *,
    name: str = "control",
    scenarios: Sequence[Scenario] = SCENARIOS,
    settings: Sequence[tuple[int, float, float]] = ((100, 0.1, 0.1), (300, 0.05, 0.05)),
    replicates: int = 2000,
    confidence: float = 0.999,
    rng: Rng = None,
) -> ConformanceReport:
    """Check a calibration `control(losses, risk, delta) -> column or None` end to end.

    Parameters
    ----------
    control : callable
        As in `violations`.
    scenarios : sequence of Scenario
        Laws of losses along a path of configurations, column 0 without loss.
    settings : sequence of (n_units, risk, delta)
        Promises to test.
    replicates, confidence, rng
        As in `check_p_value`.

    Returns
    -------
    ConformanceReport
        One finding per scenario and setting: the share of calibrations that break the promise;
        the exact probability of it for one column just above the promise, by enumeration of all
        0/1 samples of 10 units; and that losses of 1 throughout certify nothing.
    """
    generator = as_generator(rng)
    findings: list[Finding] = []
    if any(scenario.tokens == 1 for scenario in scenarios):
        findings += [
            nothing_for_total_loss(control),
            enumerated_control(control, n=10, risk=0.3, delta=0.1),
        ]
    for scenario, (n, risk, delta) in itertools.product(scenarios, settings):
        wrong = violations(
            control,
            scenario,
            n_units=n,
            risk=risk,
            delta=delta,
            replicates=replicates,
            rng=generator,
        )
        limit = violation_limit(replicates, delta, confidence=confidence)
        label = f"{scenario.name}, n={n}, risk={risk:g}, delta={delta:g}"
        findings.append(Finding(label, wrong <= limit, wrong / replicates, limit / replicates))
    return ConformanceReport(name, tuple(findings))


def _each(function: Callable[[Array, float], Any]) -> Callable[[Array, float], Array]:
    def run(losses: Array, argument: float) -> Array:
        values = [float(function(column, argument)) for column in losses.T.copy()]
        return np.array(values)

    return run
