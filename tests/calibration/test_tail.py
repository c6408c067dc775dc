"""Bands and tail risks: exact small cases, known ranks, ordering, decisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from adaptive.calibration import (
    ConditionalValueAtRisk,
    IntervalMean,
    InvalidArgumentError,
    Quantile,
    berk_jones_levels,
    control_tail,
    dkw_levels,
    mean_between,
    no_crossing_probability,
    quantile_rank,
)


def test_known_ranks():
    assert quantile_rank(1000, 0.9, delta=0.05) == 916
    assert quantile_rank(100, 0.9, delta=0.1) == 95
    assert quantile_rank(200, 0.95, delta=0.05) == 196
    assert quantile_rank(10, 0.9, delta=0.05) is None


@given(st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_no_crossing_in_closed_form(u, v, w):
    a, b, c = sorted((u, v, w))
    assert no_crossing_probability(np.array([a])) == pytest.approx(1 - a)
    two = (1 - a) ** 2 - (b - a) ** 2
    assert no_crossing_probability(np.array([a, b])) == pytest.approx(two, abs=1e-12)
    # n = 3: all below c; two below b, one not below c; one below a, two above b, not both below c.
    crossing = c**3 + 3 * b**2 * (1 - c) + 3 * a * ((1 - b) ** 2 - (c - b) ** 2)
    three = no_crossing_probability(np.array([a, b, c]))
    assert three == pytest.approx(1 - crossing, abs=1e-12)


def test_the_walk_agrees_with_constant_levels_and_with_the_minimum():
    assert no_crossing_probability(np.full(50, 0.01)) == pytest.approx(0.99**50)
    only_last = np.zeros(30)
    only_last[-1] = 0.9
    assert no_crossing_probability(only_last) == pytest.approx(1 - 0.9**30)


@pytest.mark.parametrize(("n", "first"), [(3, 1), (40, 1), (40, 30), (400, 1), (40, 40)])
def test_the_berk_jones_level_puts_back_into_its_definition(n, first):
    levels = berk_jones_levels(n, delta=0.1, first=first)
    assert 0.9 <= no_crossing_probability(levels) <= 0.9 + 1e-4
    ranks = np.arange(first, n + 1)
    common = stats.beta.cdf(levels[first - 1 :], ranks, n - ranks + 1)
    np.testing.assert_allclose(common, common[0], rtol=1e-6)
    assert (levels[: first - 1] == 0).all()


def test_berk_jones_is_tighter_than_dkw_in_the_tail():
    n = 500
    assert berk_jones_levels(n, delta=0.05)[-1] > dkw_levels(n, delta=0.05)[-1] + 0.03
    with pytest.raises(InvalidArgumentError, match="1/2"):
        dkw_levels(10, delta=0.6)


@given(hnp.arrays(np.float64, (60, 2), elements=st.floats(-1, 1)))
def test_bounds_are_ordered_and_above_what_was_seen(losses):
    cvar = ConditionalValueAtRisk(0.8).upper_bound(losses, delta=0.1)
    higher = ConditionalValueAtRisk(0.9).upper_bound(losses, delta=0.1)
    mean = IntervalMean(0.0, 1.0).upper_bound(losses, delta=0.1)
    assert (cvar <= higher + 0.1).all()
    assert (losses.mean(axis=0) <= mean).all()
    assert (mean <= 1.0 + 1e-12).all()
    assert (np.sort(losses, axis=0)[-12:].mean(axis=0) <= cvar + 1e-12).all()
    raised = ConditionalValueAtRisk(0.8).upper_bound(np.minimum(losses + 0.1, 1.0), delta=0.1)
    assert (raised >= cvar - 1e-12).all()


def test_mean_between_integrates_the_step_function():
    ordered = np.array([[0.0], [0.2], [0.6]])
    levels = np.array([0.1, 0.5, 0.8])
    whole = 0.1 * 0 + 0.4 * 0.2 + 0.3 * 0.6 + 0.2 * 1.0
    assert mean_between(ordered, levels, low=0, high=1, bound=1.0) == pytest.approx(whole)
    top = (0.1 * 0.6 + 0.2 * 1.0) / 0.3
    assert mean_between(ordered, levels, low=0.7, high=1, bound=1.0) == pytest.approx(top)


def test_quantiles_without_enough_units_are_the_declared_bound():
    assert Quantile(0.99).upper_bound(np.zeros(20), delta=0.05, bound=3.0) == 3.0


def test_control_stops_at_the_first_failure_and_reads_no_further(rng):
    losses = rng.random((400, 4)) * [0.0, 0.1, 0.9, 0.1]
    asked = []

    def column(j):
        asked.append(j)
        return losses[:, j]

    tail = ConditionalValueAtRisk(0.9)
    result = control_tail(column, tail=tail, risk=0.3, n_columns=4)
    assert result.index == 1
    assert asked == [1, 2]
    assert np.isnan(result.upper_bounds[3])
    assert "worst 0.1 of losses" in result.statement()
    nothing = control_tail(losses[:, ::2], tail=tail, risk=0.3)
    assert nothing.index is None
    assert "only bounded by" in nothing.statement()
    assert len(nothing.to_frame()) == 2


@pytest.mark.parametrize(
    "make", [lambda: Quantile(1.0), lambda: IntervalMean(0.5, 0.5), lambda: IntervalMean(-1, 1)]
)
def test_impossible_tails_are_refused(make):
    with pytest.raises(InvalidArgumentError):
        make()


def test_losses_above_the_bound_are_refused():
    with pytest.raises(InvalidArgumentError, match="at most `bound`"):
        Quantile(0.5).upper_bound([0.1, 2.0], delta=0.1)
