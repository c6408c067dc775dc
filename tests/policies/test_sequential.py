"""Sequential tests across stages, and optimal stopping."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import (
    EvidenceProcess,
    OptimalStopping,
    SequentialRatio,
    exit_stages,
    oracle_stages,
    regret,
    wald_boundaries,
)

STAGES = 30


def gaussian_trace(n: int, *, seed: int = 0, shift: float = 0.5, exits: int = STAGES) -> Trace:
    """Tokens agree everywhere or nowhere; scores are independent N(+-shift, 1)."""
    rng = np.random.default_rng(seed)
    agree = rng.uniform(size=n) < 0.5
    scores = rng.normal(size=(n, exits)) + np.where(agree, shift, -shift)[:, None]
    return Trace(
        scores=scores,
        losses={"disagreement": np.repeat(~agree[:, None], exits, axis=1)},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
    )


def test_wald_boundaries() -> None:
    upper, lower = wald_boundaries(0.05, 0.1)
    assert upper == pytest.approx(math.log(0.9 / 0.05))
    assert lower == pytest.approx(math.log(0.1 / 0.95))
    with pytest.raises(InvalidArgumentError, match="`beta`"):
        wald_boundaries(0.1, 0.0)


def test_sprt_keeps_its_error_budget_on_independent_stages() -> None:
    fit, fresh = gaussian_trace(20_000), gaussian_trace(20_000, seed=1)
    upper, lower = wald_boundaries(0.05, 0.1)
    rule = replace(SequentialRatio.fit(fit, n_bins=24), threshold=upper, give_up=lower)
    stages = exit_stages(rule, fresh)
    wrong = fresh.losses["disagreement"][:, 0]
    stopped = stages < STAGES
    assert stopped[wrong].mean() <= 0.05 + 0.01
    assert (~stopped[~wrong]).mean() <= 0.1 + 0.02
    assert stages[stopped].mean() < 12


def test_log_ratios_are_those_of_the_laws() -> None:
    """Two unit normals at +-1/2: the log-likelihood ratio is the score itself."""
    rule = SequentialRatio.fit(gaussian_trace(60_000, exits=1), n_bins=12)
    centres = (np.array(rule.edges[0][:-1]) + np.array(rule.edges[0][1:])) / 2
    np.testing.assert_allclose(rule.log_ratios[0][1:-1], centres, atol=0.12)


def test_giving_up_is_for_good() -> None:
    rule = SequentialRatio(
        edges=((0.0,),) * 3, log_ratios=((-2.0, 3.0),) * 3, threshold=1.0, give_up=-2.0
    )
    scores = np.array([[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    trace = Trace(
        scores=scores,
        losses={"disagreement": np.zeros((2, 3))},
        costs=[1.0, 2.0, 3.0, 4.0],
        cost_quantity="layers",
    )
    assert exit_stages(rule, trace).tolist() == [3, 0]
    assert exit_stages(replace(rule, give_up=-math.inf), trace).tolist() == [1, 0]


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_evidence_keeps_its_budget_under_any_dependence(correlation: float) -> None:
    """A disagreeing token stops early with probability at most 1 / threshold."""

    def draw(seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        n, exits = 20_000, 6
        agree = rng.uniform(size=n) < 0.5
        noise = math.sqrt(correlation) * rng.normal(size=(n, 1)) + math.sqrt(
            1 - correlation
        ) * rng.normal(size=(n, exits))
        return Trace(
            scores=noise + np.where(agree, 1.5, 0.0)[:, None],
            losses={"disagreement": np.repeat(~agree[:, None], exits, axis=1)},
            costs=np.arange(1.0, exits + 2),
            cost_quantity="layers",
        )

    fresh = draw(1)
    wrong = fresh.losses["disagreement"][:, 0]
    fitted = EvidenceProcess.fit(draw(0))
    for budget in (0.2, 0.05):
        stopped = exit_stages(fitted.with_knob(1 / budget), fresh) < 6
        limit = stats.binom.ppf(0.999, wrong.sum(), budget) / wrong.sum()
        assert stopped[wrong].mean() <= limit
    assert (exit_stages(fitted.with_knob(5.0), fresh) < 6)[~wrong].mean() > 0.2


def chain_trace(n: int, *, seed: int = 0, exits: int = 3) -> Trace:
    """A score that walks on four levels; the chance of disagreeing falls with it."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 4, n)
    scores, wrong = [], []
    for _ in range(exits):
        scores.append(level.astype(float))
        wrong.append(rng.uniform(size=n) < np.array([0.8, 0.5, 0.2, 0.02])[level])
        level = np.clip(level + rng.integers(-1, 3, n), 0, 3)
    return Trace(
        scores=np.stack(scores, axis=1),
        losses={"disagreement": np.stack(wrong, axis=1)},
        costs=np.array([1.0, 2.0, 3.0, 4.0]),
        cost_quantity="layers",
    )


@pytest.mark.parametrize("price", [1.0, 4.0, 20.0])
def test_backward_induction_beats_every_plan_by_levels(price: float) -> None:
    """Put back: on a chain no assignment of stop or go to (stage, level) is cheaper."""
    fit = chain_trace(40_000)
    rule = OptimalStopping.fit(fit, n_bins=16).with_knob(price)
    fresh = chain_trace(40_000, seed=1)

    def paid(stages: np.ndarray) -> float:
        harm = np.concatenate([fresh.losses["disagreement"], np.zeros((40_000, 1))], axis=1)
        return float((price * harm[np.arange(40_000), stages] + fresh.costs[stages]).mean())

    ours = paid(exit_stages(rule, fresh))
    best = math.inf
    for plan in itertools.product(range(5), repeat=3):
        stages = np.full(40_000, 3)
        for stage in (2, 1, 0):
            stages = np.where(fresh.scores[:, stage] >= plan[stage], stage, stages)
        best = min(best, paid(stages))
    assert ours <= best + 0.03
    assert ours >= paid(oracle_stages(fresh, price=price))
    regrets = regret(exit_stages(rule, fresh), fresh, price=price)
    assert regrets.min() >= 0.0
    assert regrets.mean() == pytest.approx(ours - paid(oracle_stages(fresh, price=price)))


def test_plan_at_the_extremes() -> None:
    rule = OptimalStopping.fit(chain_trace(2000))
    assert rule.with_knob(0.0).plan().all()
    assert not rule.plan().any()
    assert not rule.nested


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequentialRatio(((0.0,),), ((1.0,),)), "edges"),
        (lambda: SequentialRatio.fit(gaussian_trace(50), n_bins=1), "n_bins"),
        (lambda: EvidenceProcess((), ()), "edges"),
        (lambda: OptimalStopping.fit(chain_trace(50), n_bins=1), "n_bins"),
        (lambda: OptimalStopping.fit(chain_trace(50)).with_knob(-1.0), "price"),
        (lambda: oracle_stages(chain_trace(50), price=-1.0), "price"),
        (lambda: regret(np.zeros(50), chain_trace(50), price=math.inf), "price"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
