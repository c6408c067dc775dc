"""Budgets: EERO's rates, the quantiles that spend them, other allocators, the two certificates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from adaptive.calibration import (
    InvalidArgumentError,
    Trace,
    control_risk,
    exit_rate_rank,
    marginal_thresholds,
    survivor_thresholds,
)
from adaptive.calibration.conformance import violation_limit
from adaptive.policies import (
    ThresholdTable,
    budget_certificate,
    budget_thresholds,
    exit_stages,
    exponential_weights,
    geometric_allocation,
    geometric_rates,
    inflated_thresholds,
    linear_programme,
    mean_cost_bound,
    two_stage_allocation,
    unit_costs,
    unit_losses,
)

RISKS, COSTS = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("budget", "rates", "price"),
    [
        (2.0, (0.108998, 0.836503, 0.054499), 0.090758),
        (3.0, (0.015375, 0.476938, 0.507687), 0.034887),
    ],
)
def test_eero_known_answers(budget: float, rates: tuple[float, ...], price: float) -> None:
    found = exponential_weights(RISKS, COSTS, budget)
    np.testing.assert_allclose(found, rates, atol=1e-6)
    assert found @ COSTS == pytest.approx(budget)
    prior = (1 / COSTS) / (1 / COSTS).sum()
    tilted = prior * np.exp(-(RISKS + price * COSTS) / 0.04)
    np.testing.assert_allclose(found, tilted / tilted.sum(), atol=5e-5)


def test_eero_slack_budget() -> None:
    found = exponential_weights(RISKS, COSTS, 4.0)
    assert found @ COSTS == pytest.approx(3.7128, abs=1e-4)


def test_eero_solves_its_programme() -> None:
    prior = (1 / COSTS) / (1 / COSTS).sum()

    def objective(eps: np.ndarray) -> float:
        safe = np.maximum(eps, 1e-12)
        return float(eps @ RISKS + 0.04 * (safe * np.log(safe / prior)).sum())

    for budget in (1.5, 2.0, 3.0):
        solved = optimize.minimize(
            objective,
            prior,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints=[
                {"type": "eq", "fun": lambda e: e.sum() - 1},
                {"type": "ineq", "fun": lambda e, b=budget: b - e @ COSTS},
            ],
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found = exponential_weights(RISKS, COSTS, budget)
        assert objective(found) <= solved.fun + 1e-8
        # released halting code swaps the arguments of the divergence: another optimum
        swapped = optimize.minimize(
            lambda e: float(
                e @ RISKS + 0.04 * (prior * np.log(prior / np.maximum(e, 1e-12))).sum()
            ),
            prior,
            method="SLSQP",
            bounds=[(1e-9, 1)] * 3,
            constraints=[
                {"type": "eq", "fun": lambda e: e.sum() - 1},
                {"type": "ineq", "fun": lambda e, b=budget: b - e @ COSTS},
            ],
        )
        assert np.abs(swapped.x - found).max() > 0.01
        np.testing.assert_allclose(found, solved.x, atol=1e-4)


def test_eero_limits() -> None:
    np.testing.assert_allclose(
        exponential_weights(RISKS, COSTS, 3.0, temperature=1e-4),
        linear_programme(RISKS, COSTS, 3.0),
        atol=1e-2,
    )
    prior = (1 / COSTS) / (1 / COSTS).sum()
    hot = exponential_weights(RISKS, COSTS, 2.5, temperature=1e6)
    np.testing.assert_allclose(hot, prior, atol=1e-5)
    tight = exponential_weights(RISKS, COSTS, 1.5, temperature=1e6)  # the risks no longer count
    np.testing.assert_allclose(tight @ COSTS, 1.5)
    tilt = np.log(tight / prior)
    assert np.diff(tilt)[1] / np.diff(tilt)[0] == pytest.approx(2.0, rel=1e-4)  # as costs do
    shifted = exponential_weights(RISKS - 0.2, COSTS, 2.0)
    np.testing.assert_allclose(shifted, exponential_weights(RISKS, COSTS, 2.0), atol=1e-9)


def test_other_allocators() -> None:
    np.testing.assert_allclose(geometric_rates(0.5, 4), [0.5333, 0.2667, 0.1333, 0.0667], atol=5e-5)
    assert two_stage_allocation([0.3, 0.0], [1.0, 4.0], 2.5).tolist() == [0.5, 0.5]
    assert two_stage_allocation([0.3, 0.0], [1.0, 4.0], 9.0).tolist() == [0.0, 1.0]
    for budget in (1.2, 2.0, 3.5):
        rates = geometric_allocation(RISKS, COSTS, budget)
        assert rates @ COSTS == pytest.approx(budget)
        least = linear_programme(RISKS, COSTS, budget)
        assert least @ COSTS <= budget + 1e-9
        assert least @ RISKS <= exponential_weights(RISKS, COSTS, budget) @ RISKS + 1e-9
    assert geometric_allocation(RISKS, COSTS, 5.0).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "allocate",
    [exponential_weights, linear_programme, geometric_allocation],
)
def test_infeasible_budgets_are_refused_with_the_range(allocate) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"`budget` must be in \(1, 4\] or above, got 0.9"
    ):
        allocate(RISKS, COSTS, 0.9)


def scores_of(n: int, correlation: float, *, exits: int = 7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1))
    noise = rng.normal(size=(n, exits))
    return math.sqrt(correlation) * common + math.sqrt(1 - correlation) * noise


def trace_of(scores: np.ndarray, wrong: np.ndarray | None = None) -> Trace:
    n, exits = scores.shape
    return Trace(
        scores=scores,
        losses={"disagreement": np.zeros((n, exits)) if wrong is None else wrong},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
    )


@pytest.mark.parametrize(
    ("correlation", "conservative", "exact"),
    [(0.0, 3.28, 4.46), (0.25, 3.43, 4.39), (0.81, 4.23, 4.49)],
)
def test_eight_heads(correlation: float, conservative: float, exact: float) -> None:
    """EERO as published wastes budget; re-calibrated on the survivors it is spent."""
    rates = np.full(7, 1 / 8)
    spent: dict[str, list[float]] = {"marginal": [], "survivors": []}
    for seed in range(10):
        fit, fresh = (scores_of(2000, correlation, seed=2 * seed + k) for k in (0, 1))
        for name, quantiles in (
            ("marginal", marginal_thresholds),
            ("survivors", survivor_thresholds),
        ):
            row = tuple(quantiles(fit, rates).tolist())
            rule = ThresholdTable((4.5,), (row,), 4.5)
            trace = trace_of(fresh)
            spent[name].append(float(unit_costs(exit_stages(rule, trace), trace).mean()))
    assert np.mean(spent["marginal"]) == pytest.approx(conservative, abs=0.13)
    assert np.mean(spent["survivors"]) == pytest.approx(exact, abs=0.13)
    assert np.mean(spent["marginal"]) < 4.5


def test_conformal_rank() -> None:
    """N = 200, eps = .3: rank 140, expected share that goes on .69652 <= .7."""
    assert exit_rate_rank(200, 0.3) == 140
    rng = np.random.default_rng(0)
    going_on = []
    for _ in range(3000):
        threshold = marginal_thresholds(rng.uniform(size=(200, 1)), [0.3])[0]
        going_on.append(threshold)
    assert np.mean(going_on) == pytest.approx(140 / 201, abs=3e-3)


def test_inflated_thresholds_are_the_published_rule() -> None:
    """Exit iff F(score) >= 1 - eps - C / sqrt(N); inflated by sqrt(2 pi) nobody is kept short."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(400, 2))
    rates = np.array([0.2, 0.3])
    for inflation in (0.0, math.sqrt(2 * math.pi)):
        thresholds = inflated_thresholds(scores, rates, inflation=inflation)
        for exit, total in enumerate((0.2, 0.5)):
            share = (scores[:, exit][:, None] >= scores[:, exit][None, :]).mean(axis=1)
            published = share >= 1 - total - inflation / 20 - 1e-12
            assert ((scores[:, exit] >= thresholds[exit]) == published).all()
    going_on = [
        float(inflated_thresholds(rng.uniform(size=(100, 1)), [0.3])[0]) for _ in range(500)
    ]
    assert np.mean(going_on) <= 0.7


