"""The planner, the streams, the trial of detectors, and river's detectors beside ours."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import (
    BernoulliStream,
    BetaStream,
    BurstyStream,
    LifetimeRiskMonitor,
    OnlineMonitor,
    RampStream,
    RiskMonitor,
    ScoreDrift,
    SlowingDown,
    UnsupportedError,
    early_warning_signals,
    plan_detection,
    river_detector,
    simulate_fold,
    simulate_ou,
    try_detector,
    try_monitor,
)


class BernoulliCusum:
    """The classical chart for 0/1 losses, S = max(0, S + x - 1/gamma), alarm at S >= H."""

    def __init__(self, gamma, height):
        self.gamma, self.height, self.sum = gamma, height, 0

    def update(self, x):
        self.sum = max(0, self.sum + self.gamma * int(x) - 1)

    @property
    def drift_detected(self):
        return self.sum >= self.gamma * self.height


def exact_run_length(gamma, height, p):
    """Of the chart, from its Markov chain."""
    n = gamma * height
    chain = np.zeros((n, n))
    for state in range(n):
        chain[state, max(0, state - 1)] += 1.0 - p
        if state + gamma - 1 < n:
            chain[state, state + gamma - 1] += p
    return np.linalg.solve(np.eye(n) - chain, np.ones(n))[0]


def test_known_run_lengths_of_the_bernoulli_chart():
    known = {
        0.05: (181.201, 491.779, 1195.635, 2697.122),
        0.10: (45.511, 75.331, 108.462, 142.654),
        0.20: (16.472, 23.645, 31.358, 39.184),
    }
    for p, lengths in known.items():
        found = [exact_run_length(14, height, p) for height in (2, 3, 4, 5)]
        assert found == pytest.approx(list(lengths), abs=6e-4)


@pytest.mark.statistical
def test_the_trial_measures_the_run_length_of_a_chart_that_is_known_exactly():
    losses = BernoulliStream(0.05, after=0.2).draw(12_000, 10_000, streams=60, rng=1)
    trial = try_detector(lambda: BernoulliCusum(14, 3), losses, change=10_000)
    assert trial.run_length == pytest.approx(491.8, rel=0.1)
    assert trial.false_alarms == 1.0
    assert trial.missed == 0.0
    assert 5 < np.median(trial.delays) < exact_run_length(14, 3, 0.2) * 1.2


def test_a_trial_counts_what_happened():
    losses = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]]).T

    class Eager:
        drift_detected = False

        def update(self, x):
            self.drift_detected = x == 1

    trial = try_detector(Eager, losses, change=3)
    assert trial.first_alarm.tolist() == [2, 0, 1]
    assert trial.first_detection.tolist() == [5, 0, 6]
    assert trial.alarms_before.tolist() == [1, 0, 3]
    assert trial.delays.tolist() == [2.0, math.inf, 3.0]
    assert trial.false_alarms == pytest.approx(2 / 3)
    assert trial.run_length == pytest.approx(9 / 4)
    assert trial.missed == pytest.approx(1 / 3)
    assert trial.summary()["median_delay"] == 3.0
    assert try_detector(Eager, losses[:, 1], change=6).run_length == math.inf
    assert try_detector(Eager, losses, change=6).missed == 0.0


@pytest.mark.parametrize(
    "monitor", [RiskMonitor(0.1, average_run_length=200.0), LifetimeRiskMonitor(0.1, alpha=0.1)]
)
def test_both_trials_agree_stream_by_stream(monitor):
    losses = BernoulliStream(0.1, after=0.4).draw(600, 400, streams=12, rng=2)
    one = try_detector(lambda: OnlineMonitor(monitor), losses, change=400)
    all_at_once = try_monitor(monitor, losses, change=400)
    for name in ("first_alarm", "first_detection", "alarms_before"):
        assert getattr(one, name).tolist() == getattr(all_at_once, name).tolist(), name


def test_the_online_monitor_has_rivers_names_and_stays_on_or_restarts():
    latched = OnlineMonitor(RiskMonitor(0.1, average_run_length=20.0))
    restarting = OnlineMonitor(RiskMonitor(0.1, average_run_length=20.0), restart=True)
    for detector in (latched, restarting):
        while not detector.drift_detected:
            detector.update(1.0)
        assert detector.warning_detected
        assert detector.evidence >= 20.0
        detector.update(0.0)
    assert latched.drift_detected
    assert not restarting.drift_detected
    explained = OnlineMonitor(RiskMonitor(0.1))
    explained.update(1.0, expected=1.0)
    assert explained.evidence == 1.0
    with pytest.raises(TypeError, match="`monitor` must be a RiskMonitor, Lif"):
        OnlineMonitor("ADWIN")


def test_monitors_of_scores_go_on_trial_like_those_of_losses(rng):
    scores = rng.normal(size=(400, 4)) - 1.5 * (np.arange(400) >= 200)[:, None]
    drift = ScoreDrift.fit(rng.normal(size=500), average_run_length=1e4)
    trial = try_detector(lambda: OnlineMonitor(drift), scores, change=200)
    assert trial.missed == 0.0
    state = drift.init(4)
    for row in scores:
        state = drift.update(state, drift.features(row, range(4)))
    assert trial.first_detection.tolist() == state.first_alarm.tolist()
    slowing = SlowingDown(2.0, 0.1, average_run_length=1e4)
    paths = simulate_ou(400, rate=0.2, noise=0.1, streams=4, rng=rng)
    assert try_detector(lambda: OnlineMonitor(slowing), paths, change=0).missed == 0.0
    with pytest.raises(ValueError, match="`expected` must be left out"):
        OnlineMonitor(drift).update(0.5, expected=0.1)


@pytest.mark.parametrize(
    "stream",
    [
        BernoulliStream(0.05, after=0.15),
        BetaStream(0.05, after=0.15),
        RampStream(0.05, after=0.15, length=300),
        BurstyStream(0.05, after=0.15, length=5),
    ],
    ids=lambda stream: type(stream).__name__,
)
def test_streams_have_their_means_and_are_functions_of_their_seed(stream):
    losses = stream.draw(1200, 600, streams=400, rng=5)
    assert losses.shape == (1200, 400)
    assert ((losses >= 0.0) & (losses <= 1.0)).all()
    assert losses[:600].mean() == pytest.approx(0.05, rel=0.05)
    assert losses[900:].mean() == pytest.approx(0.15, rel=0.05)
    np.testing.assert_array_equal(losses, stream.draw(1200, 600, streams=400, rng=5))
    with pytest.raises(ValueError, match="`change` must be at least 0"):
        stream.draw(10, -1)


def test_bursts_name_the_mean_that_is_too_large():
    for means, name in (((0.3, 0.1), "before"), ((0.1, 0.3), "after")):
        with pytest.raises(ValueError, match=f"`{name}` must be below 0.2, got 0.3"):
            BurstyStream(means[0], after=means[1])


def test_bursts_come_in_their_length_and_with_their_levels():
    losses, levels = BurstyStream(0.05, after=0.05).draw_with_levels(4000, 4000, streams=50, rng=6)
    hard = levels > 0.1
    assert hard.mean() == pytest.approx(1 / 6, rel=0.1)
    ends = (hard[:-1] & ~hard[1:]).sum()
    assert hard[:-1].sum() / ends == pytest.approx(20.0, rel=0.1)
    assert losses[hard].mean() == pytest.approx(0.25, rel=0.05)
    assert losses[~hard].mean() == pytest.approx(0.01, rel=0.1)


def test_paths_end_at_the_fold():
    paths = simulate_fold(300, end=-0.5, substeps=20, streams=20, rng=7)
    assert np.isnan(paths[-1]).all()
    assert not np.isnan(paths[:100]).any()


def test_the_plan_by_hand_and_in_words():
    monitor = RiskMonitor(0.05, average_run_length=1e5)
    small = {"audit_rate": 0.5, "replicates": 50, "quiet": 1000}
    plan = plan_detection(monitor, **small)
    assert plan.changed_risk == pytest.approx(0.1)
    divergence = 0.1 * math.log(2.0) + 0.9 * math.log(0.9 / 0.95)
    assert plan.least_units == pytest.approx(2.0 * math.log(1e5) / divergence)
    assert plan.median_excess == pytest.approx(0.05 * plan.median_units)
    assert plan.median_audits == pytest.approx(0.5 * plan.median_units, rel=0.1)
    assert plan.false_alarm_limit == pytest.approx(0.01)
    assert "A risk of 0.1 is found after about" in str(plan)
    rarer = plan_detection(RiskMonitor(0.05, average_run_length=1e6), **small)
    assert rarer.median_units > plan.median_units
    wider = plan_detection(monitor, factor=4, **small)
    assert wider.median_units < plan.median_units
    for_ever = LifetimeRiskMonitor(0.05, alpha=0.02)
    young = plan_detection(for_ever, replicates=50, quiet=0)
    late = plan_detection(for_ever, replicates=50, quiet=2000)
    assert young.false_alarm_limit == late.false_alarm_limit == 0.02
    assert late.median_units > 1.5 * young.median_units
    certain = plan_detection(monitor, replicates=20, quiet=200_000, audit_rate=0.01)
    assert certain.false_alarm_limit == 1.0


def test_a_plan_from_recorded_losses():
    monitor = RiskMonitor(0.05, average_run_length=1e5)
    small = {"replicates": 100, "quiet": 0}
    spread = plan_detection(monitor, factor=4, **small)
    as_recorded = plan_detection(monitor, losses=[1.0, 0.0, 0.0, 0.0, 0.0], **small)
    assert as_recorded.changed_risk == pytest.approx(spread.changed_risk) == pytest.approx(0.2)
    assert as_recorded.least_units == pytest.approx(spread.least_units)
    assert as_recorded.median_units == pytest.approx(spread.median_units, rel=0.2)
    graded = plan_detection(monitor, losses=[0.1, 0.2, 0.3], **small)
    assert graded.median_units < 0.5 * spread.median_units
    certain = plan_detection(monitor, losses=[0.2], **small)  # known to the unit
    bets = monitor.bet_sizes * 0.15
    evidence, units = np.zeros(8), 0
    while evidence.mean() < 1e5:
        evidence, units = (1.0 + bets) * (evidence + 1.0), units + 1
    assert certain.median_units == certain.q90_units == units
    # twice as close to the bound: four times as long
    near, nearer = (plan_detection(monitor, factor=f, **small) for f in (1.2, 1.1))
    assert 3.0 < nearer.least_units / near.least_units < 4.5
    assert nearer.median_units > 2.5 * near.median_units


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"losses": [0.01, 0.02]}, r"mean is above the bound 0.05, got a mean of 0.015"),
        ({"losses": [0.1, 1.5]}, r"`losses` must be in \[0, 1\], got 1.5 at position 1"),
        ({"losses": [0.1, np.nan]}, "`losses` must be finite"),
        ({"losses": [0.1], "factor": 2.0}, "`factor` must be left out where `losses` are given"),
        ({"factor": 1.0001}, r"found within 10,000,000 units: this takes about"),
        ({"factor": 1.0}, r"`factor` must be such that factor x bound is in \(0.05, 1\)"),
        ({"factor": 30.0}, "`factor` must be such that"),
        ({"audit_rate": 0.0}, r"`audit_rate` must be in \(0, 1\]"),
        ({"quiet": -1}, "`quiet` must be at least 0"),
        ({"replicates": 0}, "`replicates` must be at least 1"),
    ],
)
def test_impossible_plans_are_refused_by_name(settings, text):
    with pytest.raises(ValueError, match=text):
        plan_detection(RiskMonitor(0.05), **settings)
    with pytest.raises(TypeError, match="`monitor` must be a RiskMonitor"):
        plan_detection(0.05)


@pytest.mark.parametrize(
    ("losses", "change", "text"),
    [
        ([], 0, r"`losses` must be \[units, n_streams\]"),
        ([0.0], 2, "`change` must be at most 1"),
        ([math.nan], 1, r"`losses` must be in \[0, 1\], got nan at stream 0"),
    ],
)
def test_bad_streams_are_refused_by_name(losses, change, text):
    with pytest.raises(ValueError, match=text):
        try_monitor(RiskMonitor(0.1), losses, change=change)


def test_known_alarms_of_rivers_detectors():
    """1,000 zeros, then ones: indices 1023 and 1051, counted from 0."""
    pytest.importorskip("river")
    losses = np.repeat([0.0, 1.0], 1000)
    for name, index in (("ADWIN", 1023), ("PageHinkley", 1051)):
        trial = try_detector(lambda name=name: river_detector(name), losses, change=1000)
        assert trial.first_detection.tolist() == [index + 1], name
    for name in ("KSWIN", "DDM", "EDDM", "FHDDM", "HDDMA", "HDDMW"):
        detector = river_detector(name)
        detector.update(0)
        assert detector.drift_detected is False
    assert river_detector("ADWIN", delta=0.05).delta == 0.05


def test_without_river_the_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "river"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'adaptive-control\[river\]'"):
        river_detector("ADWIN")
    with pytest.raises(ValueError, match="`name` must be one of ADWIN, KSWIN"):
        river_detector("CUSUM")


def test_known_trends_of_a_stationary_series():
    """Made with ewstools 2.1.3 (window 0.5, Gaussian detrending 0.2) on the same series."""
    rng = np.random.default_rng([20261122, 100, 2, 1000, 0])
    factor = math.exp(-2.0)
    value, series = 0.05 * rng.standard_normal(), []
    for shock in rng.standard_normal(1000):
        value = factor * value + 0.05 * math.sqrt(1.0 - factor**2) * shock
        series.append(value)
    signals = early_warning_signals(series)
    tau = signals.tau
    assert tau["variance"] == pytest.approx(-0.17170459, abs=1e-8)
    assert tau["autocorrelation"] == pytest.approx(-0.79431537, abs=1e-8)
    textbook = stats.kendalltau(range(signals.variance.size), signals.autocorrelation).pvalue
    assert textbook < 1e-100, "of a series in which nothing happens"
