"""Slowing down and its indicators: known answers, the fold's normal form, errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adaptive.calibration import (
    MovingIndicators,
    SlowingDown,
    early_warning_signals,
    simulate_fold,
    simulate_ou,
)


def test_known_log_ratios():
    detector = SlowingDown(rate=2.0, noise=0.1)
    found = detector.log_ratios([0.05, 0.05], [0.08, 0.0], rate=0.5)
    assert found.tolist() == pytest.approx([0.4244086341, -0.5364707395], abs=1e-10)
    shifted = SlowingDown(rate=2.0, noise=0.1, mean=3.0)
    assert float(shifted.log_ratios(3.05, 3.08, rate=0.5)) == pytest.approx(0.4244086341)


def test_rolling_indicators_by_their_definitions(rng):
    x = rng.normal(size=60)
    signals = early_warning_signals(x, window=20, bandwidth=0.0)
    assert signals.window == 20
    assert signals.variance.size == 41
    np.testing.assert_array_equal(signals.residuals, x)
    for start in (0, 17, 40):
        part = x[start : start + 20]
        assert signals.variance[start] == pytest.approx(part.var(ddof=1))
        expected = np.corrcoef(part[:-1], part[1:])[0, 1]
        assert signals.autocorrelation[start] == pytest.approx(expected)
        assert signals.return_rate[start] == pytest.approx(1.0 - expected)
        centred = part - part.mean()
        assert signals.skewness[start] == pytest.approx(
            (centred**3).mean() / (centred**2).mean() ** 1.5
        )
    np.testing.assert_allclose(
        early_warning_signals(x + 5.0).residuals, early_warning_signals(x).residuals, atol=1e-12
    )


def test_indicators_of_the_fold_follow_its_normal_form():
    """Rate 2 sqrt(r): variance sigma^2 / (2 rate), autocorrelation exp(-rate)."""
    for r, variance, autocorrelation in ((1.0, 0.0025, 0.1353), (0.25, 0.005, 0.3679)):
        path = simulate_fold(400, start=r, end=r, substeps=50, streams=20, rng=1)[50:]
        assert np.var(path) == pytest.approx(variance, rel=0.1)
        z = path - path.mean(axis=0)
        assert (z[1:] * z[:-1]).mean() / (z * z).mean() == pytest.approx(autocorrelation, abs=0.04)
    ou = simulate_ou(20_000, rate=0.5, noise=0.1, mean=2.0, rng=2)[:, 0]
    assert ou.mean() == pytest.approx(2.0, abs=0.01)
    assert ou.var() == pytest.approx(0.01, rel=0.05)
    assert np.corrcoef(ou[1:], ou[:-1])[0, 1] == pytest.approx(0.6065, abs=0.02)


def test_moving_indicators_agree_with_the_stationary_values():
    indicators = MovingIndicators(0.005)
    state = indicators.init(4)
    for row in simulate_ou(6000, rate=0.5, noise=0.1, streams=4, rng=3):
        state = indicators.update(state, row)
    assert state.variance.mean() == pytest.approx(0.01, rel=0.25)
    assert indicators.autocorrelation(state).mean() == pytest.approx(0.6065, abs=0.1)
    frozen = indicators.update(state, [math.nan] * 4, active=[False] * 4)
    assert frozen.variance.tobytes() == state.variance.tobytes()
    constant = indicators.update(indicators.init(), [1.0])
    assert indicators.autocorrelation(constant).tolist() == [0.0]


def test_the_detector_reads_pairs_and_saves_exactly():
    detector = SlowingDown(2.0, 0.1, average_run_length=100.0)
    state = detector.update(detector.init(2), [0.05, math.nan], active=[True, False])
    assert detector.evidence(state).tolist() == [0.0, 0.0], "one value is no pair"
    state = detector.update(state, [0.08, 0.05])
    assert detector.evidence(state)[0] > 0.0
    assert detector.evidence(state)[1] == 0.0
    again = detector.from_dict(json.loads(json.dumps(detector.to_dict(state))))
    assert again.statistics.tobytes() == state.statistics.tobytes()
    wild = detector.update(again, [1e99, -1e99])
    assert np.isfinite(wild.statistics).all()
    assert detector.alarm(wild).all()
    calm = detector.update(wild, [0.0, 0.0])
    assert np.isfinite(calm.statistics).all()
    assert detector.alarm(calm).all()


def test_fitted_parameters_are_near_the_truth_on_the_cautious_side():
    series = simulate_ou(5000, rate=1.0, noise=0.2, mean=4.0, rng=5)[:, 0]
    detector = SlowingDown.fit(series)
    assert detector.mean == pytest.approx(4.0, abs=0.02)
    assert 0.85 < detector.rate < 1.0
    assert detector.noise == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SlowingDown(0.0, 0.1), "`rate` must be positive"),
        (lambda: SlowingDown(1.0, -0.1), "`noise` must be positive"),
        (lambda: SlowingDown(1.0, 0.1, average_run_length=1.0), "`average_run_length` must be"),
        (lambda: SlowingDown.fit(np.zeros(10)), "`series` must be at least 30 values"),
        (lambda: SlowingDown.fit(np.ones(50)), "`series` must be values that vary"),
        (lambda: early_warning_signals([]), "`series` must be a non-empty vector"),
        (lambda: early_warning_signals([math.nan] * 50), "`series` must be finite, got nan"),
        (lambda: early_warning_signals(np.ones(50), window=60), "`window` must be from 10 to 49"),
        (lambda: early_warning_signals(np.ones(50), bandwidth=2.0), "`bandwidth` must be in"),
        (lambda: MovingIndicators(0.0), "`memory` must be in"),
        (
            lambda: SlowingDown(1.0, 1.0).update(SlowingDown(1.0, 1.0).init(), [math.nan]),
            "`values` must be in .* got nan at stream 0",
        ),
        (
            lambda: SlowingDown(1.0, 1.0).update(SlowingDown(1.0, 1.0).init(), []),
            r"`values` must be of shape \(1,\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_series_without_variation_has_no_trend():
    signals = early_warning_signals(np.ones(40), bandwidth=0.0)
    assert signals.tau["autocorrelation"] == 0.0
    assert signals.tau["variance"] == 0.0