def test_dynamic_perceiver_counts() -> None:
    """q = (8, 4, 2, 1) / 15 and distinct scores: the realised counts are floor(n q) exactly."""
    n = 150
    scores = np.random.default_rng(0).permutation(3 * n).reshape(n, 3).astype(float)
    rates = np.array([8, 4, 2, 1]) / 15
    row = tuple(survivor_thresholds(scores, rates[:-1]).tolist())
    stages = exit_stages(ThresholdTable((1.0,), (row,), 1.0), trace_of(scores))
    assert np.bincount(stages, minlength=4).tolist() == [80, 40, 20, 10]


def test_budgets_are_kept_on_fresh_traffic_and_certified() -> None:
    fit, fresh = (trace_of(scores_of(3000, 0.5, seed=seed)) for seed in (0, 1))
    table = budget_thresholds(fit, budgets=(7.0, 5.0, 3.0), allocate=geometric_allocation)
    assert table.nested
    assert table.knobs(fit, size=10) == (math.inf, 7.0, 5.0, 3.0)
    for budget in (7.0, 5.0, 3.0):
        stages = exit_stages(table.with_knob(budget), fresh)
        assert unit_costs(stages, fresh).mean() <= budget
        assert unit_costs(stages, fresh).mean() <= mean_cost_bound(stages, fresh, delta=0.05)
        assert mean_cost_bound(stages, fresh, delta=0.05) <= budget + 0.1


