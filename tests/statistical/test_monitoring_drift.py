"""Drift without labels, slowing down, tracking: promises on long quiet streams."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive.calibration import (
    RiskTracker,
    ScoreDrift,
    SlowingDown,
    early_warning_signals,
    simulate_fold,
    simulate_ou,
)
from adaptive.calibration.conformance import violation_limit

pytestmark = pytest.mark.statistical


def keeps(alarms, level):
    """The one check that right detectors pass and wrong ones fail."""
    alarms = np.asarray(alarms)
    return int(alarms.sum()) <= violation_limit(alarms.size, level)


def drift_alarms(drift, cells, streams):
    """First alarms [n_streams] of units with one score each, drawn by `cells()` per step."""
    table = drift.features(np.append(np.array(drift.edges) - 1e-9, 1e9), np.arange(8))
    state = drift.init(streams)
    for row in cells:
        state = drift.update(state, table[row])
    return state.first_alarm


def test_the_slack_covers_the_calibration_and_a_mean_without_slack_does_not(rng):
    """True feature means are known for uniform scores and the edges each calibration chose."""
    ours, plug_in = [], []
    for seed in range(200):
        scores = rng.random(200)
        drift = ScoreDrift.fit(scores, delta=0.1, cells=4, rng=seed)
        mass = np.diff(np.concatenate([[0.0], drift.edges, [1.0]]))
        rank = mass @ np.arange(mass.size) / (mass.size - 1)
        truth = np.append(mass, [rank, 1.0 - rank])
        ours.append((truth > np.array(drift.limits)).any())
        means = drift.features(scores, np.arange(200)).mean(axis=0)
        plug_in.append((truth > means + 1e-12).any())
    assert keeps(ours, 0.1)
    assert not keeps(plug_in, 0.1)


def test_limits_that_hold_keep_the_run_length(rng):
    """At the exact boundary: the limits are the true means."""
    edges = np.arange(1, 8) / 8
    limits = (*(0.125,) * 8, 0.5, 0.5)
    drift = ScoreDrift(tuple(edges), limits, delta=0.05, average_run_length=2e4)
    first = drift_alarms(drift, rng.integers(0, 8, (2000, 1500)), 1500)
    assert keeps(first > 0, 0.1)
    less = ScoreDrift(tuple(edges), (*(0.11,) * 8, 0.48, 0.48), 0.05, average_run_length=2e4)
    assert not keeps(drift_alarms(less, rng.integers(0, 8, (2000, 300)), 300) > 0, 0.1)


def jump(capital, p):
    """One step of the simple jumper: capitals [3, n] that bet -1, 0, 1, mixed at rate 0.01."""
    mixed = 0.99 * capital + 0.01 * capital.mean(axis=0)
    return mixed * (1.0 + np.array([[-1.0], [0.0], [1.0]]) * (p - 0.5))


def test_the_peer_is_the_published_one():
    capital, found = np.full((3, 1), 1.0 / 3.0), []
    for p in (0.01, 0.5, 0.2, 0.03):
        capital = jump(capital, p)
        found.append(float(capital.sum()))
    assert found == pytest.approx([1.0, 1.0, 1.0960498, 1.3380830])


def test_on_long_quiet_streams_the_plain_conformal_martingale_alarms_and_ours_does_not(rng):
    """50,000 scores of the calibration's own law, 200 calibration scores."""
    steps, streams, n = 50_000, 150, 200
    capital = np.full((3, streams), 1.0 / 3.0)
    peak = np.zeros(streams)
    calibration = np.sort(rng.random((n, streams)), axis=0)
    ranks = np.empty((streams, 2001))
    for j in range(streams):  # the rank of a score, on a grid of 2000 scores
        ranks[j] = np.searchsorted(calibration[:, j], np.linspace(0.0, 1.0, 2001))
    row = np.arange(streams)
    for _ in range(steps):
        found = ranks[row, rng.integers(0, 2001, streams)]
        p = (n - found + rng.random(streams)) / (n + 1)
        capital = np.minimum(jump(capital, p), 1e100)
        peak = np.maximum(peak, capital.sum(axis=0))
    assert not keeps(peak >= 100.0, 0.01)
    drift = ScoreDrift.fit(rng.random(n), delta=0.05, average_run_length=1e6, cells=8)
    mass = np.diff(np.concatenate([[0.0], drift.edges, [1.0]]))
    cells = rng.choice(mass.size, (steps, 40), p=mass)
    assert keeps(drift_alarms(drift, cells, 40) > 0, steps / 1e6)


def test_drift_is_found_in_place_and_in_spread(rng):
    drift = ScoreDrift.fit(rng.normal(size=2000), average_run_length=1e4)
    for draw, limit in (
        (lambda size: rng.normal(-0.5, 1.0, size), 200),
        (lambda size: rng.normal(0.5, 1.0, size), 200),
        (lambda size: rng.normal(0.0, 1.8, size), 300),
        (lambda size: rng.normal(0.0, 0.4, size), 300),
    ):
        state = drift.init(100)
        for _ in range(2000):
            state = drift.update(state, drift.features(draw(100), np.arange(100)))
        assert (state.first_alarm > 0).all()
        assert np.median(state.first_alarm) < limit


