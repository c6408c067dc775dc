"""The Beta-mixture threshold: FREE as released lives here, and what it gets wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from adaptive.calibration import InvalidArgumentError, Trace, beta_from_likelihood
from adaptive.policies import BetaMixtureThreshold, BetaMixtureTracker, Features, exit_stages

AGREE, DISAGREE = (8.0, 2.0), (2.0, 3.0)


def shapes(agree, disagree, *, prior: float = 0.5):
    """Mixture in the order of the library: disagreement first."""
    return ((1 - prior, prior), (disagree[0], agree[0]), (disagree[1], agree[1]))


def released_moments(c: NDArray, r: NDArray) -> tuple[float, float]:
    """FREE's M-step."""
    mean = (r * c).sum() / r.sum()
    variance = (r * (c - mean) ** 2).sum() / r.sum()
    alpha = mean * (mean * (1 - mean) / variance - 1)
    return alpha, alpha * (1 - mean) / mean


def released_fit(c: NDArray, y: NDArray) -> tuple[tuple[float, float], tuple[float, float]]:
    """FREE's labelled E-step: the blend with the mixture density is overwritten by hard labels."""
    c = np.clip(c, 1e-4, 1 - 1e-4)
    responsibility = np.maximum((1 - 0.8) * np.stack([y == 0, y == 1]), 1e-4)
    responsibility = responsibility / responsibility.sum(axis=0)
    return released_moments(c, responsibility[1]), released_moments(c, responsibility[0])


def released_threshold(agree, disagree, *, zeta: float) -> float:
    """FREE's decision: ten grid points, no mixing weights, a count of passing points."""
    grid = np.linspace(0.3, 0.9, 10)
    f, g = stats.beta(*agree).pdf(grid), stats.beta(*disagree).pdf(grid)
    count = int((f / (f + g) > zeta).sum())
    return float(grid[np.clip(10 - count, 0, 9)])


def test_moments() -> None:
    assert released_moments(np.array([0.2, 0.4, 0.6, 0.8]), np.ones(4)) == pytest.approx((2, 2))


def test_known_answers() -> None:
    """Released grid .6333 for any prior; the continuous crossing .5961; lower with prior .9."""
    assert released_threshold(AGREE, DISAGREE, zeta=0.4) == pytest.approx(0.6333, abs=1e-4)
    rule = BetaMixtureThreshold((shapes(AGREE, DISAGREE),), target=0.4)
    assert rule.thresholds()[0] == pytest.approx(0.5961, abs=1e-4)
    likely = BetaMixtureThreshold((shapes(AGREE, DISAGREE, prior=0.9),), target=0.4)
    grid = np.linspace(0.3, 0.9, 10)
    f, g = stats.beta(*AGREE).pdf(grid), stats.beta(*DISAGREE).pdf(grid)
    count = int((0.9 * f / (0.9 * f + 0.1 * g) > 0.4).sum())
    assert grid[10 - count] - 0.0667 < likely.thresholds()[0] < grid[10 - count] < 0.5961
    unweighted = BetaMixtureThreshold((shapes(AGREE, DISAGREE, prior=0.9),), 0.4, weighted=False)
    assert unweighted.thresholds() == rule.thresholds()


