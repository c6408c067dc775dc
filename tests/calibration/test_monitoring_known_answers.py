"""Numbers made by other programs or by hand, and forms that ours must be equal to.

The groups of known answers that have a test of their own elsewhere: the Shiryaev-Roberts and the
lifetime form, powers of p-values (test_monitor.py); run lengths of the classical chart, river's
alarms, trends of a stationary series (test_detector_trial.py); likelihood ratios of a slower
return (test_early_warning.py); positions of the tracker (test_drift_tracking_audits.py); simulated
run lengths (tests/statistical/test_monitoring.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.sparse import linalg

from adaptive.calibration import (
    RiskMonitor,
    average_e,
    combine_evidence,
    constant_bet_log_wealth,
    early_warning_signals,
    p_to_log_e,
    river_detector,
    simulate_fold,
)

LOSSES = [0, 1, 0, 0, 1, 1, 0, 1]


def factors(monitor, losses):
    """E-factors [n, n_bets]: what one unit does to a fresh state, whose statistic is 0 + 1."""
    fresh = monitor.init(len(losses))
    return monitor.update(fresh, np.asarray(losses, float)).statistics


def optimal_bet(bound, risk):
    return (risk - bound) / (bound * (1.0 - bound))


def test_product_and_cusum_of_the_same_factors():
    found = factors(RiskMonitor(0.1, bets=(2.0,)), LOSSES)[:, 0]
    product = [0.8, 2.24, 1.792, 1.4336, 4.01408, 11.239424, 8.9915392, 25.17630976]
    assert np.cumprod(found).tolist() == pytest.approx(product)
    cusum, statistic = [], 0.0
    for factor in found:
        statistic = factor * max(statistic, 1.0)
        cusum.append(statistic)
    expected = [0.8, 2.8, 2.24, 1.792, 5.0176, 14.04928, 11.239424, 31.4703872]
    assert cusum == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "units", "shape", "expected"),
    [(3, 20, 1.0, 0.7992167017), (5, 20, 1.0, 21.214502155), (10, 100, 0.5, 0.6259936271)],
)
def test_beta_binomial_evidence_is_a_mixture_of_our_bets(losses, units, shape, expected):
    """Risks above the bound by the monitor's bets, below it by those of the mixture test."""
    bound = 0.05
    edge = math.asin(math.sqrt(bound))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x = np.repeat([1.0, 0.0], [losses, units - losses])
    total = 0.0
    for low, high in ((edge, math.pi / 2.0), (0.0, edge)):
        angles = low + (high - low) * (nodes + 1.0) / 2.0
        risks = np.sin(angles) ** 2
        bets = optimal_bet(bound, risks)
        if low == edge:
            ones, zeros = factors(RiskMonitor(bound, bets=tuple(bets)), [1.0, 0.0])
            products = ones**losses * zeros ** (units - losses)
        else:
            wealth = [constant_bet_log_wealth(x, bet=-bet, risk=bound)[0] for bet in bets]
            products = np.exp(wealth)
        density = stats.beta.pdf(risks, shape, shape) * np.sin(2.0 * angles)
        total += (high - low) / 2.0 * float(weights @ (density * products))
    assert total == pytest.approx(expected, rel=1e-9)


def test_mixture_over_powers_of_p_values():
    p = [0.01, 0.5, 0.2, 0.03]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    logs = [p_to_log_e(p, power=power).sum() for power in (nodes + 1.0) / 2.0]
    mixture = float(np.exp(average_e(logs, weights=weights)))
    assert mixture == pytest.approx(6.384592854628711, rel=1e-12)


def test_best_step_of_the_bernoulli_chart():
    bound, risk = 0.05, 0.0977442
    ones, zeros = np.log(factors(RiskMonitor(bound, bets=(optimal_bet(bound, risk),)), [1, 0]))
    assert float(1.0 - ones[0] / zeros[0]) == pytest.approx(14.0, abs=1e-4)


def test_normal_form_of_the_fold():
    """A small noise leaves the linear process: its rate is 2 sqrt(r) by the path's own slope."""
    for r, rate in ((1.0, 2.0), (0.25, 1.0), (0.0625, 0.5)):
        ends = {"start": r, "end": r, "substeps": 200, "streams": 40, "rng": 1}
        deviation = simulate_fold(150, noise=1e-4, **ends)[20:] - math.sqrt(r)
        slope = (deviation[1:] * deviation[:-1]).sum() / (deviation[:-1] ** 2).sum()
        assert slope == pytest.approx(math.exp(-rate), abs=0.04)
        assert deviation.var() == pytest.approx(1e-8 / (2.0 * rate), rel=0.12)


