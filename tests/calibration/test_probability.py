"""Probability maps, their error measures, and Beta mixtures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from adaptive.calibration import (
    BetaCalibration,
    BetaMixtureModel,
    Histogram,
    InvalidArgumentError,
    Platt,
    Temperature,
    beta_from_likelihood,
    beta_from_moments,
    brier_score,
    expected_calibration_error,
    fit_beta_calibration,
    fit_beta_mixture,
    fit_histogram,
    fit_isotonic,
    fit_labelled_mixture,
    fit_platt,
    fit_temperature,
    maximise_beta_mixture,
    negative_log_likelihood,
    reliability_curve,
)


def test_temperature_known_answer_and_recovery(rng):
    assert Temperature(2.0)([2.0, 0.0])[0] == pytest.approx(0.7311, abs=5e-5)
    assert Temperature(1.0)([2.0, 0.0])[0] == pytest.approx(0.8808, abs=5e-5)
    logits = 2.0 * rng.normal(size=(8000, 4))
    cumulative = np.cumsum(Temperature(1.7)(logits), axis=1)
    labels = (rng.random(8000)[:, None] > cumulative).sum(axis=1)
    assert fit_temperature(logits, labels).temperature == pytest.approx(1.7, rel=0.05)


def test_temperature_of_separated_and_of_contradicted_labels():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, [0, 1]).temperature < 0.1
    assert fit_temperature(logits, [1, 0]).temperature > 100
    assert np.isfinite(Temperature(1e-3)([1000.0, 0.0])).all()


def test_platt_and_beta_recover_their_parameters(rng):
    scores = rng.normal(size=20_000)
    labels = rng.random(20_000) < Platt(1.5, -0.4)(scores)
    found = fit_platt(scores, labels)
    assert found.slope == pytest.approx(1.5, abs=0.08)
    assert found.intercept == pytest.approx(-0.4, abs=0.06)
    scores = rng.random(20_000)
    labels = rng.random(20_000) < BetaCalibration(2.0, 0.5, 0.3)(scores)
    beta = fit_beta_calibration(scores, labels)
    np.testing.assert_allclose([beta.a, beta.b, beta.c], [2.0, 0.5, 0.3], atol=0.15)


def test_platt_is_finite_for_separated_one_sided_and_constant_data():
    separated = fit_platt([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1])
    assert 0 < separated.slope < 100
    assert fit_platt([1.0, 2.0], [1, 1])([1.5])[0] == pytest.approx(3 / 4, abs=1e-6)
    assert fit_platt([1.0, 1.0], [0, 1])([7.0])[0] == pytest.approx(0.5)


def test_weights_count_like_copies(rng):
    scores, labels = rng.random(50), rng.random(50) < 0.5
    copies = rng.integers(0, 4, 50)
    for fit in (fit_platt, fit_beta_calibration):
        weighted = fit(scores, labels, weights=copies)
        repeated = fit(np.repeat(scores, copies), np.repeat(labels, copies))
        grid = np.linspace(0.01, 0.99, 9)
        np.testing.assert_allclose(weighted(grid), repeated(grid), atol=1e-5)


def test_beta_calibration_is_monotone_and_the_identity_at_one_one_zero(rng):
    grid = np.linspace(0.001, 0.999, 50)
    np.testing.assert_allclose(BetaCalibration(1.0, 1.0, 0.0)(grid), grid)
    reversed_labels = rng.random(2000) > rng.random(2000)
    scores = np.where(reversed_labels, rng.random(2000) * 0.5, 0.5 + rng.random(2000) * 0.5)
    assert (np.diff(fit_beta_calibration(scores, reversed_labels)(grid)) >= -1e-12).all()


def test_isotonic_is_scikit_learns(rng):
    scores, labels = rng.random(300), rng.random(300) < 0.4
    ours = fit_isotonic(scores, labels)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, labels)
    grid = np.linspace(-0.5, 1.5, 101)
    np.testing.assert_allclose(ours(grid), theirs.predict(grid), atol=1e-12)


def test_histogram_bins_hold_equal_counts_and_ties_never_split(rng):
    scores = rng.permutation(np.arange(100.0))
    found = fit_histogram(scores, scores >= 50, n_bins=4)
    assert found.counts == (25, 25, 25, 25)
    assert found.values == (0.0, 0.0, 1.0, 1.0)
    assert found([49.0, 50.0, -5.0, 500.0]).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert fit_histogram([1.0, 1.0, 1.0], [0, 1, 1]) == Histogram((), (2 / 3,), (3,))


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic, fit_histogram, fit_beta_calibration])
def test_bad_scores_and_labels_are_refused(fit):
    for scores, labels in (([], []), ([math.nan], [1]), ([0.5], [2]), ([0.5], [0, 1])):
        with pytest.raises(InvalidArgumentError):
            fit(scores, labels)
    with pytest.raises(InvalidArgumentError, match=r"in 0\.\.1"):
        fit_temperature([[0.0, 1.0]], [2])


@given(
    hnp.arrays(np.float64, 30, elements=st.floats(0.001, 0.999)),
    hnp.arrays(np.int64, 30, elements=st.integers(0, 1)),
)
def test_error_measures_agree_with_scikit_learn(p, y):
    assert brier_score(p, y) == pytest.approx(brier_score_loss(y, p, labels=[0, 1]))
    assert negative_log_likelihood(p, y) == pytest.approx(log_loss(y, p, labels=[0, 1]))
    curve = reliability_curve(p, y, n_bins=7)
    assert curve.counts.sum() == 30
    assert np.average(curve.observed, weights=curve.counts) == pytest.approx(y.mean())
    assert np.average(curve.predicted, weights=curve.counts) == pytest.approx(p.mean())
    assert expected_calibration_error(p, y, n_bins=1) == pytest.approx(abs(p.mean() - y.mean()))


def test_reliability_display(rng):
    p = rng.random(500)
    curve = reliability_curve(p, rng.random(500) < p, equal_mass=True, n_bins=5)
    assert curve.counts.tolist() == [100] * 5
    lower, upper = curve.intervals()
    assert ((lower <= curve.observed) & (curve.observed <= upper)).all()
    axes = curve.plot()
    assert axes.get_xlabel() == "predicted probability"
    assert len(curve.to_frame()) == 5
    assert negative_log_likelihood([0.0], [1]) == math.inf
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\]"):
        brier_score([1.2], [1])


def test_moments_known_answer():
    assert beta_from_moments([0.2, 0.4, 0.6, 0.8]) == pytest.approx((2.0, 2.0))
    weighted = beta_from_moments([0.2, 0.8], weights=[1.0, 3.0])
    assert weighted == pytest.approx(beta_from_moments([0.2, 0.8, 0.8, 0.8]))


@pytest.mark.parametrize("estimator", [beta_from_moments, beta_from_likelihood])
@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3], [0.0, 0.0], [0.0, 1.0], [1.0]])
def test_degenerate_samples_have_finite_answers(estimator, values):
    alpha, beta = estimator(values)
    assert 0 < alpha <= 1e6
    assert 0 < beta <= 1e6
    assert alpha / (alpha + beta) == pytest.approx(np.mean(values), abs=2e-4)
    assert estimator(values, weights=[0.0] * len(values)) == (1.0, 1.0)


def test_likelihood_puts_back_into_its_equations(rng):
    from scipy import special

    values = rng.beta(0.7, 3.0, 500)
    weights = rng.random(500)
    alpha, beta = beta_from_likelihood(values, weights=weights)
    clipped = np.clip(values, 1e-4, 1 - 1e-4)
    for shape, logs in ((alpha, np.log(clipped)), (beta, np.log1p(-clipped))):
        expected = np.average(logs, weights=weights)
        assert special.digamma(shape) - special.digamma(alpha + beta) == pytest.approx(
            expected, abs=1e-5
        )


def two_betas(rng, n=20_000, share=0.7):
    labels = rng.random(n) < share
    return np.where(labels, rng.beta(8, 2, n), rng.beta(2, 3, n)), labels


@pytest.mark.parametrize("estimator", [beta_from_moments, beta_from_likelihood])
def test_labelled_pairs_recover_both_components_within_a_tenth(rng, estimator):
    found = fit_labelled_mixture(*two_betas(rng), estimator=estimator)
    np.testing.assert_allclose(found.alpha, [2, 8], rtol=0.1)
    np.testing.assert_allclose(found.beta, [3, 2], rtol=0.1)
    np.testing.assert_allclose(found.weights, [0.3, 0.7], rtol=0.1)


def test_greatest_likelihood_recovers_unlabelled_components(rng):
    values, _ = two_betas(rng)
    start = fit_beta_mixture(values)
    best = maximise_beta_mixture(values, start=start)
    em = fit_beta_mixture(values[:2000], estimator=beta_from_likelihood)
    assert best.mean_log_likelihood(values) >= start.mean_log_likelihood(values)
    np.testing.assert_allclose(best.alpha, [2, 8], rtol=0.15)
    np.testing.assert_allclose(best.beta, [3, 2], rtol=0.15)
    assert (np.diff(em.means) > 0).all()


def test_em_proper_never_lowers_the_likelihood(rng):
    values, _ = two_betas(rng, n=500)
    mixture = BetaMixtureModel((0.5, 0.5), (1.0, 2.0), (2.0, 1.0))
    likelihoods = [mixture.mean_log_likelihood(values)]
    for _ in range(15):
        mixture = fit_beta_mixture(
            values, start=mixture, estimator=beta_from_likelihood, tolerance=math.inf
        )
        likelihoods.append(mixture.mean_log_likelihood(values))
    assert (np.diff(likelihoods) >= -1e-7).all()


def test_the_decision_point_of_the_published_example():
    mixture = BetaMixtureModel((0.1, 0.9), (2.0, 8.0), (3.0, 2.0))
    assert mixture.crossing(0.4, weighted=False) == pytest.approx(0.5961, abs=5e-5)
    assert mixture.crossing(0.4) < 0.5
    grid = np.linspace(0.3, 0.9, 10)
    passing = int((mixture.posterior(grid, weighted=False) > 0.4).sum())
    assert grid[10 - passing] == pytest.approx(0.6333, abs=5e-5)


def test_a_posterior_that_falls_again_has_no_crossing_before_its_end():
    # Beta(20, 20) against Beta(2, 2): the narrow component wins only in the middle.
    mixture = BetaMixtureModel((0.5, 0.5), (2.0, 20.0), (2.0, 20.0))
    assert mixture.crossing(0.6) == math.inf
    assert mixture.posterior(0.5) > 0.6
    certain = BetaMixtureModel((0.0, 1.0), (1.0, 8.0), (1.0, 2.0))
    assert certain.crossing(0.9) == 0.0


@pytest.mark.parametrize("values", [[0.5] * 10, [0.5], [0.0, 1.0]])
def test_mixtures_of_degenerate_samples_are_finite(values):
    for found in (
        fit_beta_mixture(values),
        maximise_beta_mixture(values, start=fit_beta_mixture(values)),
        fit_labelled_mixture(values, [1] * len(values)),
    ):
        assert np.isfinite([found.alpha, found.beta]).all()
        assert np.isfinite(found.posterior(np.linspace(0, 1, 5))).all()
    empty = fit_labelled_mixture(values, [1] * len(values))
    assert empty.weights == (0.0, 1.0)
    assert (empty.alpha[0], empty.beta[0]) == (1.0, 1.0)


def test_impossible_mixtures_are_refused():
    for arguments in (
        ((0.5, 0.6), (1, 1), (1, 1)),
        ((1.0,), (0.0,), (1.0,)),
        ((1.0,), (1, 1), (1,)),
    ):
        with pytest.raises(InvalidArgumentError):
            BetaMixtureModel(*arguments)
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\]"):
        beta_from_moments([1.5])
    with pytest.raises(InvalidArgumentError, match="not all zero"):
        fit_beta_mixture([0.5], weights=[0.0])
