"""Conformal risk control, exit rates and halt times: known answers, refusals, consistency."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from adaptive.calibration import (
    InvalidArgumentError,
    Trace,
    binomial_log_p,
    certify_halting,
    conformal_minimum_units,
    conformal_risk_control,
    consistency_threshold,
    departure_curve,
    exit_rate_rank,
    exit_rate_threshold,
    marginal_thresholds,
    screen_halting,
    survivor_thresholds,
)


def test_the_known_table_gives_index_three():
    losses = np.repeat([[0.0, 0.025, 0.05, 0.075, 0.1]], 40, axis=0)
    result = conformal_risk_control(losses, risk=0.1)
    expected = [0.02439, 0.04878, 0.073171, 0.097561, 0.121951]
    np.testing.assert_allclose(result.adjusted, expected, atol=5e-7)
    assert (result.index, result.first_failing) == (3, 4)


def test_all_zero_losses_give_the_cheapest_column():
    result = conformal_risk_control(np.zeros((99, 5)), risk=0.01)
    assert result.index == 4
    assert result.first_failing is None


def test_minimum_units_are_those_at_which_zero_loss_passes():
    assert [conformal_minimum_units(r) for r in (0.01, 0.02, 0.05, 0.1)] == [99, 49, 19, 9]
    for risk, bound in ((0.03, 1.0), (0.3, 1.0), (0.2, 3.0)):
        n = conformal_minimum_units(risk, bound=bound)
        assert conformal_risk_control(np.zeros((n, 1)), risk=risk, bound=bound).index == 0
        if n > 1:
            few = conformal_risk_control(np.zeros((n - 1, 1)), risk=risk, bound=bound)
            assert few.index is None
            assert f"fewer than {n} units" in few.statement()


def test_the_first_failing_column_ends_it_even_if_a_later_one_passes():
    losses = np.zeros((50, 4))
    losses[:10, 2] = 1.0
    with pytest.raises(InvalidArgumentError, match=r"decrease at unit 0, column 3"):
        conformal_risk_control(losses, risk=0.1)
    result = conformal_risk_control(losses, risk=0.1, monotonise=True)
    assert (result.index, result.first_failing) == (1, 2)
    assert (result.adjusted[2:] > 0.1).all()
    np.testing.assert_array_equal(result.means, losses.mean(axis=0))
    assert "running maximum" in result.statement()


def test_the_bound_is_a_parameter_and_is_checked():
    losses = np.repeat([[0.0, 2.0]], 30, axis=0)
    with pytest.raises(InvalidArgumentError, match="at most `bound` = 1"):
        conformal_risk_control(losses, risk=0.5)
    wide = conformal_risk_control(np.zeros((30, 2)), risk=0.5, bound=10.0)
    assert wide.adjusted[0] == pytest.approx(10.0 / 31)


def test_it_says_that_the_guarantee_is_an_expectation():
    text = conformal_risk_control(np.zeros((99, 2)), risk=0.05).statement()
    assert "average over draws of the calibration units" in text
    assert "no probability" in text


@given(hnp.arrays(np.float64, (12, 6), elements=st.floats(0, 1)), st.floats(0.05, 0.9))
def test_a_lower_risk_never_gives_a_cheaper_column(losses, risk):
    def index(level):
        found = conformal_risk_control(losses, risk=level, monotonise=True).index
        return -1 if found is None else found

    assert index(risk / 2) <= index(risk)


def test_conformal_rank_known_answer():
    assert exit_rate_rank(200, 0.3) == 140
    assert 140 / 201 == pytest.approx(0.69652, abs=1e-5)


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0.01, 0.5))
def test_the_rank_is_the_largest_that_keeps_the_rate(n, rate, delta):
    rank = exit_rate_rank(n, rate)
    assert rank / (n + 1) <= 1 - rate + 1e-9
    assert rank == n or (rank + 1) / (n + 1) > 1 - rate
    sure = exit_rate_rank(n, rate, delta=delta)

    def failure(k):
        return stats.beta.sf(1 - rate, k, n - k + 1)

    assert sure == 0 or failure(sure) <= delta + 1e-9
    assert sure == n or failure(sure + 1) > delta - 1e-9


def test_marginal_thresholds_underspend_and_survivor_thresholds_do_not(rng):
    rates, costs = np.full(8, 1 / 8), np.arange(1, 9)
    traffic = rng.random((100_000, 8))

    def spent(thresholds):
        stops = traffic >= thresholds
        stops[:, -1] = True
        return costs[stops.argmax(axis=1)].mean()

    scores = rng.random((2000, 8))
    assert spent(marginal_thresholds(scores, rates)) == pytest.approx(3.28, abs=0.1)
    assert spent(survivor_thresholds(scores, rates)) == pytest.approx(4.46, abs=0.1)


@given(st.integers(0, 5), st.integers(5, 60))
def test_survivor_thresholds_realise_the_counts_exactly(seed, n):
    scores = np.random.default_rng(seed).permuted(np.arange(n * 4.0).reshape(n, 4), axis=0)
    rates = np.array([8, 4, 2, 1]) / 15
    stops = scores >= survivor_thresholds(scores, rates)
    first = np.where(stops.any(axis=1), stops.argmax(axis=1), 4)
    counts = np.bincount(first, minlength=5)[:4]
    assert counts.tolist() == np.floor(n * rates + 1e-9).astype(int).tolist()


def test_rates_of_nothing_and_of_everything():
    scores = [[0.1, 0.2], [0.3, 0.4]]
    assert marginal_thresholds(scores, [0.0, 1.0]).tolist() == [math.inf, -math.inf]
    assert survivor_thresholds(scores, [0.0, 1.0]).tolist() == [math.inf, 0.2]
    assert exit_rate_threshold([0.5], 0.9) == -math.inf
    with pytest.raises(InvalidArgumentError, match="sum at most 1"):
        marginal_thresholds(scores, [0.9, 0.9])


def test_the_consistency_threshold_is_the_conformal_one_for_departures(rng):
    scores = rng.random((300, 3), dtype=np.float32)
    wrong = rng.random((300, 3)) > scores
    trace = Trace(
        scores=scores,
        losses={"disagreement": wrong},
        costs=[1, 2, 3, 4],
        cost_quantity="s",
        lengths=np.full(100, 3),
    )
    threshold = consistency_threshold(trace, risk=0.2)
    assert departure_curve(trace, [threshold]).rate[0] <= 0.2
    lower = np.nextafter(np.float32(threshold), np.float32(-1))
    worst = np.maximum.reduceat(np.where(wrong, scores, -np.inf).max(axis=1), trace.offsets[:-1])
    assert (worst >= threshold).sum() == 100 - math.ceil(101 * 0.8)
    assert (worst >= lower).sum() > (worst >= threshold).sum()
    assert consistency_threshold(trace.select(range(3)), risk=0.2) == math.inf


def test_the_consistency_threshold_refuses_clusters():
    """Four clusters of a hundred equal units: a new cluster departs in 40 % of draws, not 26 %."""
    rng, departed = np.random.default_rng(0), []
    for _ in range(200):
        highest = rng.random(5, dtype=np.float32)
        trace = Trace(
            scores=np.repeat(highest[:4], 100)[:, None],
            losses={"disagreement": np.ones((400, 1), dtype=bool)},
            costs=[1, 2],
            cost_quantity="s",
        )
        departed.append(highest[4] >= consistency_threshold(trace, risk=0.26))
        grouped = dataclasses.replace(trace, groups=np.repeat(np.arange(4), 100))
        with pytest.raises(InvalidArgumentError, match="of units without groups"):
            consistency_threshold(grouped, risk=0.26)
    assert np.mean(departed) > 0.33  # what the promise would be, had the clusters been passed over


def halting_data(rng, n, errors=(0.02, 0.02, 0.02)):
    scores = rng.random((n, len(errors)))
    return scores, (rng.random((n, len(errors))) < errors).astype(float)


def test_halting_certifies_good_exits_and_stops_before_bad_ones(rng):
    scores, losses = halting_data(rng, 3000, errors=(0.5, 0.02, 0.02))
    result = certify_halting(scores, losses, thresholds=[0.5] * 3, risk=0.05, delta=0.05)
    assert result.first_exit == 1
    assert result.thresholds.tolist() == [math.inf, 0.5, 0.5]
    assert "by exit k" in result.statement()
    assert len(result.to_frame()) == 3


def test_halting_conditions_on_having_stopped():
    # 5% of units stop at exit 0 and half of them are wrong: marginally harmless, not given that.
    n = 2000
    scores = np.zeros((n, 2))
    scores[: n // 20, 0] = 1.0
    scores[:, 1] = 1.0
    losses = np.zeros((n, 2))
    losses[: n // 40, 0] = 1.0
    result = certify_halting(scores, losses, thresholds=[0.5, 0.5], risk=0.05, delta=0.05)
    assert result.first_exit == 1
    expected = binomial_log_p(n // 40, n // 20, risk=0.05)
    assert result.log_p_values[0] == pytest.approx(float(expected))


def test_halting_skips_exits_that_cannot_stop_and_certifies_nothing_without_evidence(rng):
    scores, losses = halting_data(rng, 1000)
    open_end = certify_halting(
        scores, losses, thresholds=[0.5, 0.5, math.inf], risk=0.05, delta=0.05
    )
    assert open_end.first_exit == 0
    few = certify_halting(scores[:20], losses[:20], thresholds=[0.5] * 3, risk=0.05, delta=0.05)
    assert few.first_exit is None
    assert np.isinf(few.thresholds).all()


def test_screening_keeps_the_accumulated_error_rate_in_bounds(rng):
    scores = rng.random((500, 4))
    losses = (rng.random((500, 4)) > scores).astype(float)
    thresholds = screen_halting(scores, losses, risk=0.1)
    stops = scores >= thresholds
    first = np.where(stops.any(axis=1), stops.argmax(axis=1), 4)
    for exit_ in range(4):
        by_now = np.flatnonzero(first <= exit_)
        assert losses[by_now, first[by_now]].sum() <= 0.1 * by_now.size


def test_halting_refuses_what_it_cannot_test():
    with pytest.raises(InvalidArgumentError, match="0 or 1"):
        screen_halting([[0.1]], [[0.5]], risk=0.1)
    with pytest.raises(InvalidArgumentError, match="thresholds"):
        certify_halting([[0.1]], [[1]], thresholds=[0.1, 0.2], risk=0.1, delta=0.1)
