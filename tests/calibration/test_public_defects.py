"""Defects found in public calibration code: each wrong variant is caught by the conformance suite.

The variants are re-written from descriptions of what the codes compute; see the docs page on peers.
Those of whole calibrations (first failing member, tuning on test units, tokens as units, the best
of several orders, the cheapest of many) are in tests/statistical/test_calibration_guarantee.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import control_risk, hoeffding_bentkus_log_p, wsr_log_p
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


def smallest_of_two_tests(losses, level):
    half = losses.shape[0] // 2
    parts = np.split(losses, [half])
    return np.min([stats.binom.cdf(x.sum(axis=0), x.shape[0], level) for x in parts], axis=0)


def check(p_value, laws):
    return check_p_value(
        p_value, laws=laws, ordered=True, batched=True, sizes=(13, 101), replicates=4000, rng=1
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
        (smallest_of_two_tests, "binary", "type I error"),
    ],
)
def test_wrong_p_values_are_caught(wrong, laws, caught_by):
    failures = check(wrong, laws).failures
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


@pytest.mark.parametrize(
    "wrong", [cheapest_below_the_promise_with_bound_one, one_level_for_both_roles]
)
def test_wrong_calibrations_are_caught(wrong):
    scenarios = [BY_NAME["flat path just above the promise"]]
    report = check_control(
        wrong, scenarios=scenarios, settings=((100, 0.1, 0.05),), replicates=500, rng=1
    )
    assert not report.passed
