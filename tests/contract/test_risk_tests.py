"""One table for every test of a mean: each row must obey the same relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptive.calibration import (
    InvalidArgumentError,
    LossHistogram,
    TargetBets,
    agrapa_upper_bound,
    binomial_log_p,
    binomial_upper_bound,
    control_risk,
    hoeffding_bentkus_log_p,
    log_betainc,
    mixture_log_p,
    ratio_log_p,
    star_log_p,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._betting import _star_peak
from adaptive.calibration._methods import TESTS

ROWS = [pytest.param(test(), id=test.name) for test in TESTS]
FINITE = [row for row in ROWS if not row.values[0].asymptotic]
BINARY = ("binomial", "beta-mixture")
ON_A_GRID = ("star", "agrapa")
levels = st.floats(0.02, 0.9)
deltas = st.floats(0.001, 0.4)


@st.composite
def samples(draw, test, columns=2):
    n = draw(st.integers(1, 30))
    shape = (n, columns)
    if test.name in BINARY:
        return draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0])))
    low = -2.0 if test.least < 0 else 0.0
    values = st.sampled_from([low, 0.0, 0.25, 1.0]) | st.floats(low, 1.0)
    return draw(arrays(np.float64, shape, elements=values))


def log_p(test, losses, risk, delta=0.1, bound=1.0):
    return test.log_p_values(losses, risk=risk, delta=delta, bound=bound)


@pytest.mark.parametrize("test", ROWS)
def test_shape_range_and_columns_are_independent(test):
    @settings(max_examples=30)
    @given(samples(test), levels)
    def check(losses, risk):
        both = log_p(test, losses, risk)
        assert both.shape == (2,)
        assert (both <= 0.0).all()
        assert not np.isnan(both).any()
        alone = [log_p(test, losses[:, [j]], risk)[0] for j in range(2)]
        np.testing.assert_allclose(both, alone, rtol=1e-9, atol=1e-12)

    check()


@pytest.mark.parametrize("test", FINITE)
def test_a_bound_and_its_p_value_agree(test):
    """Put the bound back: levels above it are rejected at delta, levels below are not."""

    @settings(max_examples=25)
    @given(samples(test, columns=1), deltas)
    def check(losses, delta):
        upper = test.upper_bounds(losses, delta=delta, bound=1.0)[0]
        assert 0.0 <= upper <= 1.0
        step = 1e-3 if test.name in ON_A_GRID else 1e-9
        above = upper * (1 + 1e-6) + step
        if above < 1.0 and test.name not in ON_A_GRID:
            assert log_p(test, losses, above, delta)[0] <= math.log(delta) + 1e-9
        below = upper * (1 - 1e-6) - step
        if below > 1e-6 and test.name not in ON_A_GRID:
            assert log_p(test, losses, below, delta)[0] >= math.log(delta) - 1e-9
        if test.name in ON_A_GRID and upper < 1.0:
            grid = np.arange(math.ceil(round(upper * 1000, 6)), 1000) / 1000
            for level in grid[:: max(1, grid.size // 5)]:
                assert log_p(test, losses, float(level), delta)[0] <= math.log(delta) + 1e-9

    check()


@pytest.mark.parametrize("test", [row for row in FINITE if not row.values[0].ordered])
def test_relations_between_samples(test):
    @settings(max_examples=30)
    @given(samples(test, columns=1), levels, st.randoms(use_true_random=False))
    def check(losses, risk, random):
        base = log_p(test, losses, risk)[0]
        rows = list(range(len(losses)))
        random.shuffle(rows)
        assert log_p(test, losses[rows], risk)[0] == pytest.approx(base, rel=1e-9, abs=1e-9)
        assert log_p(test, losses, risk + 0.05)[0] <= base + 1e-9
        if test.name in (*BINARY[:1], "kl-hoeffding"):
            longer = np.vstack([losses, np.zeros((1, 1))])
            assert log_p(test, longer, risk)[0] <= base + 1e-9

    check()


@pytest.mark.parametrize("test", ROWS)
def test_scale_of_the_bound_is_irrelevant(test):
    if test.name in BINARY:
        with pytest.raises(InvalidArgumentError, match="`bound` must be 1"):
            log_p(test, np.zeros((3, 1)), 0.5, bound=2.0)
        return
    losses = np.random.default_rng(0).random((50, 3)) * 0.3
    small, large = log_p(test, losses, 0.2), log_p(test, 4 * losses, 0.8, bound=4.0)
    np.testing.assert_allclose(small, large, rtol=1e-9)


@pytest.mark.parametrize("test", ROWS)
@pytest.mark.parametrize("n", [1, 2])
def test_tiny_samples_are_defined(test, n):
    for losses in (np.zeros((n, 1)), np.ones((n, 1))):
        assert log_p(test, losses, 0.3)[0] <= 0.0
        assert 0.0 <= test.upper_bounds(losses, delta=0.1, bound=1.0)[0] <= 1.0


@pytest.mark.parametrize("test", FINITE)
def test_everything_wrong_is_no_evidence(test):
    losses = np.ones((200, 1))
    assert log_p(test, losses, 0.3)[0] > math.log(0.5)
    assert test.upper_bounds(losses, delta=0.1, bound=1.0)[0] == 1.0


@pytest.mark.parametrize("test", ROWS)
def test_names_are_known_to_the_door(test):
    losses = (np.random.default_rng(1).random((400, 3)) < [0, 0.01, 0.4]).astype(float)
    result = control_risk(losses, risk=0.1, method=test.name)
    assert result.index == 1
    assert result.certificate.method == test.name
    assert result.certificate.assumptions
    assert ("asymptotic" in result.certificate.statement()) is test.asymptotic
    assert result.certificate.verify(losses)


@given(st.integers(1, 400), st.floats(0.001, 0.99), st.data())
def test_exact_test_and_clopper_pearson_are_dual(n, risk, data):
    k = data.draw(st.integers(0, n))
    upper = binomial_upper_bound(k, n, delta=0.07)
    if abs(upper - risk) > 1e-9:
        assert (binomial_log_p(k, n, risk=risk) <= math.log(0.07)) == (upper <= risk)


@given(st.integers(1, 2000), st.floats(1e-4, 0.9999), st.data())
def test_hoeffding_bentkus_never_beats_the_exact_test(n, risk, data):
    k = data.draw(st.integers(0, n))
    exact, hb = binomial_log_p(k, n, risk=risk), hoeffding_bentkus_log_p(k, n, risk=risk)
    assert hb >= exact - 1e-9


def test_log_tail_is_continuous_where_the_method_of_computation_changes():
    k = np.arange(0, 3000)
    values = binomial_log_p(k, 20_000, risk=0.3)
    assert (np.diff(values) > 0).all()
    assert values[0] == pytest.approx(20_000 * math.log(0.7), rel=1e-12)
    curvature = np.diff(values, 2)
    assert (curvature < 1e-6).all()  # a log-concave distribution function


def test_log_betainc_against_the_defining_sum():
    n, k, m = 40, 7, 0.2
    terms = [math.comb(n, i) * m**i * (1 - m) ** (n - i) for i in range(k + 1)]
    assert log_betainc(n - k, k + 1, 1 - m) == pytest.approx(math.log(sum(terms)), rel=1e-13)


@given(arrays(np.float64, 25, elements=st.floats(-1.5, 1.0)), levels, deltas)
def test_the_two_forms_of_target_bets_agree(losses, risk, delta):
    scalar = -star_log_p(losses, risk=risk, delta=delta)[0]
    vector = _star_peak(losses[:, None], np.array([risk, risk]), delta, 40.0)
    np.testing.assert_allclose(vector, scalar, rtol=1e-9, atol=1e-12)


@given(arrays(np.int64, (30, 2), elements=st.integers(-1000, 1000)).map(lambda k: k / 1000), levels)
def test_histograms_are_conservative_mergeable_and_exact_on_their_grid(losses, risk):
    whole = LossHistogram.of(losses, bins=64, low=-1.0)
    parts = LossHistogram.of(losses[:11], bins=64, low=-1.0).merge(
        LossHistogram.of(losses[11:], bins=64, low=-1.0)
    )
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.n_units == 30
    rounded = whole.log_p_values(risk=risk)
    assert (rounded >= mixture_log_p(losses, risk=risk) - 1e-9).all()
    up = np.minimum(np.ceil((losses + 1.0) * 32) / 32 - 1.0, 1.0)
    np.testing.assert_allclose(rounded, mixture_log_p(up, risk=risk), rtol=1e-9, atol=1e-9)


def test_histograms_on_other_grids_do_not_merge():
    with pytest.raises(InvalidArgumentError, match="same grid"):
        LossHistogram.of(np.zeros(3), bins=4).merge(LossHistogram.of(np.zeros(3), bins=5))
    with pytest.raises(InvalidArgumentError, match="at most `bound` = 1"):
        LossHistogram.of(np.full(3, 1.1))


def test_the_order_of_units_matters_for_bets_and_is_therefore_fixed_before():
    losses = (np.arange(200) % 20 == 0).astype(float)
    rng = np.random.default_rng(0)
    uppers = [wsr_upper_bound(rng.permutation(losses), delta=0.1)[0] for _ in range(40)]
    assert max(uppers) > 1.5 * min(uppers)


def test_ratio_risk_without_occurrence_is_no_evidence_and_never_nan():
    wrong = np.array([[1, 1], [0, 0], [1, 0]])
    counted = np.array([[1, 0], [1, 0], [1, 0]])
    found = ratio_log_p(wrong, counted, risk=0.5)
    assert found[1] == 0.0
    assert found[0] == pytest.approx(math.log(7 / 8))


def test_an_own_test_can_be_given():
    losses = np.zeros((100, 2))
    assert control_risk(losses, risk=0.05, method=TargetBets()).index == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: binomial_log_p(7.5, 100, risk=0.1), "a count, not a mean"),
        (lambda: binomial_log_p(101, 100, risk=0.1), "between 0 and `n_units`"),
        (lambda: hoeffding_bentkus_log_p(-0.1, 100, risk=0.1), r"losses in \[0, bound\]"),
        (lambda: wsr_log_p(np.array([]), risk=0.1, delta=0.1), "non-empty"),
        (lambda: wsr_log_p([np.nan], risk=0.1, delta=0.1), "finite numbers"),
        (lambda: wsr_log_p([1.2], risk=0.1, delta=0.1), "at most `bound` = 1"),
        (lambda: wsr_upper_bound([0.5], delta=1.0), r"`delta` must be in \(0, 1\)"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(InvalidArgumentError, match=text):
        call()


def test_bounds_on_a_grid_do_not_grow_with_the_sample():
    losses = (np.random.default_rng(0).random((5000, 1)) < 0.05).astype(float)
    assert 0.05 < agrapa_upper_bound(losses, delta=0.1)[0] < 0.07
