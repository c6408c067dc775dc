"""Bets along time: long columns, folded for speed, beside the definition; extreme losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adaptive.calibration import (
    LossHistogram,
    agrapa_log_p,
    control_risk,
    mixture_log_p,
    mixture_upper_bound,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._running import _BLOCK

SIZES = (_BLOCK - 1, _BLOCK, _BLOCK + 1, _BLOCK + 9, 2 * _BLOCK, 3 * _BLOCK - 5)


def slow_log_p(losses, risk, bet_of):
    """Minus the largest log wealth, unit by unit; bets see mean and variance of the past only."""
    total, spread, wealth, peak = 0.5, 0.25, 0.0, 0.0
    for t, loss in enumerate(losses.tolist(), start=1):
        bet = bet_of(total / t, spread / t)
        wealth += math.log(1.0 - bet * (loss - risk))
        peak = max(peak, wealth)
        total += loss
        spread += (loss - total / (t + 1)) ** 2
    return -peak


def wsr_bet(n, delta):
    return lambda mean, variance: min(1.0, math.sqrt(2.0 * math.log(1.0 / delta) / (n * variance)))


def agrapa_bet(risk):
    def bet(mean, variance):
        gap = risk - mean
        return min(max(gap / (variance + gap**2), 0.0), 0.75 / (1.0 - risk))

    return bet


def laws(rng, n):
    yield rng.beta(0.3, 9.0, n)
    yield (rng.random(n) < 0.048).astype(float)
    yield np.where(rng.random(n) < 0.1, 1.0, -0.06)
    yield np.sort(rng.beta(0.3, 9.0, n))  # wealth rises, then falls: the peak is inside


@pytest.mark.parametrize("n", [3, 400, *SIZES])
def test_long_columns_give_what_the_definition_gives(n, rng):
    for losses in laws(rng, n):
        expected = slow_log_p(losses, 0.05, wsr_bet(n, 0.1))
        found = wsr_log_p(losses, risk=0.05, delta=0.1)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        expected = slow_log_p(losses, 0.05, agrapa_bet(0.05))
        found = agrapa_log_p(losses, risk=0.05, delta=0.1)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_columns_do_not_touch_each_other(rng):
    table = rng.beta(0.3, 9.0, (_BLOCK + 100, 3))
    together = wsr_log_p(table, risk=0.04, delta=0.1)
    apart = [wsr_log_p(table[:, j], risk=0.04, delta=0.1)[0] for j in range(3)]
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("n", [400, _BLOCK + 100])
def test_a_bet_never_sees_the_loss_it_is_laid_on(n, rng):
    """The stake on a unit with a huge gain is the one that the units before it suggest."""
    losses = np.append(np.full(n - 2, 0.2), [-1e9, 1.0])
    before = wsr_log_p(losses[:-2], risk=0.1, delta=0.1)
    assert before == 0.0  # losses above the level: no evidence so far
    variance = (0.25 + np.sum((0.2 - (0.5 + 0.2 * np.arange(1, n - 1)) / np.arange(2, n)) ** 2)) / (
        n - 1
    )
    bet = min(1.0, math.sqrt(2.0 * math.log(10.0) / (n * variance)))
    gain = math.log1p(bet * (1e9 + 0.1))
    start = slow_wealth_at_the_end(losses[:-2], 0.1, n)
    assert -wsr_log_p(losses, risk=0.1, delta=0.1)[0] == pytest.approx(max(start + gain, 0.0), 1e-9)


def slow_wealth_at_the_end(losses, risk, n):
    total, spread, wealth = 0.5, 0.25, 0.0
    for t, loss in enumerate(losses.tolist(), start=1):
        bet = min(1.0, math.sqrt(2.0 * math.log(10.0) * t / (n * spread)))
        wealth += math.log(1.0 - bet * (loss - risk))
        total += loss
        spread += (loss - total / (t + 1)) ** 2
    return wealth


@pytest.mark.parametrize("log_p", [wsr_log_p, agrapa_log_p])
@pytest.mark.parametrize("n", [50, _BLOCK + 50])
def test_gains_beyond_all_measure_give_numbers_and_no_warning(log_p, n, rng):
    losses = (rng.random(n) < 0.5).astype(float)
    losses[[3, n // 2]] = -1e149
    found = log_p(losses, risk=0.1, delta=0.1)
    assert np.isfinite(found).all()
    assert (found <= 0.0).all()
    raised = np.maximum(losses, -1e12)
    np.testing.assert_allclose(found, log_p(raised, risk=0.1, delta=0.1))


@pytest.mark.parametrize("n", [400, _BLOCK + 100])
def test_bounds_of_long_columns_put_back_into_the_test(n, rng):
    losses = np.stack(list(laws(rng, n)), axis=1)
    for bound, log_p in (
        (wsr_upper_bound, lambda c, m: wsr_log_p(c, risk=m, delta=0.1)),
        (mixture_upper_bound, lambda c, m: mixture_log_p(c, risk=m)),
    ):
        for column, upper in zip(losses.T, bound(losses, delta=0.1), strict=True):
            assert log_p(column, upper * (1 + 1e-9))[0] <= math.log(0.1) + 1e-6
            assert log_p(column, upper * (1 - 1e-6))[0] > math.log(0.1)


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_counting_rounds_up_and_never_down(low, rng):
    steps = 4096
    grid = low + (1.0 - low) * np.arange(steps + 1) / steps
    losses = np.concatenate([grid, np.nextafter(grid[:-1], 2.0), rng.uniform(low, 1.0, 40_000)])
    counted = LossHistogram.of(losses, bins=steps, low=low)
    expected = np.bincount(np.searchsorted(grid, losses), minlength=steps + 1)
    np.testing.assert_array_equal(counted.counts[:, 0], expected)


@pytest.mark.parametrize("method", ["wsr", "agrapa", "mixture"])
def test_the_memory_order_of_losses_is_irrelevant(method, rng):
    by_rows = rng.beta(0.3, 9.0, (_BLOCK + 3, 4))
    found = [
        control_risk(table, risk=0.05, method=method).log_p_values
        for table in (by_rows, np.asfortranarray(by_rows), by_rows[::-1][::-1])
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