def test_known_trends_on_the_way_to_the_fold():
    """Made with ewstools 2.1.3 (window 0.5, Gaussian detrending 0.2) on the same series."""
    rng = np.random.default_rng([20261122, 100, 0, 1000, 0])
    shocks = 0.1 * math.sqrt(0.01) * rng.normal(size=(1000, 100))
    levels = np.linspace(1.0, 0.1, 1001)[:-1]
    x, series = 1.0, []
    for level, row in zip(levels, shocks, strict=True):
        for shock in row:
            x += (level - x * x) * 0.01 + shock
        series.append(x)
    tau = early_warning_signals(series).tau
    assert tau["variance"] == pytest.approx(0.95490619, abs=1e-8)
    assert tau["autocorrelation"] == pytest.approx(0.81199202, abs=1e-8)


def test_rivers_window_is_cut_where_its_formula_says():
    """Halves of 100 that differ by d: variance d^2/4, cut above epsilon at d = 0.16987."""
    pytest.importorskip("river")
    log_term = math.log(2.0 * math.log(200.0) / 0.002)
    harmonic = 2.0 / (100 - 5 + 1)

    def epsilon(variance):
        return math.sqrt(2.0 * harmonic * variance * log_term) + 2.0 / 3.0 * harmonic * log_term

    assert log_term == pytest.approx(8.5751445739)
    assert epsilon(0.0475) == pytest.approx(0.2493744784)
    for difference in (0.1696, 0.1701):
        settings = {"clock": 200, "max_buckets": 200, "min_window_length": 5, "grace_period": 5}
        detector = river_detector("ADWIN", **settings)
        for value in (0.4,) * 100 + (0.4 + difference,) * 100:
            detector.update(value)
        assert detector.drift_detected == (difference > epsilon(difference**2 / 4.0))


def test_a_bet_that_is_right_is_the_likelihood_ratio(rng):
    bound, risk = 0.05, 0.12
    monitor = RiskMonitor(bound, average_run_length=1e12, bets=(optimal_bet(bound, risk),))
    state, expected = monitor.init(), 0.0
    for loss in (rng.random(400) < risk).astype(int):
        state = monitor.update(state, [loss])
        ratio = stats.bernoulli.pmf(loss, risk) / stats.bernoulli.pmf(loss, bound)
        expected = ratio * (expected + 1.0)
        assert float(state.statistics[0, 0]) == pytest.approx(expected, rel=1e-8)


def test_the_order_within_a_step_does_not_matter(rng):
    evidence = rng.random((5, 4))
    order = rng.permutation(4)
    np.testing.assert_allclose(
        combine_evidence(evidence[:, order]), combine_evidence(evidence), rtol=1e-14
    )


def test_the_cusum_form_is_many_times_more_cautious_than_promised():
    """Why ours is of the other form: its run length at A = 1000, simulated elsewhere as 73,713."""
    monitor = RiskMonitor(0.05, bets=(optimal_bet(0.05, 0.1),))
    up, down = np.log(factors(monitor, [1.0, 0.0]))[:, 0]
    size = 4001
    grid = np.linspace(0.0, math.log(1000.0), size)
    chain = sparse.lil_array((size, size))
    for state, position in enumerate(grid):
        for step, chance in ((up, 0.05), (down, 0.95)):
            place = max(position + step, 0.0) / grid[1]
            if position + step < grid[-1]:
                left = min(int(place), size - 2)
                chain[state, left] += chance * (1.0 - (place - left))
                chain[state, left + 1] += chance * (place - left)
    system = (sparse.eye_array(size) - chain).tocsc()
    length = linalg.spsolve(system, np.ones(size))[0]
    assert length == pytest.approx(73_713.0, abs=4 * 980.0)
    assert length > 50 * 1000.0


@pytest.mark.statistical
def test_the_cusum_form_of_the_grid_too(rng):
    """26,556 +- 417 elsewhere, with the eight default bets."""
    monitor = RiskMonitor(0.05)
    ones, zeros = factors(monitor, [1.0, 0.0])
    running, lengths = np.zeros((100, ones.size)), []
    step = 0
    while running.size:
        step += 1
        lost = rng.random(running.shape[0]) < 0.05
        running = np.where(lost[:, None], ones, zeros) * np.maximum(running, 1.0)
        ended = running.mean(axis=1) >= 1000.0
        if ended.any():
            lengths += [step] * int(ended.sum())
            running = running[~ended]
    error = np.std(lengths) / math.sqrt(len(lengths))
    assert abs(np.mean(lengths) - 26_556.0) < 4.0 * math.hypot(error, 417.0)
