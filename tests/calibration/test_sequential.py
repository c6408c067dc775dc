"""E-values, e-processes, SPRTs and confidence sequences: known answers and put-back checks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate

from adaptive.calibration import (
    SPRT,
    BettingSequence,
    EmpiricalBernsteinSequence,
    InvalidArgumentError,
    MeanEProcess,
    average_e,
    e_to_log_p,
    gamma_exponential_boundary,
    multiply_e,
    normal_mixture_boundary,
    p_to_log_e,
    truncated_sprt,
)

A100 = 0.2 * ((37 * np.arange(1, 101)) % 101) / 101


def test_gamma_exponential_boundary_known_answers():
    found = gamma_exponential_boundary([1, 10, 100, 1000], delta=0.05, scale=1.0, best_at=10.0)
    expected = [5.8063727270, 11.5493515561, 33.8240626637, 111.4150431035]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_normal_mixture_boundary_known_answers():
    found = normal_mixture_boundary([1, 10, 100, 1000], delta=0.05, best_at=10.0)
    expected = [3.6343050900, 8.7470841600, 29.8499772358, 105.2397014265]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@given(st.floats(0, 1e5), st.floats(0.001, 0.9), st.floats(0.1, 1e3), st.floats(0.1, 10))
def test_boundaries_grow_with_time_and_with_certainty(v, delta, best_at, scale):
    for boundary in (
        lambda v, d: normal_mixture_boundary(v, delta=d, best_at=best_at),
        lambda v, d: gamma_exponential_boundary(v, delta=d, scale=scale, best_at=best_at),
    ):
        assert boundary(v + 1, delta) >= boundary(v, delta) - 1e-9
        if delta < 0.2:
            assert np.isfinite(boundary(v, delta))


@pytest.mark.parametrize(("bet", "expected"), [(0.5, 2.430360423826), (1.0, 4.730441483847)])
def test_a_constant_bet_known_answer(bet, expected):
    process = MeanEProcess(level=0.15, bets=(bet * 0.85,))
    log_e, _ = process.path(A100)
    assert log_e[-1] == pytest.approx(expected, abs=1e-10)


def test_the_kelly_bet_needs_the_known_number_of_units(rng):
    # log(10)/KL: 190 units at a true rate of 0.02, level 0.05, delta 0.1; overshoot on top.
    process = MeanEProcess(level=0.05, bets=(0.6,))
    units = []
    for _ in range(400):
        log_e, _ = process.path((rng.random(3000) < 0.02).astype(float))
        units.append(np.argmax(log_e >= math.log(10)) + 1)
    assert 185 < np.mean(units) < 215


@pytest.mark.parametrize(("rate", "oracle"), [(0.005, 66.7), (0.02, 189.6), (0.03, 471.4)])
def test_the_default_bets_need_few_more_units_than_the_oracle(rng, rate, oracle):
    # The oracle bets log-optimally at the true rate: log(10) / KL(rate, 0.05) units on average.
    process = MeanEProcess(level=0.05)
    units = []
    for _ in range(300):
        log_e, _ = process.path((rng.random(6000) < rate).astype(float))
        units.append(np.argmax(log_e >= math.log(10)) + 1)
    assert np.mean(units) < 1.4 * oracle


@given(
    hnp.arrays(np.float64, (15, 3), elements=st.floats(-2, 1)),
    st.floats(-0.5, 0.9),
    st.randoms(use_true_random=False),
)
def test_streams_equal_paths_and_forget_the_order(values, level, random):
    process = MeanEProcess(level=level)
    state = process.init(3)
    for row in values:
        state = process.update(state, row)
    paths = [process.path(values[:, j]) for j in range(3)]
    np.testing.assert_allclose(state.log_e, [path[0][-1] for path in paths], atol=1e-9)
    np.testing.assert_allclose(
        state.log_peak, [max(0.0, path[0].max()) for path in paths], atol=1e-9
    )
    order = list(range(15))
    random.shuffle(order)
    np.testing.assert_allclose(process.path(values[order, 0])[0][-1], state.log_e[0], atol=1e-9)
    half, wealth = process.path(values[:7, 0])
    rest, _ = process.path(values[7:, 0], start=wealth)
    np.testing.assert_allclose(np.append(half, rest), paths[0][0], atol=1e-9)


@given(st.floats(0.01, 0.9), st.floats(0.05, 0.95))
def test_one_step_of_the_e_process_has_mean_one_at_the_null(level, share):
    process = MeanEProcess(level=level)
    up, down = (process.path([x])[0][0] for x in (1.0, 0.0))
    assert level * math.exp(up) + (1 - level) * math.exp(down) == pytest.approx(1.0)


def test_inactive_streams_stand_still_and_bad_values_are_refused():
    process = MeanEProcess(level=0.1)
    state = process.update(process.init(2), [0.0, math.nan], active=[True, False])
    assert state.units.tolist() == [1, 0]
    assert state.log_e[1] == 0.0
    for values, text in (([2.0, 0.0], "at most 1"), ([math.nan, 0.0], "finite"), ([0.0], "shape")):
        with pytest.raises(InvalidArgumentError, match=text):
            process.update(state, values)
    with pytest.raises(InvalidArgumentError, match="below `bound`"):
        MeanEProcess(level=1.0)


def test_flags_of_a_wrong_shape_are_named_themselves():
    tests = (
        (MeanEProcess(level=0.1), [0.0, 0.0]),
        (SPRT(null=0.1, alternative=0.3, alpha=0.1, beta=0.1), [0, 0]),
        (EmpiricalBernsteinSequence(delta=0.1), [0.0, 0.0]),
        (BettingSequence(delta=0.1), [0.0, 0.0]),
    )
    for test, values in tests:
        with pytest.raises(InvalidArgumentError, match=r"`active` must be of shape \(2,\)"):
            test.update(test.init(2), values, active=[True])
        with pytest.raises(InvalidArgumentError, match=r"` must be of shape \(2,\), got shape"):
            test.update(test.init(2), values[:1])


def test_e_value_arithmetic():
    logs = np.array([[math.log(4.0), -math.inf], [math.log(2.0), math.log(8.0)]])
    np.testing.assert_allclose(np.exp(multiply_e(logs)), [8.0, 0.0])
    np.testing.assert_allclose(np.exp(average_e(logs)), [3.0, 4.0])
    np.testing.assert_allclose(np.exp(average_e(logs[:, 0], weights=[3, 1])), 3.5)
    np.testing.assert_allclose(np.exp(e_to_log_p(np.log([20.0, 0.5]))), [0.05, 1.0])
    with pytest.raises(InvalidArgumentError, match="NaN"):
        multiply_e([math.nan])
    with pytest.raises(InvalidArgumentError, match="weights"):
        average_e([0.0, 0.0], weights=[0.0, 0.0])


@pytest.mark.parametrize("power", [None, 0.3, 0.7])
def test_calibrated_p_values_are_e_values(power):
    def e_value(u):
        return math.exp(float(p_to_log_e(math.exp(-u), power=power)) - u)

    mass, _ = integrate.quad(e_value, 0.0, 600.0, limit=500)
    missing = 1.0 / 600.0 if power is None else 0.0
    assert mass + missing == pytest.approx(1.0, abs=2e-3)
    assert float(p_to_log_e(1.0, power=power)) <= 0.0
    grid = p_to_log_e(np.linspace(0.0, 1.0, 2000), power=power)
    assert (np.diff(grid) <= 1e-9).all()


def test_the_sprt_stops_at_its_boundaries():
    test = SPRT(null=0.5, alternative=0.9, alpha=0.05, beta=0.05)
    state = test.init(3)
    for outcome in ([1, 0, 1], [1, 0, 0]) + ([1, 1, 1],) * 4:
        state = test.update(state, outcome, active=[True, True, False])
    assert state.decision.tolist() == [1, -1, 0]
    assert state.units.tolist() == [6, 2, 0]
    assert state.log_ratio[0] == pytest.approx(6 * math.log(1.8))


@pytest.mark.parametrize(("null", "alternative"), [(0.1, 0.02), (0.05, 0.15), (0.5, 0.8)])
def test_truncated_error_rates_put_back(null, alternative, rng):
    test = truncated_sprt(null, alternative, alpha=0.1, beta=0.1, max_units=120)
    at_null, at_alternative = test.characteristics(null), test.characteristics(alternative)
    assert at_null.accept_alternative <= 0.1
    assert at_null.accept_alternative + at_null.accept_null == pytest.approx(1.0)
    assert at_alternative.accept_null <= 0.25
    further = null + 0.5 * (null - alternative)
    assert test.characteristics(further).accept_alternative <= at_null.accept_alternative
    state = test.init(20_000)
    while (state.decision == 0).any():
        state = test.update(state, (rng.random(20_000) < null).astype(int))
    assert np.mean(state.decision == 1) == pytest.approx(at_null.accept_alternative, abs=0.01)
    assert state.units.mean() == pytest.approx(at_null.expected_units, rel=0.02)
    assert state.units.max() <= 120


def test_truncation_is_exact_by_enumeration():
    test = truncated_sprt(0.3, 0.7, alpha=0.1, beta=0.1, max_units=8)
    rate, accepted, units = 0.3, 0.0, 0.0
    for code in range(2**8):
        bits = [(code >> i) & 1 for i in range(8)]
        state = test.init(1)
        for bit in bits:
            state = test.update(state, [bit])
        weight = rate ** sum(bits) * (1 - rate) ** (8 - sum(bits))
        accepted += weight * (state.decision[0] == 1)
        units += weight * state.units[0]
    found = test.characteristics(rate)
    assert found.accept_alternative == pytest.approx(accepted)
    assert found.expected_units == pytest.approx(units)
    assert accepted <= 0.1


def test_impossible_sprts_are_refused():
    with pytest.raises(InvalidArgumentError, match="different from `null`"):
        SPRT(null=0.5, alternative=0.5, alpha=0.1, beta=0.1)
    test = SPRT(null=0.5, alternative=0.6, alpha=0.1, beta=0.1)
    with pytest.raises(InvalidArgumentError, match="0 or 1"):
        test.update(test.init(1), [0.5])


@pytest.mark.parametrize("kind", [EmpiricalBernsteinSequence, BettingSequence])
def test_sequences_narrow_and_contain_the_mean(kind, rng):
    sequence = kind(delta=0.05, low=-1.0, high=2.0)
    state = sequence.init(2)
    assert [side.tolist() for side in sequence.interval(state)] == [[-1.0, -1.0], [2.0, 2.0]]
    widths = []
    for step in range(1, 601):
        state = sequence.update(state, rng.uniform(-1, 1, 2), active=[True, step <= 300])
        if step in (50, 300, 600):
            lower, upper = sequence.interval(state)
            widths.append(upper - lower)
            assert (lower <= 0).all()
            assert (upper >= 0).all()
    assert widths[0][0] > widths[1][0] > widths[2][0]
    assert widths[1][1] == widths[2][1]
    with pytest.raises(InvalidArgumentError, match=r"in \[-1, 2\]"):
        sequence.update(state, [3.0, 0.0])
    with pytest.raises(InvalidArgumentError, match="above `low`"):
        kind(delta=0.1, low=1.0, high=1.0)


def test_betting_is_tighter_than_empirical_bernstein(rng):
    values = (rng.random(500) < 0.05).astype(float)
    widths = {}
    for kind in (EmpiricalBernsteinSequence, BettingSequence):
        sequence = kind(delta=0.05)
        state = sequence.init(1)
        for value in values:
            state = sequence.update(state, [value])
        lower, upper = sequence.interval(state)
        widths[kind] = float(upper[0] - lower[0])
    assert widths[BettingSequence] < widths[EmpiricalBernsteinSequence]
