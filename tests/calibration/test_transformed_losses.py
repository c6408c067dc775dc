"""Covariate shift and prediction-powered losses: means, bounds, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive.calibration import (
    InvalidArgumentError,
    control_risk,
    prediction_powered_losses,
    shifted_losses,
    thin_by_weights,
    tune_power,
)

SHARES = np.array([0.8, 0.2])
WEIGHTS = np.array([0.625, 2.5])


@given(st.floats(0.01, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_the_transformed_mean_is_on_the_side_of_the_targets_risk(risk, first, second):
    conditional = np.array([first, second])
    target = float(SHARES * WEIGHTS @ conditional)
    cases = shifted_losses(conditional, weights=WEIGHTS, risk=risk, max_weight=2.5)
    mean = float(SHARES @ cases.losses[:, 0])
    assert mean == pytest.approx(target, abs=1e-12)
    assert cases.losses.max() <= cases.bound
    assert cases.bound == pytest.approx(risk + 2.5 * (1 - risk))
    unscaled = shifted_losses(conditional, weights=WEIGHTS / 2, risk=risk, max_weight=1.25)
    assert np.sign(round(float(SHARES @ unscaled.losses[:, 0]) - risk, 9)) == np.sign(
        round(mean - risk, 9)
    )


def test_equal_weights_change_nothing():
    losses = np.array([[0.0, 0.5], [1.0, -0.2]])
    same = shifted_losses(losses, weights=[1, 1], risk=0.1, max_weight=1.0)
    np.testing.assert_allclose(same.losses, losses)
    assert same.bound == 1.0


def test_shifted_losses_pass_through_the_one_door(rng):
    group = rng.random(2000) < 0.2
    losses = (rng.random((2000, 2)) < np.where(group, 0.03, 0.01)[:, None]).astype(float)
    losses[:, 0] = 0.0
    moved = shifted_losses(losses, weights=WEIGHTS[group.astype(int)], risk=0.1, max_weight=2.5)
    assert control_risk(moved.losses, risk=0.1, bound=moved.bound).index == 1


def test_thinning_keeps_units_in_proportion(rng):
    group = (rng.random(40_000) < 0.2).astype(int)
    kept = thin_by_weights(WEIGHTS[group], max_weight=2.5, rng=3)
    assert kept.size / 40_000 == pytest.approx(1 / 2.5, abs=0.01)
    assert group[kept].mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(kept, thin_by_weights(WEIGHTS[group], max_weight=2.5, rng=3))


@pytest.mark.parametrize("weights", [[3.0, 1.0], [-1.0, 1.0], [1.0], [np.nan, 1.0]])
def test_weights_outside_their_bound_are_refused(weights):
    with pytest.raises(InvalidArgumentError, match="weights"):
        shifted_losses([0.0, 1.0], weights=weights, risk=0.1, max_weight=2.5)


@given(
    hnp.arrays(np.float64, (6, 2), elements=st.floats(-0.5, 1)),
    hnp.arrays(np.float64, (6, 2), elements=st.floats(0, 1)),
    hnp.arrays(np.float64, (20, 2), elements=st.floats(0, 1)),
    st.floats(0, 2),
)
def test_the_mean_is_graded_corrected_by_the_proxy_gap(graded, proxy, plenty, power):
    found = prediction_powered_losses(graded, proxy=proxy, proxy_plenty=plenty, power=power)
    used = plenty[:18]
    expected = graded.mean(axis=0) + power * (used.mean(axis=0) - proxy.mean(axis=0))
    np.testing.assert_allclose(found.losses.mean(axis=0), expected, atol=1e-12)
    assert found.losses.max() <= found.bound == 1 + power


def test_agreement_that_dominates_keeps_the_bound():
    proxy = np.array([[1.0], [0.0], [1.0]])
    graded = np.array([[1.0], [0.0], [0.0]])
    found = prediction_powered_losses(
        graded, proxy=proxy, proxy_plenty=np.ones((9, 1)), power=0.3, rectifier_bound=1 - 0.3
    )
    assert found.bound == pytest.approx(1.0)
    with pytest.raises(InvalidArgumentError, match="at most"):
        prediction_powered_losses(
            [[1.0]], proxy=[[0.0]], proxy_plenty=[[0.0]], power=0.3, rectifier_bound=0.7
        )


def test_a_good_proxy_lowers_the_variance_and_tuning_finds_its_weight(rng):
    proxy = (rng.random(4000) < 0.1).astype(float)
    graded = proxy * (rng.random(4000) < 0.5)
    plenty = (rng.random((40_000, 1)) < 0.1).astype(float)
    power = tune_power(graded[:2000], proxy=proxy[:2000], plenty_per_graded=20)
    assert power == pytest.approx(0.5 / 1.05, abs=0.05)

    def variance(weight):
        return prediction_powered_losses(
            graded[2000:], proxy=proxy[2000:], proxy_plenty=plenty, power=weight
        ).losses.var()

    assert variance(power) < 0.7 * variance(0.0)
    assert variance(0.0) == pytest.approx(graded[2000:].var())
    assert tune_power(graded, proxy=np.zeros(4000), plenty_per_graded=2) == 0.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"proxy": [[0.0], [0.0]]}, "proxy"),
        ({"proxy_plenty": np.zeros((0, 1))}, "proxy_plenty"),
        ({"proxy_plenty": [[-1.0]]}, "non-negative"),
        ({"power": -1.0}, "at least 0"),
        ({"graded": [[2.0]]}, "at most"),
    ],
)
def test_what_does_not_fit_is_refused(changes, text):
    arguments = {"graded": [[0.5]], "proxy": [[0.5]], "proxy_plenty": [[0.5]], **changes}
    graded = arguments.pop("graded")
    with pytest.raises(InvalidArgumentError, match=text):
        prediction_powered_losses(graded, **arguments)
