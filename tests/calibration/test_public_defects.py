"""Defects found in public calibration code: each wrong variant is caught by the conformance suite.

The variants are re-written from descriptions of what the codes compute; see the docs page on peers.
Found in eight of them (MAPIE, TorchCP, ltt, conformal-risk, RC-EENN, Thought calibration and ORCA,
Conformal Thinking, Pareto testing). Further variants of whole calibrations (first failing member,
tuning on test units, tokens as units, the best of several orders, the cheapest of many) are in
tests/statistical/test_calibration_guarantee.py; that NaN is p = 1 is in test_testing.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import (
    agrapa_log_p,
    control_risk,
    hoeffding_bentkus_log_p,
    mixture_log_p,
    wsr_log_p,
)
from adaptive.calibration.conformance import (
    SCENARIOS,
    check_control,
    check_p_value,
    check_upper_bound,
)

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def bets(losses, delta=0.1):
    count = np.arange(2, losses.shape[0] + 2)[:, None]
    mean = (0.5 + losses.cumsum(axis=0)) / count
    variance = (0.25 + ((losses - mean) ** 2).cumsum(axis=0)) / count
    before = np.vstack([np.full((1, losses.shape[1]), 0.25), variance[:-1]])
    return np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (losses.shape[0] * before)))


def gains(losses, level):
    return np.log(1 - bets(losses) * (losses - level))


def right(losses, level):
    return np.exp(wsr_log_p(losses, risk=level, delta=0.1))


def sum_of_two_running_maxima(losses, level):
    half = losses.shape[0] // 2
    wealth = [g.cumsum(axis=0).max(axis=0) for g in np.split(gains(losses, level), [half])]
    return np.minimum(1.0, np.exp(-np.maximum(sum(wealth), 0.0)))


def two_sided(losses, level):
    """A hedged martingale is evidence against "the mean *is* the level", in both directions."""
    down = gains(losses, level).cumsum(axis=0)
    up = np.log(1 + 0.5 * (losses - level)).cumsum(axis=0)
    return np.minimum(1.0, np.exp(-np.logaddexp(down, up).max(axis=0) + np.log(2)))


def number_of_columns_as_n(losses, level):
    means = np.repeat(losses.mean(axis=0)[None], 1000, axis=0)
    return np.exp(hoeffding_bentkus_log_p(means.sum(axis=0), 1000, risk=level))


def negative_losses_in_a_unit_interval_bound(losses, level):
    mean = losses.mean(axis=0)
    with np.errstate(all="ignore"):
        clipped = np.minimum(mean, level)
        entropy = clipped * np.log(clipped / level) + (1 - clipped) * np.log(
            (1 - clipped) / (1 - level)
        )
    return np.where(np.isnan(entropy), 0.0, np.exp(-losses.shape[0] * np.nan_to_num(entropy)))


def floor_of_a_float_mean(losses, level):
    mean = losses.mean(axis=0, dtype=np.float32).astype(float)
    return stats.binom.cdf(losses.shape[0] * mean, losses.shape[0], level)


def ceiling_of_a_float_mean(losses, level):
    n = losses.shape[0]
    return stats.binom.cdf(np.ceil(n * losses.mean(axis=0)), n, level)


def binomial_of_a_rounded_total(losses, level):
    """The exact binomial test on losses that are not 0/1, without the factor e and rounded down."""
    return stats.binom.cdf(np.floor(losses.sum(axis=0)), losses.shape[0], level)


def undefined_without_errors(losses, level):
    """Hoeffding's inequality without the convention that 0 ln 0 is 0."""
    mean = np.minimum(losses.mean(axis=0), level)
    with np.errstate(all="ignore"):
        kl = mean * np.log(mean / level) + (1 - mean) * np.log((1 - mean) / (1 - level))
    return np.exp(-losses.shape[0] * kl)


def columns_that_never_cross_are_skipped(losses, level):
    """The columns with evidence, packed to the left; the last places keep what is there."""
    p = right(losses, level)
    packed = np.concatenate([p[p < 1.0], p[p >= 1.0]])
    return packed[: losses.shape[1]]


def smallest_of_two_tests(losses, level):
    half = losses.shape[0] // 2
    parts = np.split(losses, [half])
    return np.min([stats.binom.cdf(x.sum(axis=0), x.shape[0], level) for x in parts], axis=0)


def check(p_value, laws, *, ordered=True):
    return check_p_value(
        p_value, laws=laws, ordered=ordered, batched=True, sizes=(13, 101), replicates=4000, rng=1
    )


def test_the_right_statistic_passes():
    assert check(right, "signed").passed


