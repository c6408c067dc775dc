"""Target agreement per exit: the optimistic published form, the certified one, temperatures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.calibration.conformance import violation_limit
from adaptive.policies import agreement_thresholds, certified_agreement_thresholds, exit_stages


def trace_of(scores: np.ndarray, wrong: np.ndarray, *, per_unit: int = 1) -> Trace:
    n, exits = scores.shape
    return Trace(
        scores=scores,
        losses={"disagreement": wrong},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
        lengths=np.full(n // per_unit, per_unit),
    )


def noise(seed: int, *, n: int = 1000, per_unit: int = 1) -> Trace:
    """Scores that say nothing; agreement one half everywhere."""
    rng = np.random.default_rng(seed)
    return trace_of(rng.uniform(size=(n, 1)), rng.uniform(size=(n, 1)) < 0.5, per_unit=per_unit)


def test_largest_excursion() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    wrong = np.array([[False], [True], [False], [False], [True]])
    table = agreement_thresholds(trace_of(scores, wrong), targets=(0.9, 0.75, 0.6))
    assert [row[0] for row in table.thresholds] == pytest.approx([0.9, 0.6, 0.5])
    ties = agreement_thresholds(trace_of(np.full((5, 1), 0.5), wrong), targets=(0.9, 0.6))
    assert [row[0] for row in ties.thresholds] == [math.inf, 0.5]


def test_noise_meets_the_target_falsely_and_is_never_certified() -> None:
    falsely, certified = 0, 0
    for seed in range(200):
        falsely += math.isfinite(agreement_thresholds(noise(seed), targets=(0.6,)).thresholds[0][0])
        strict = certified_agreement_thresholds(noise(seed), targets=(0.6,), delta=0.05)
        certified += math.isfinite(strict.thresholds[0][0])
        if not math.isfinite(strict.thresholds[0][0]):
            assert (exit_stages(strict.with_knob(0.6), noise(seed)) == 1).all()
    assert falsely > 100
    assert certified <= 5


@pytest.mark.parametrize("per_unit", [1, 5])
def test_certified_thresholds_keep_the_target(per_unit: int) -> None:
    rng = np.random.default_rng(0)
    violations = certified = 0
    for _ in range(100):
        scores = rng.uniform(size=(2000, 2))
        wrong = rng.uniform(size=(2000, 2)) < 0.5 * (1 - scores)
        table = certified_agreement_thresholds(
            trace_of(scores, wrong, per_unit=per_unit), targets=(0.85,), delta=0.1
        )
        for threshold in table.thresholds[0]:
            if math.isfinite(threshold):
                certified += 1
                agreement = 1 - 0.25 * (1 - threshold)  # mean of 1 - (1 - s) / 2 above it
                violations += agreement < 0.85
    assert certified > 100
    assert violations <= 100 * 0.1 + 9


def test_a_target_is_certified_by_clusters() -> None:
    """Twenty clusters of twenty equal units, right seven times in ten: a target just above."""
    rng, trials = np.random.default_rng(1), 400
    broken = np.zeros(2)
    for _ in range(trials):
        wrong = np.repeat(rng.random(20) < 0.3, 20)[:, None]
        grouped = replace(
            trace_of(np.full((400, 1), 0.9), wrong), groups=np.repeat(np.arange(20), 20)
        )
        for place, trace in enumerate((grouped, replace(grouped, groups=None))):
            table = certified_agreement_thresholds(
                trace, targets=(0.7001,), delta=0.1, n_candidates=1
            )
            broken[place] += math.isfinite(table.thresholds[0][0])
    assert broken[0] <= violation_limit(trials, 0.1) < broken[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: agreement_thresholds(noise(0), targets=()), "targets"),
        (lambda: agreement_thresholds(noise(0), targets=(0.5, 0.9)), "targets"),
        (
            lambda: certified_agreement_thresholds(noise(0), targets=(0.5,), delta=0.0),
            "delta",
        ),
        (
            lambda: certified_agreement_thresholds(
                noise(0), targets=(0.5,), delta=0.1, n_candidates=0
            ),
            "n_candidates",
        ),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
