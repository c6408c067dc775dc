"""Checks that need no simulation: small samples completely, and relations every method obeys."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Run = Callable[[Array, float], Array]
Control = Callable[[Array, float, float], int | None]
ENUMERATED = (4, 8, 12)


@dataclass(frozen=True)
class Finding:
    """One check: what was asked, what was found, the limit, and whether it holds.

    Parameters
    ----------
    check : str
        What was asked.
    passed : bool
    found, limit : float
        What was found, and the largest that passes.
    detail : str
        What the figures are, where the check does not say so.
    """

    check: str
    passed: bool
    found: float
    limit: float
    detail: str = ""


def _all_samples(n: int, level: float) -> tuple[Array, Array]:
    """Return all 0/1 samples [n, 2**n] and their probabilities at an error rate."""
    samples = np.array(list(itertools.product((0.0, 1.0), repeat=n))).T
    return samples, np.prod(np.where(samples == 1.0, level, 1.0 - level), axis=0)


def enumerated(run: Run, n: int, level: float) -> Finding:
    """Exact type-I error over all 0/1 samples, at every attainable delta."""
    samples, mass = _all_samples(n, level)
    p = np.asarray(run(samples, level), dtype=np.float64)
    order = np.argsort(p)
    ends = np.append(np.diff(p[order]) > 1e-12, True)
    excess = np.max((np.cumsum(mass[order]) - p[order])[ends])
    return Finding(
        f"enumeration of all 0/1 samples, n={n}, level={level:g}",
        bool(excess <= 1e-9),
        float(excess),
        0.0,
        "largest P(p <= d) - d over attainable d",
    )


def enumerated_bound(run: Run, n: int, mean: float, delta: float) -> Finding:
    """Exact miscoverage over all 0/1 samples."""
    samples, mass = _all_samples(n, mean)
    missed = float(mass[~(run(samples, delta) >= mean - 1e-12)].sum())
    label = f"enumeration of all 0/1 samples, n={n}, mean={mean:g}, delta={delta:g}"
    return Finding(label, missed <= delta + 1e-9, missed, delta, "exact miscoverage")


def enumerated_control(control: Control, *, n: int, risk: float, delta: float) -> Finding:
    """Exact chance of certifying one column whose risk is the promise itself."""
    samples, mass = _all_samples(n, risk)
    zero = np.zeros(n)
    wrong = [bool(control(np.stack([zero, s], axis=1), risk, delta)) for s in samples.T]
    error = float(mass[wrong].sum())
    label = f"enumeration of all 0/1 samples, n={n}, risk={risk:g}, delta={delta:g}"
    return Finding(
        label, error <= delta + 1e-9, error, delta, "exact chance of a false certificate"
    )


def nothing_for_total_loss(control: Control) -> Finding:
    """Losses of 1 in every column but the first."""
    losses = np.ones((200, 4))
    losses[:, 0] = 0.0
    found = float(control(losses, 0.1, 0.1) or 0)
    return Finding("losses of 1 throughout certify nothing", found == 0.0, found, 0.0)


def columns_apart(run: Run, argument: float) -> Finding:
    """Compare columns, some without loss, some with nothing else, with each of them alone."""
    table = (np.random.default_rng(8).random((40, 8)) < np.linspace(0.0, 1.0, 8)).astype(float)
    table = table[:, [7, 0, 3, 3, 1, 6, 2, 7]]
    alone = np.concatenate([np.atleast_1d(run(c[:, None], argument)) for c in table.T])
    gap = np.abs(np.asarray(run(table, argument), dtype=np.float64) - alone)
    return _none_above("a column's answer does not depend on other columns", gap)


def relations(run: Run, ordered: bool) -> list[Finding]:
    """Relations between samples; those that an order of units spoils only if `ordered` is false."""
    rng = np.random.default_rng(7)
    base = (rng.random((40, 50)) < 0.1).astype(np.float64)
    p = run(base, 0.25)
    findings = [
        _none_above("p is a number in [0, 1]", np.where((p >= 0) & (p <= 1 + 1e-12), 0.0, 1.0)),
        _none_above(
            "no evidence from a sample without any success (p = 1 up to slack)",
            0.99 - run(np.ones((40, 1)), 0.25),
        ),
        _none_above("the same at level 0.5", 0.5 - run(np.ones((40, 1)), 0.5)),
    ]
    if not ordered:
        shuffled = rng.permuted(base, axis=0)
        longer = np.vstack([base, np.zeros((1, base.shape[1]))])
        findings += [
            _none_above("a higher level never raises p", run(base, 0.3) - p),
            _none_above("the order of the units is irrelevant", np.abs(run(shuffled, 0.25) - p)),
            _none_above("one more unit without loss never raises p", run(longer, 0.25) - p),
        ]
    return findings


def _none_above(check: str, excess: Array) -> Finding:
    worst = float(np.nan_to_num(np.max(excess), nan=np.inf))
    return Finding(check, worst <= 1e-9, worst, 0.0)