def test_the_bound_of_a_mean_cost_counts_clusters() -> None:
    """Twenty clusters of twenty equal units: as four hundred units they would promise too much."""
    rng, trials, truth = np.random.default_rng(5), 400, 2.5
    names = np.repeat(np.arange(20), 20)
    broken = np.zeros(2)
    for _ in range(trials):
        stages = np.repeat(rng.integers(0, 2, size=20), 20)
        grouped = Trace(
            scores=np.full((400, 1), 0.5),
            losses={"disagreement": np.zeros((400, 1), dtype=bool)},
            costs=[1.0, 4.0],
            cost_quantity="layers",
            groups=names,
        )
        for place, trace in enumerate((grouped, replace(grouped, groups=None))):
            broken[place] += mean_cost_bound(stages, trace, delta=0.1) < truth
    assert broken[0] <= violation_limit(trials, 0.1) < broken[1]


def test_routed_risk_is_not_the_mixture_of_the_risks() -> None:
    """R = (.5, .2), half stops, but the confident half of the head is all wrong: .6, not .35."""
    rng = np.random.default_rng(0)
    n = 4000
    scores = rng.uniform(size=(n, 1))
    wrong = np.concatenate([scores >= 0.5, rng.uniform(size=(n, 1)) < 0.2], axis=1)
    rates = np.array([0.5, 0.5])
    bound = float(rates @ wrong.mean(axis=0))
    threshold = float(marginal_thresholds(scores, [0.5])[0])
    routed = np.where(scores[:, 0] >= threshold, wrong[:, 0], wrong[:, 1])
    assert bound == pytest.approx(0.35, abs=0.02)
    assert routed.mean() == pytest.approx(0.6, abs=0.02)
    trace = trace_of(scores, wrong[:, :1])
    table = ThresholdTable((1.5,), ((threshold,),))
    losses = np.stack(
        [
            unit_losses(exit_stages(table.with_knob(k), trace), trace)
            for k in table.knobs(trace, size=2)
        ],
        axis=1,
    )
    assert control_risk(losses, risk=0.4, delta=0.1, loss_type="binary").index in (None, 0)