def labelled_trace(n: int, *, prior: float = 0.5, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    y = rng.uniform(size=n) < prior
    c = np.where(y, rng.beta(*AGREE, n), rng.beta(*DISAGREE, n))
    return Trace(
        scores=c[:, None],
        losses={"disagreement": ~y[:, None]},
        costs=[1.0, 2.0],
        cost_quantity="layers",
    )


@pytest.mark.parametrize("estimator", [None, beta_from_likelihood])
def test_parameters_are_recovered(estimator) -> None:
    trace = labelled_trace(20_000)
    given = {} if estimator is None else {"estimator": estimator}
    ((weights, alpha, beta),) = BetaMixtureThreshold.fit(trace, **given).mixtures
    np.testing.assert_allclose(alpha, (2.0, 8.0), rtol=0.1)
    np.testing.assert_allclose(beta, (3.0, 2.0), rtol=0.1)
    np.testing.assert_allclose(weights, (0.5, 0.5), atol=0.02)
    released = released_fit(trace.scores[:, 0].astype(float), ~trace.losses["disagreement"][:, 0])
    assert released_threshold(*released, zeta=0.4) == pytest.approx(0.6333, abs=1e-4)


def test_unlabelled_scores_find_the_components() -> None:
    trace = labelled_trace(20_000, prior=0.7)
    rule = BetaMixtureThreshold.fit_unlabelled(trace).with_knob(0.5)
    truth = BetaMixtureThreshold((shapes(AGREE, DISAGREE, prior=0.7),), target=0.5)
    assert rule.thresholds()[0] == pytest.approx(truth.thresholds()[0], abs=0.12)


def test_the_prior_moves_the_threshold_the_release_does_not_see_it() -> None:
    found, released = [], []
    for prior in (0.3, 0.9):
        trace = labelled_trace(20_000, prior=prior)
        found.append(BetaMixtureThreshold.fit(trace).with_knob(0.4).thresholds()[0])
        y = ~trace.losses["disagreement"][:, 0]
        fitted = released_fit(trace.scores[:, 0].astype(float), y)
        released.append(released_threshold(*fitted, zeta=0.4))
    assert found[1] < found[0] - 0.1
    assert released[0] == released[1]


def test_the_released_sample_of_labels_is_biased_ours_is_the_traffic() -> None:
    """FREE drops tokens that go deep with nothing stacked before them: diffident ones.

    What is left agrees more often than the traffic, and its posterior asks for less confidence.
    """
    trace = labelled_trace(20_000)
    scores = trace.scores[:, 0]
    deep = scores <= 0.6
    stacked_before = np.concatenate([[False], ~deep[:-1]])
    kept = ~(deep & ~stacked_before)
    agree = ~trace.losses["disagreement"][:, 0]
    assert agree[kept].mean() > agree.mean() + 0.05
    ours = BetaMixtureThreshold.fit(trace).with_knob(0.4).thresholds()[0]
    theirs = BetaMixtureThreshold.fit(trace.select(kept)).with_knob(0.4).thresholds()[0]
    truth = BetaMixtureThreshold((shapes(AGREE, DISAGREE),), target=0.4).thresholds()[0]
    assert abs(ours - truth) < 0.02
    assert abs(theirs - truth) > 2 * abs(ours - truth)


def test_posterior_that_is_not_monotone() -> None:
    """Beta(20, 20) against Beta(2, 2): the ratio falls again, a count of points misreads that."""
    agree, disagree = (20.0, 20.0), (2.0, 2.0)
    released = released_threshold(agree, disagree, zeta=0.4)
    f = stats.beta(*agree).pdf([released, 0.9])
    g = stats.beta(*disagree).pdf([released, 0.9])
    assert (f / (f + g))[1] < 0.4
    assert released < 0.9
    rule = BetaMixtureThreshold((shapes(agree, disagree),), target=0.4)
    assert rule.thresholds() == (math.inf,)


@pytest.mark.parametrize(
    ("scores", "agree"),
    [
        (np.full(100, 0.7), np.arange(100) % 2 == 0),
        (np.linspace(0.1, 0.9, 100), np.ones(100, dtype=bool)),
        (np.linspace(0.1, 0.9, 100), np.zeros(100, dtype=bool)),
        (np.array([0.5]), np.array([True])),
        (np.tile([0.0, 1.0], 50), np.tile([False, True], 50)),
    ],
    ids=["ties", "all agree", "none agrees", "one token", "ends"],
)
@pytest.mark.filterwarnings("ignore:exit 0 has fewer:UserWarning")
def test_degenerate_samples_never_give_nan(scores: NDArray, agree: NDArray) -> None:
    trace = Trace(
        scores=scores[:, None],
        losses={"disagreement": ~agree[:, None]},
        costs=[1.0, 2.0],
        cost_quantity="layers",
    )
    rule = BetaMixtureThreshold.fit(trace)
    for target in (0.2, 0.4, 0.9):
        assert not math.isnan(rule.with_knob(target).thresholds()[0])
    assert rule.knobs(trace, size=5)[0] == math.inf


def test_the_release_divides_by_zero_on_ties() -> None:
    with pytest.warns(RuntimeWarning, match="divide"), np.errstate(all="warn"):
        assert not math.isfinite(released_moments(np.full(4, 0.5), np.ones(4))[0])


def test_an_exit_of_one_label_never_stops_and_says_so() -> None:
    scores = np.linspace(0.1, 0.9, 50)[:, None]
    trace = Trace(
        scores=scores,
        losses={"disagreement": np.zeros((50, 1), dtype=bool)},
        costs=[1.0, 2.0],
        cost_quantity="layers",
    )
    with pytest.warns(UserWarning, match="exit 0 has fewer than 10 tokens of one label"):
        rule = BetaMixtureThreshold.fit(trace)
    assert (exit_stages(rule.with_knob(0.1), trace) == 1).all()


def test_equality_goes_on() -> None:
    """FREE leaves at confidence strictly above the threshold."""
    rule = BetaMixtureThreshold((shapes(AGREE, DISAGREE),), target=0.4)
    state = rule.init(2, device=torch.device("cpu"))
    edge = state["knob"][0]
    here = Features(stage=0, position=torch.zeros(2, dtype=torch.int64))
    scores = torch.stack([edge, torch.nextafter(edge, torch.tensor(1.0))])
    assert rule.decide(here, scores, state)[0].tolist() == [False, True]


def test_tracker_follows_the_traffic_and_promises_nothing() -> None:
    tracker = BetaMixtureTracker(target=0.5, window=400)
    with pytest.raises(InvalidArgumentError, match="run the first unit at full depth"):
        tracker.rule()
    rng = np.random.default_rng(0)
    for prior in (0.3, 0.9):
        for _ in range(60):
            y = rng.uniform(size=(20, 1)) < prior
            c = np.where(y, rng.beta(*AGREE, (20, 1)), rng.beta(*DISAGREE, (20, 1)))
            c[0] = np.nan
            before = tracker
            tracker = tracker.observe(c, y)
            assert tracker is not before
        assert len(tracker.scores[0]) == 400
        truth = BetaMixtureThreshold((shapes(AGREE, DISAGREE, prior=prior),), target=0.5)
        assert tracker.rule().thresholds()[0] == pytest.approx(truth.thresholds()[0], abs=0.1)
    assert "not a guarantee" in tracker.statement()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BetaMixtureThreshold((), 0.4), "mixtures"),
        (lambda: BetaMixtureThreshold((shapes(AGREE, DISAGREE),), 0.0), "target"),
        (lambda: BetaMixtureTracker(target=1.0), "target"),
        (lambda: BetaMixtureTracker(target=0.5, window=3), "window"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
