"""Guarantees outside the one door: each holds within its exact binomial limit, and a slightly wrong
variant of each fails the very same check."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import (
    SPRT,
    BettingSequence,
    ConditionalValueAtRisk,
    EmpiricalBernsteinSequence,
    IntervalMean,
    MeanEProcess,
    Quantile,
    Trace,
    Verdict,
    berk_jones_levels,
    binomial_log_p,
    binomial_upper_bound,
    certify_halting,
    conformal_risk_control,
    consistency_threshold,
    control_sequentially,
    dkw_levels,
    exit_rate_rank,
    exit_rate_threshold,
    prediction_powered_losses,
    quantile_rank,
    shifted_losses,
    thin_by_weights,
    truncated_sprt,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration.conformance import violation_limit

pytestmark = pytest.mark.statistical


def keeps(violations, delta):
    """Whether a 0/1 sequence of violations is compatible with a rate of at most delta."""
    violations = np.asarray(violations)
    return int(violations.sum()) <= violation_limit(violations.size, delta)


def test_conformal_control_keeps_the_expected_loss_and_needs_its_correction(rng):
    grid = np.linspace(0.0, 1.0, 401)
    ours, uncorrected = [], []
    for _ in range(6000):
        fails_below = rng.random(20)
        losses = (fails_below[:, None] < grid).astype(float)
        fresh = rng.random()
        result = conformal_risk_control(losses, risk=0.1)
        naive = np.flatnonzero(losses.mean(axis=0) > 0.1)[0] - 1
        ours.append(fresh < grid[result.index])
        uncorrected.append(fresh < grid[naive])
    assert keeps(ours, 0.1)
    assert not keeps(uncorrected, 0.1)


def test_the_last_passing_column_of_a_flat_risk_breaks_the_promise(rng):
    ours, last_passing = [], []
    for _ in range(3000):
        losses = (rng.random((100, 50)) < 0.13).astype(float)
        fresh = rng.random() < 0.13
        result = conformal_risk_control(losses, risk=0.1, monotonise=True)
        ours.append(fresh and result.index is not None)
        passing = np.flatnonzero((losses.sum(axis=0) + 1) / 101 <= 0.1)
        last_passing.append(fresh and passing.size > 0)
    assert keeps(ours, 0.1)
    assert not keeps(last_passing, 0.1)


def test_exit_rates_hold_in_expectation_and_one_rank_more_does_not(rng):
    scores, fresh = rng.random((20_000, 10)), rng.random(20_000)
    rank = exit_rate_rank(10, 0.3)
    ordered = np.sort(scores, axis=1)
    assert exit_rate_threshold(scores[0], 0.3) == ordered[0, rank - 1]
    assert keeps(fresh < ordered[:, rank - 1], 0.7)
    assert not keeps(fresh < ordered[:, rank], 0.7)


def test_exit_rates_hold_with_probability_and_one_rank_more_does_not(rng):
    ordered = np.sort(rng.random((20_000, 50)), axis=1)
    rank = exit_rate_rank(50, 0.3, delta=0.1)
    assert keeps(ordered[:, rank - 1] > 0.7, 0.1)
    assert not keeps(ordered[:, rank] > 0.7, 0.1)


def test_departures_hold_in_expectation_and_one_rank_less_does_not(rng):
    ours, off_by_one = [], []
    for _ in range(4000):
        scores = rng.random((21, 2), dtype=np.float32)
        trace = Trace(
            scores=scores[:20],
            losses={"disagreement": [[True, False]] * 20},
            costs=[1, 2, 3],
            cost_quantity="s",
        )
        threshold = consistency_threshold(trace, risk=0.1)
        ours.append(scores[20, 0] >= threshold)
        off_by_one.append(scores[20, 0] > np.sort(scores[:20, 0])[math.ceil(20 * 0.9) - 1])
    assert keeps(ours, 0.1)
    assert not keeps(off_by_one, 0.1)


def test_halting_holds_given_the_stop_and_a_marginal_test_does_not(rng):
    ours, marginal = [], []
    for _ in range(3000):
        scores = rng.random((300, 2))
        losses = np.zeros((300, 2))
        losses[:, 0] = rng.random(300) < 0.1
        result = certify_halting(scores, losses, thresholds=[0.5, 0.5], risk=0.1, delta=0.1)
        ours.append(result.first_exit == 0)
        errors = int(losses[scores[:, 0] >= 0.5, 0].sum())
        marginal.append(binomial_log_p(errors, 300, risk=0.1) <= math.log(0.1))
    assert keeps(ours, 0.1)
    assert np.mean(ours) > 0.04
    assert not keeps(marginal, 0.1)


@pytest.mark.parametrize("first", [1, 91])
def test_bands_hold_at_all_ranks_and_pointwise_levels_do_not(rng, first):
    ordered = np.sort(rng.random((20_000, 100)), axis=1)
    ranks = np.arange(1, 101)
    pointwise = np.where(ranks >= first, stats.beta.ppf(0.1, ranks, 101 - ranks), 0.0)
    joint = berk_jones_levels(100, delta=0.1, first=first)
    assert keeps((ordered < joint).any(axis=1), 0.1)
    assert not keeps((ordered < pointwise).any(axis=1), 0.1)
    assert not keeps((ordered < joint * 1.03).any(axis=1), 0.1)
    assert keeps((ordered < dkw_levels(100, delta=0.1)).any(axis=1), 0.1)


def test_quantiles_are_covered_and_one_rank_less_does_not(rng):
    ordered = np.sort(rng.random((20_000, 100)), axis=1)
    rank = quantile_rank(100, 0.9, delta=0.1)
    assert keeps(ordered[:, rank - 1] < 0.9, 0.1)
    assert not keeps(ordered[:, rank - 2] < 0.9, 0.1)


def test_tail_means_are_covered_and_the_empirical_one_is_not(rng):
    law = stats.beta(0.5, 4.0)
    losses = law.rvs(size=(200, 4000), random_state=rng)
    grid = law.ppf((np.arange(200_000) + 0.5) / 200_000)
    for tail, low in ((ConditionalValueAtRisk(0.9), 0.9), (IntervalMean(0.0, 1.0), 0.0)):
        true = grid[int(low * grid.size) :].mean()
        assert keeps(tail.upper_bound(losses, delta=0.1) < true, 0.1)
        plain = np.sort(losses, axis=0)[int(low * 200) :].mean(axis=0)
        assert not keeps(plain < true, 0.1)
    assert keeps(Quantile(0.9).upper_bound(losses, delta=0.1) < law.ppf(0.9), 0.1)


def test_shifted_risk_is_tested_at_its_level_and_ignoring_the_shift_is_not(rng):
    rare = rng.random((400, 3000)) < 0.2
    losses = (rng.random(rare.shape) < np.where(rare, 0.18, 0.02)).astype(float)
    weights = np.where(rare, 2.5, 0.625)
    moved = np.stack(
        [
            shifted_losses(losses[:, j], weights=weights[:, j], risk=0.1, max_weight=2.5).losses[
                :, 0
            ]
            for j in range(3000)
        ],
        axis=1,
    )
    bound = 0.1 + 2.5 * 0.9
    target = math.log(0.1)
    assert keeps(wsr_log_p(moved, risk=0.1, delta=0.1, bound=bound) <= target, 0.1)
    assert not keeps(wsr_log_p(losses, risk=0.1, delta=0.1) <= target, 0.1)
    kept = [thin_by_weights(weights[:, j], max_weight=2.5, rng=rng) for j in range(3000)]
    errors = [int(losses[units, j].sum()) for j, units in enumerate(kept)]
    exact = binomial_log_p(errors, [units.size for units in kept], risk=0.1)
    assert keeps(exact <= target, 0.1)


def test_prediction_power_keeps_the_level_and_trusting_the_proxy_does_not(rng):
    proxy = (rng.random((200, 3000)) < 0.08).astype(float)
    graded = np.where(rng.random(proxy.shape) < 0.03 / 0.92, 1.0, 0.0) * (1 - proxy)
    graded += proxy * (rng.random(proxy.shape) < 0.875)
    plenty = (rng.random((2000, 3000)) < 0.08).astype(float)
    found = prediction_powered_losses(graded, proxy=proxy, proxy_plenty=plenty, power=0.5)
    target = math.log(0.1)
    assert graded.mean() == pytest.approx(0.1, abs=0.002)
    powered = wsr_log_p(found.losses, risk=0.1, delta=0.1, bound=found.bound)
    assert keeps(powered <= target, 0.1)
    part = found.losses[:, :1000]
    assert keeps(wsr_upper_bound(part, delta=0.1, bound=found.bound) < 0.1, 0.1)
    trusting = binomial_log_p(plenty.sum(axis=0).astype(int), 2000, risk=0.1)
    assert not keeps(trusting <= target, 0.1)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_e_processes_may_be_watched_forever_and_p_values_may_not(rng, rate):
    process = MeanEProcess(level=rate)
    state = process.init(3000)
    errors = np.zeros(3000, dtype=int)
    best_bet = np.zeros(3000)
    peeked = np.zeros(3000, dtype=bool)
    for unit in range(1, 601):
        losses = rng.random(3000) < rate
        state = process.update(state, losses.astype(float))
        errors += losses
        best_bet = np.maximum(best_bet, state.log_wealth.max(axis=1))
        peeked |= binomial_log_p(errors, unit, risk=rate) <= math.log(0.1)
    assert keeps(state.log_peak >= math.log(10), 0.1)
    assert not keeps(best_bet >= math.log(10), 0.1)
    assert not keeps(peeked, 0.1)


def test_sprt_error_rates_hold_and_swapped_boundaries_do_not(rng):
    sound = SPRT(null=0.5, alternative=0.7, alpha=0.1, beta=0.1)
    # A published self-consistency stop passes 1 - alpha for beta: its boundary is near zero.
    outcomes = rng.random((400, 5000)) < 0.5
    state = sound.init(5000)
    ratio, swapped = np.zeros(5000), np.zeros(5000, dtype=int)
    for row in outcomes.astype(int):
        state = sound.update(state, row)
        ratio += np.where(row == 1, math.log(1.4), math.log(0.6))
        swapped = np.where((swapped == 0) & (ratio >= math.log((1 - 0.9) / 0.1)), 1, swapped)
        swapped = np.where((swapped == 0) & (ratio <= math.log(0.1 / 0.9)), -1, swapped)
    assert keeps(state.decision == 1, 0.1)
    assert not keeps(swapped == 1, 0.1)
    truncated = truncated_sprt(0.5, 0.7, alpha=0.1, beta=0.1, max_units=40)
    late = truncated.init(5000)
    for row in outcomes[:40].astype(int):
        late = truncated.update(late, row)
    assert keeps(late.decision == 1, 0.1)


@pytest.mark.parametrize("kind", [EmpiricalBernsteinSequence, BettingSequence])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_sequences_hold_at_all_times_and_pointwise_limits_do_not(rng, kind, rate):
    sequence = kind(delta=0.1) if kind is EmpiricalBernsteinSequence else kind(delta=0.1, n_grid=99)
    streams = 1000
    state, missed = sequence.init(streams), np.zeros(streams, dtype=bool)
    pointwise, errors = np.zeros(streams, dtype=bool), np.zeros(streams, dtype=int)
    for unit in range(1, 301):
        values = rng.random(streams) < rate
        state = sequence.update(state, values.astype(float))
        lower, upper = sequence.interval(state)
        missed |= (lower > rate) | (upper < rate)
        errors += values
        pointwise |= binomial_upper_bound(errors, unit, delta=0.05) < rate
        pointwise |= 1 - binomial_upper_bound(unit - errors, unit, delta=0.05) > rate
    assert keeps(missed, 0.1)
    assert not keeps(pointwise, 0.1)


def test_sequential_control_keeps_delta_and_the_failing_column_does_not(rng):
    ours, first_failing = [], []
    for _ in range(1500):
        table = rng.random((300, 3)) < [0.0, 0.01, 0.1]
        result = control_sequentially(
            lambda column, first, last, table=table: table[first:last, column],
            n_columns=3,
            risk=0.1,
            delta=0.1,
            max_units=300,
            batch=50,
        )
        ours.append(result.index == 2)
        first_failing.append(result.records[-1].column == 2)
        assert result.records[0].verdict is Verdict.CERTIFIED
    assert keeps(ours, 0.1)
    assert np.mean(ours) > 0.03
    assert not keeps(first_failing, 0.1)


def test_futility_gives_up_few_columns_that_keep_the_promise(rng):
    given_up = []
    for _ in range(1500):
        losses = (rng.random(400) < 0.1).astype(float)
        result = control_sequentially(
            lambda _, first, last, losses=losses: losses[first:last],
            n_columns=2,
            risk=0.1,
            delta=0.05,
            max_units=400,
            batch=100,
            futility=0.1,
        )
        given_up.append(result.records[0].verdict is Verdict.HOPELESS)
    assert keeps(given_up, 0.1)