def test_two_certificates_are_two_statements() -> None:
    rng = np.random.default_rng(3)
    scores = scores_of(3000, 0.5, seed=3)
    wrong = rng.uniform(size=scores.shape) < stats.norm.sf(scores + 1.0)
    fit, test = trace_of(scores[:1500], wrong[:1500]), trace_of(scores[1500:], wrong[1500:])
    table = budget_thresholds(fit, budgets=(7.0, 6.0, 5.0, 4.0))
    knobs = table.knobs(fit, size=5)
    stages = [exit_stages(table.with_knob(knob), test) for knob in knobs]
    losses = np.stack([unit_losses(stage, test) for stage in stages], axis=1)
    result = control_risk(losses, risk=0.2, delta=0.05, loss_type="binary")
    assert result.index is not None
    spent = [mean_cost_bound(stage, test, delta=0.05) for stage in stages[1:]]
    assert all(bound <= knob + 0.2 for bound, knob in zip(spent, knobs[1:], strict=True))


def test_a_budget_has_a_certificate_of_its_own() -> None:
    fit, fresh = (trace_of(scores_of(3000, 0.5, seed=seed)) for seed in (0, 1))
    table = budget_thresholds(fit, budgets=(7.0, 5.0, 3.0), allocate=geometric_allocation)
    stages = exit_stages(table.with_knob(5.0), fresh)
    certificate = budget_certificate(stages, fresh, budget=5.0, delta=0.05)
    assert certificate.holds
    assert certificate.risk == pytest.approx(5.0 / 8.0)
    assert certificate.loss == "cost per token as a share of full computation (layers)"
    assert certificate.n == 3000
    assert not budget_certificate(stages, fresh, budget=3.0, delta=0.05).holds
    for budget in (0.9, 8.0):
        with pytest.raises(InvalidArgumentError, match=r"`budget` must be in \[1, 8\)"):
            budget_certificate(stages, fresh, budget=budget, delta=0.05)


@pytest.mark.statistical
def test_a_budget_is_certified_wrongly_at_most_with_delta() -> None:
    """At a mean cost just above the budget; comparing the mean with it errs half the time."""
    rng, replicates, delta = np.random.default_rng(4), 1000, 0.1
    limit = stats.binom.ppf(0.999, replicates, delta)
    certified = naive = 0
    scores = np.array([[0.1]] * 60)
    for _ in range(replicates):
        trace = trace_of(scores)
        stages = rng.binomial(1, 0.501, 60)  # costs 1 or 2, mean 1.501
        certified += budget_certificate(stages, trace, budget=1.5, delta=delta).holds
        naive += unit_costs(stages, trace).mean() <= 1.5
    assert certified <= limit
    assert naive > limit


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: exponential_weights(RISKS, COSTS, 2.0, temperature=0.0), "temperature"),
        (lambda: exponential_weights(RISKS, COSTS, 2.0, prior=[1.0, 0.0, 1.0]), "prior"),
        (lambda: exponential_weights(RISKS[:2], COSTS, 2.0), "risks"),
        (lambda: exponential_weights(RISKS, COSTS[::-1], 2.0), "costs"),
        (lambda: two_stage_allocation(RISKS, COSTS, 2.0), "costs"),
        (lambda: geometric_rates(0.0, 3), "ratio"),
        (lambda: inflated_thresholds(np.ones((2, 1)), [0.5], inflation=-1.0), "inflation"),
        (lambda: ThresholdTable((1.0, 2.0), ((0.0,), (0.0,))), "levels"),
        (lambda: ThresholdTable((2.0, 1.0), ((0.0,),)), "thresholds"),
        (lambda: ThresholdTable((2.0,), ((math.nan,),)), "thresholds"),
        (lambda: ThresholdTable((2.0,), ((0.0,),), level=1.0), "level"),
        (lambda: unit_losses([0], trace_of(np.ones((1, 1))), loss="error"), "loss"),
        (lambda: unit_costs([0, 0], trace_of(np.ones((1, 1)))), "stages"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