def test_exit_depths_are_watched_with_fixed_edges(rng):
    depths = rng.choice(4, 3000, p=[0.5, 0.3, 0.15, 0.05])
    drift = ScoreDrift.fit(depths, edges=[0.5, 1.5, 2.5], average_run_length=1e4)
    state = drift.init(50)
    for _ in range(300):
        moved = rng.choice(4, 50, p=[0.35, 0.3, 0.2, 0.15])
        state = drift.update(state, drift.features(moved, np.arange(50)))
    assert drift.alarm(state).mean() > 0.9
    assert (drift.contributions(state).argmax(axis=1) >= 2).mean() > 0.9, "deeper, not shallower"


def slowing(detector, paths, escaped=None):
    """First alarms [n_streams] on paths [n, n_streams]; values after an escape are not read."""
    state = detector.init(paths.shape[1])
    for row in paths:
        state = detector.update(state, np.nan_to_num(row), active=~np.isnan(row))
    return state.first_alarm


def test_slowing_down_keeps_its_run_length_and_warns_of_the_fold(rng):
    detector = SlowingDown(2.0, 0.1, average_run_length=1e4)
    for rate in (2.0, 3.0):
        quiet = simulate_ou(1000, rate=rate, noise=0.1, streams=1500, rng=rng)
        assert keeps(slowing(detector, quiet) > 0, 0.1)
    noisier = simulate_ou(1000, rate=2.0, noise=0.13, streams=200, rng=rng)
    assert not keeps(slowing(detector, noisier) > 0, 0.1), "as its docstring admits"
    paths = simulate_fold(1000, substeps=50, streams=100, rng=rng)
    escape = np.where(np.isnan(paths).any(axis=0), np.isnan(paths).argmax(axis=0), 1000)
    mean = np.sqrt(np.linspace(1.0, 0.0, 1001)[1:])
    first = slowing(detector, paths - mean[:, None])
    assert (first > 0).all()
    assert (first < escape).all()
    assert np.median(escape - first) > 400


def test_a_fitted_detector_stays_quiet_on_its_own_traffic(rng):
    alarms = []
    for _ in range(60):
        series = simulate_ou(800, rate=2.0, noise=0.1, mean=3.0, rng=rng)
        detector = SlowingDown.fit(series[:300, 0], average_run_length=1e4)
        alarms.append(slowing(detector, series[300:])[0] > 0)
    assert keeps(alarms, 0.05 + 0.1)


def test_tau_is_no_detector_and_its_textbook_p_value_no_p_value(rng):
    quiet = simulate_ou(300, rate=2.0, noise=0.1, streams=60, rng=rng)
    signals = [early_warning_signals(path) for path in quiet.T]
    taus = np.array([signal.tau["variance"] for signal in signals])
    assert taus.std() > 0.35
    n = signals[0].variance.size
    z = taus / np.sqrt(2.0 * (2 * n + 5) / (9.0 * n * (n - 1)))
    assert not keeps(np.abs(z) > 1.96, 0.05)
    p = [signal.significance(surrogates=19, rng=rng)["variance"] for signal in signals[:40]]
    assert keeps(np.array(p) <= 0.1, 0.1)


def test_tracking_keeps_its_average_whatever_comes(rng):
    """An adversary loses only while a cheap member runs; half the streams also drift."""
    tracker = RiskTracker(0.1, step=0.05, start=0.5)
    state = tracker.init(200)
    for t in range(1, 1501):
        member = tracker.member(state, 11)
        chance = np.where(np.arange(200) < 100, member >= 1, (member / 10) * (t > 700))
        state = tracker.update(state, (rng.random(200) < chance).astype(float))
        excess = tracker.mean_loss(state) - tracker.target
        assert (excess <= tracker.excess_limit(t) + 1e-12).all()
    assert tracker.mean_loss(state)[:100].mean() == pytest.approx(0.1, abs=0.01)


def test_the_limit_of_tracking_is_nearly_reached_and_needs_positions_below_zero(rng):
    """An adversary that always loses, then lies in wait; wrong: positions cut off at 0."""
    tracker = RiskTracker(0.1, step=0.05, start=1.0)

    def worst(cut):
        state, share = tracker.init(), []
        for t in range(1, 400):
            loss = float(state.position[0] > 0.0)
            state = tracker.update(state, [loss])
            if cut:
                positions = np.maximum(state.position, 0.0)
                state = type(state)(positions, state.units, state.total)
            excess = float(tracker.mean_loss(state)[0]) - tracker.target
            share.append(excess / float(tracker.excess_limit(t)))
        return max(share)

    assert 0.8 < worst(cut=False) <= 1.0 + 1e-9
    assert worst(cut=True) > 1.0