@pytest.mark.parametrize(
    ("wrong", "laws", "caught_by"),
    [
        (sum_of_two_running_maxima, "bounded", "type I error"),
        (two_sided, "bounded", "no evidence from a sample without any success"),
        (number_of_columns_as_n, "binary", "type I error"),
        (negative_losses_in_a_unit_interval_bound, "signed", "type I error"),
        (floor_of_a_float_mean, "binary", "enumeration"),
        (binomial_of_a_rounded_total, "bounded", "type I error"),
        (undefined_without_errors, "binary", "p is a number"),
        (columns_that_never_cross_are_skipped, "binary", "does not depend on other columns"),
        (ceiling_of_a_float_mean, "binary", "one more unit without loss"),
        (smallest_of_two_tests, "binary", "type I error"),
    ],
)
def test_wrong_p_values_are_caught(wrong, laws, caught_by):
    failures = check(wrong, laws, ordered=wrong is not ceiling_of_a_float_mean).failures
    assert any(caught_by in failure.check for failure in failures)


def variance_over_columns(losses, delta):
    """Empirical Bernstein with the variance of the column means in place of that of the losses."""
    n = losses.shape[0]
    mean, log_term = losses.mean(axis=0), np.log(2 / delta)
    spread = np.var(mean)
    return mean + np.sqrt(2 * spread * log_term / n) + 0 * log_term


def test_wrong_bound_is_caught():
    report = check_upper_bound(
        variance_over_columns, batched=True, sizes=(100,), replicates=1000, rng=1
    )
    assert not report.passed


def cheapest_below_the_promise_with_bound_one(losses, risk, delta):
    """Conformal risk control read as a promise with confidence, at the last passing column."""
    n = losses.shape[0]
    adjusted = (n * losses.mean(axis=0) + 1.0) / (n + 1)
    return int(np.flatnonzero(adjusted <= risk)[-1]) if (adjusted <= risk).any() else None


def one_level_for_both_roles(losses, risk, delta):
    """The promised risk used as the error probability as well."""
    return control_risk(losses, risk=risk, delta=max(risk, 3 * delta), loss_type="binary").index


def index_of_an_empty_search(losses, risk, delta):
    """The column before the first failing one, where `argmax` finds none or the first."""
    adjusted = (losses.shape[0] * losses[:, 1:].mean(axis=0) + 1.0) / (losses.shape[0] + 1)
    return max(int(np.argmax(adjusted > risk)) - 1, 0) + 1


def direction_from_the_data(losses, risk, delta):
    """A fixed sequence from the end of the path whose losses look smaller."""
    mean = losses.mean(axis=0)
    order = np.arange(losses.shape[1])
    if mean[-1] < mean[1]:
        order[1:] = order[:0:-1]
    index = control_risk(losses[:, order], risk=risk, delta=delta, loss_type="binary").index
    return None if index is None else int(order[index])


def hopeless_units_dropped(losses, risk, delta):
    """Units that no column gets right count as unsolvable and leave the calibration."""
    solvable = ~(losses[:, 1:] == 1.0).all(axis=1)
    if not solvable.any():
        return None
    return control_risk(losses[solvable], risk=risk, delta=delta, loss_type="binary").index


FLAT, STEP = "flat path just above the promise", "first column just above the promise"


@pytest.mark.parametrize(
    ("wrong", "scenario", "setting"),
    [
        (cheapest_below_the_promise_with_bound_one, FLAT, (100, 0.1, 0.05)),
        (one_level_for_both_roles, FLAT, (100, 0.1, 0.05)),
        (index_of_an_empty_search, STEP, (100, 0.1, 0.1)),
        (direction_from_the_data, FLAT, (200, 0.1, 0.1)),
        (hopeless_units_dropped, "fine path, dependent along it", (100, 0.1, 0.1)),
    ],
)
def test_wrong_calibrations_are_caught(wrong, scenario, setting):
    report = check_control(
        wrong, scenarios=[BY_NAME[scenario]], settings=(setting,), replicates=500, rng=1
    )
    assert any(scenario in failure.check for failure in report.failures), str(report)


def test_a_search_that_finds_nothing_certifies_total_loss():
    report = check_control(index_of_an_empty_search, scenarios=[BY_NAME[FLAT]], replicates=1, rng=1)
    assert any("losses of 1 throughout" in failure.check for failure in report.failures)


@pytest.mark.parametrize("n", [2000, 200_000])
def test_wealth_beyond_all_floats_is_ordered(n):
    """Linear wealth overflows after a thousand units; logarithms tell 1e-5000 from 1e-6000."""
    table = np.zeros((n, 3))
    table[: n // 100, 1] = 1.0
    table[: n // 50, 2] = 1.0
    for found in (
        wsr_log_p(table, risk=0.5, delta=0.1),
        agrapa_log_p(table, risk=0.5, delta=0.1),
        mixture_log_p(table, risk=0.5),
    ):
        assert np.isfinite(found).all()
        assert found[0] < found[1] < found[2] < -50
