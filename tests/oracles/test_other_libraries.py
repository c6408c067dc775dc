"""Agreement with other libraries where they are right: MAPIE, statsmodels, scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from adaptive.calibration import (
    binomial_log_p,
    binomial_upper_bound,
    bonferroni,
    control_risk,
    fixed_sequence,
    hoeffding_bentkus_log_p,
    hoeffding_upper_bound,
    holm,
    maurer_pontil_upper_bound,
    normal_log_p,
)

RNG = np.random.default_rng(12)
COUNTS = RNG.integers(0, 400, 60)


def test_clopper_pearson_of_statsmodels():
    _, upper = proportion_confint(COUNTS, 500, alpha=0.2, method="beta")
    np.testing.assert_allclose(binomial_upper_bound(COUNTS, 500, delta=0.1), upper, rtol=1e-10)


def test_exact_test_of_scipy():
    expected = [stats.binomtest(int(k), 500, 0.3, alternative="less").pvalue for k in COUNTS]
    np.testing.assert_allclose(np.exp(binomial_log_p(COUNTS, 500, risk=0.3)), expected, rtol=1e-9)


def test_normal_test_of_scipy_for_many_units():
    losses = RNG.random((3000, 4)) * 0.4
    expected = stats.ttest_1samp(losses, 0.2, axis=0, alternative="less").pvalue
    np.testing.assert_allclose(np.exp(normal_log_p(losses, risk=0.2)), expected, atol=2e-4)


@pytest.fixture(scope="module")
def mapie():
    return pytest.importorskip("mapie.risk_control.methods")


def test_hoeffding_bentkus_of_mapie(mapie):
    n, risk = 500, 0.3
    means = (COUNTS + 0.5) / n  # totals that no rounding can push over an integer
    expected = mapie.compute_hoeffding_bentkus_p_value(means, n, risk)[:, 0]
    found = np.exp(hoeffding_bentkus_log_p(means * n, n, risk=risk))
    np.testing.assert_allclose(found, np.minimum(expected, 1.0), rtol=1e-9, atol=1e-300)


def test_bounds_of_mapie(mapie):
    losses = RNG.beta(0.5, 5.0, (300, 6))
    grid = np.linspace(0.0, 1.0, 6)
    bernstein = mapie.get_r_hat_plus(losses, grid, "rcps", "bernstein", 0.1, 0.25)[1]
    hoeffding = mapie.get_r_hat_plus(losses, grid, "rcps", "hoeffding", 0.1, 0.25)[1]
    np.testing.assert_allclose(maurer_pontil_upper_bound(losses, delta=0.1), bernstein, rtol=1e-12)
    np.testing.assert_allclose(
        hoeffding_upper_bound(losses.sum(axis=0), 300, delta=0.1), hoeffding, rtol=1e-12
    )


def test_multiple_testing_of_mapie():
    fwer = pytest.importorskip("mapie.risk_control.fwer_control")
    rules = {"bonferroni": bonferroni, "bonferroni_holm": holm, "fixed_sequence": fixed_sequence}
    for _ in range(20):
        p = RNG.random(12) ** 4
        for name, rule in rules.items():
            expected = np.sort(fwer.control_fwer(p, 0.1, name))
            np.testing.assert_array_equal(np.flatnonzero(rule(p, delta=0.1)), expected)


def test_a_whole_calibration_of_mapie():
    controller = pytest.importorskip("mapie.risk_control._base_controller")
    n = 400
    rates = np.linspace(0.001, 0.2, 30)
    losses = (RNG.random((n, 1)) < rates).astype(float)  # one draw per unit: a monotone risk
    table = np.column_stack([np.zeros(n), losses])
    means = losses.mean(axis=0) - 1e-9  # keeps its rounded-up counts at the true ones
    valid, _ = controller.ltt_procedure(
        means[None], np.array([[0.08]]), 0.1, np.full((1, 30), float(n)), True, "fixed_sequence"
    )
    result = control_risk(table, risk=0.08, delta=0.1, loss_type="binary")
    np.testing.assert_array_equal(np.flatnonzero(result.certified[1:]), np.sort(valid[0]))
