"""What the monitors promise holds over thousands of quiet streams; wrong variants fail it.

False alarms within T units: at most T/A (average run length), alpha (lifetime), beta (recovery);
each is compared with the exact 99.9 % binomial limit.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import (
    BernoulliStream,
    BurstyStream,
    EvidenceAudits,
    ExpectedLossCurve,
    LifetimeRiskMonitor,
    MeanEProcess,
    RecoveryTest,
    RiskMonitor,
    ScoreAudits,
    UniformAudits,
    combine_evidence,
    control_risk,
    corrected_losses,
    corrected_range,
    plan_detection,
    try_monitor,
)
from adaptive.calibration.conformance import violation_limit

pytestmark = pytest.mark.statistical
RISK = 0.05


def alarmed(monitor, losses, **companions):
    """Whether each stream (column) alarms."""
    trial = try_monitor(monitor, losses, change=losses.shape[0], **companions)
    return trial.first_alarm > 0


def keeps(alarms, level):
    """The one check that right monitors pass and wrong ones fail."""
    return int(alarms.sum()) <= violation_limit(alarms.size, level)


def run_lengths(monitor, risk, rng, streams=2000):
    """Units to the first alarm, and the evidence then, of streams at one risk."""
    lengths, evidence = np.zeros(streams), np.zeros(streams)
    running, state = np.arange(streams), monitor.init(streams)
    while running.size:
        state = monitor.update(state, (rng.random(running.size) < risk).astype(float))
        ended = monitor.alarm(state)
        lengths[running[ended]] = state.units[ended]
        evidence[running[ended]] = monitor.evidence(state)[ended]
        running = running[~ended]
        state = type(state)(*(getattr(state, name)[~ended] for name in vars(state)))
    return lengths, evidence


@pytest.mark.parametrize("bets", [None, (0.05 / 0.0475,)])
def test_the_run_length_is_as_promised(rng, bets):
    monitor = RiskMonitor(RISK, average_run_length=300.0, bets=bets)
    lengths, evidence = run_lengths(monitor, RISK, rng)
    error = lengths.std() / np.sqrt(lengths.size)
    assert lengths.mean() + 3.09 * error >= 300.0
    assert lengths.mean() < 2 * 300.0, "and not vacuously long"
    gap = lengths - evidence  # a martingale stopped at the alarm: mean 0
    assert abs(gap.mean()) < 5.0 * gap.std() / np.sqrt(gap.size)
    for units in (15, 30, 60):
        assert keeps(lengths <= units, units / 300.0)


def test_a_bound_that_is_only_an_estimate_shortens_the_run(rng):
    wrong = RiskMonitor(0.7 * RISK, average_run_length=300.0)
    lengths, _ = run_lengths(wrong, RISK, rng)
    error = lengths.std() / np.sqrt(lengths.size)
    assert lengths.mean() + 3.09 * error < 300.0


def test_known_run_lengths():
    """Simulated before with other code: 1245 +- 18 for one bet, 1265 +- 14 for eight."""
    rng = np.random.default_rng(3)
    for bets, expected, error in (((0.05 / 0.0475,), 1245.0, 18.0), (None, 1265.0, 14.0)):
        monitor = RiskMonitor(RISK, average_run_length=1000.0, bets=bets)
        lengths, _ = run_lengths(monitor, RISK, rng, streams=400)
        own = lengths.std() / np.sqrt(lengths.size)
        assert abs(lengths.mean() - expected) < 4.0 * np.hypot(own, error)


def test_the_lifetime_form_keeps_alpha_and_needs_its_weights(rng):
    losses = (rng.random((2500, 2000)) < RISK).astype(float)
    assert keeps(alarmed(LifetimeRiskMonitor(RISK, alpha=0.1), losses), 0.1)
    without_weights = RiskMonitor(RISK, average_run_length=10.0)
    assert not keeps(alarmed(without_weights, losses[:200]), 0.1)


def test_graded_and_signed_losses_keep_the_promise(rng):
    graded = rng.beta(1.0, 19.0, (1000, 1000))
    assert keeps(alarmed(RiskMonitor(RISK, average_run_length=1e4), graded), 0.1)
    signed = np.where(rng.random((1000, 1000)) < 0.3, 0.5, -0.5)  # mean -0.2
    exact = RiskMonitor(-0.2, average_run_length=1e4, lower=-0.5)
    assert keeps(alarmed(exact, signed), 0.1)
    cut_off = RiskMonitor(0.1, average_run_length=1e4)  # mean of the positive part: 0.15
    assert not keeps(alarmed(cut_off, np.maximum(signed, 0.0)), 0.1)


def test_bursts_are_no_alarm_given_their_difficulty_or_in_blocks(rng):
    stream = BurstyStream(RISK, after=RISK, length=20)
    losses, levels = stream.draw_with_levels(2000, 2000, streams=1500, rng=rng)
    monitor = RiskMonitor(RISK, average_run_length=2e4)
    assert keeps(alarmed(monitor, losses, expected=levels), 0.1)
    assert not keeps(alarmed(monitor, losses), 0.1), "single units in bursts"
    blocks = losses[:1920].reshape(-1, 128, 1500).mean(axis=1)
    per_block = RiskMonitor(RISK, average_run_length=2e4 / 128)
    assert keeps(alarmed(per_block, blocks), 15 / (2e4 / 128))


def test_an_upper_curve_keeps_the_promise_and_a_plug_in_curve_does_not(rng):
    """Every stream has a curve of its own from 100 calibration units; levels add up."""
    streams, n = 300, 100
    stream = BurstyStream(RISK, after=RISK, length=20)
    losses, levels = stream.draw_with_levels(1000, 1000, streams=streams, rng=rng)
    upper, plug_in = np.empty_like(losses), np.empty_like(losses)
    for j in range(streams):
        hard = rng.random(n) < 1.0 / 6.0
        seen = (rng.random(n) < np.where(hard, 0.25, 0.01)).astype(float)
        curve = ExpectedLossCurve.fit(-hard.astype(float), seen, edges=[-0.5], confidence=0.95)
        score = -(levels[:, j] > 0.1).astype(float)
        upper[:, j] = curve(score)
        plug_in[:, j] = np.where(score < -0.5, seen[hard].mean(), seen[~hard].mean())
    monitor = RiskMonitor(RISK, average_run_length=2e4)
    assert keeps(alarmed(monitor, losses, expected=upper), 0.05 + 0.05)
    assert not keeps(alarmed(monitor, losses, expected=plug_in), 0.05 + 0.05)


def clustered(rng, n_units, tokens=20):
    """Scores, losses, unit ids; tokens of a unit share their fate. True ratios by simulation."""
    hard = rng.beta(0.5, 0.5, n_units)
    scores = np.clip(hard[:, None] + rng.normal(0.0, 0.2, (n_units, tokens)), 0.0, 1.0)
    losses = rng.random((n_units, tokens)) < 0.4 * hard[:, None] ** 2
    return scores.ravel(), losses.ravel().astype(float), np.repeat(np.arange(n_units), tokens)


def test_the_curve_is_above_the_truth_with_its_confidence_whatever_tokens_share(rng):
    edges = np.array([0.3, 0.7])
    scores, losses, _ = clustered(rng, 200_000, tokens=20)
    cells = np.searchsorted(edges, scores, side="right")
    truth = np.bincount(cells, losses) / np.bincount(cells)
    ours, tokens_as_units = [], []
    for _ in range(300):
        s, x, units = clustered(rng, 60)
        curve = ExpectedLossCurve.fit(s, x, units, edges=edges, confidence=0.9)
        ours.append((truth > np.array(curve.values)).any())
        cells = np.searchsorted(edges, s, side="right")
        k, n = np.bincount(cells, x, minlength=3), np.bincount(cells, minlength=3)
        limits = stats.beta.isf(0.1 / 3, k + 1, n - k)
        tokens_as_units.append((truth > limits).any())
    assert keeps(np.array(ours), 0.1)
    assert not keeps(np.array(tokens_as_units), 0.1)


def draw_scored(rng, units, streams):
    """Expected losses 0.3 s^5 of uniform scores (mean 0.05), and losses."""
    expected = 0.3 * rng.random((units, streams)) ** 5
    return expected, (rng.random((units, streams)) < expected).astype(float)


def test_audits_by_score_need_their_correction_and_keep_the_promise_with_it(rng):
    expected, losses = draw_scored(rng, 2000, 1500)
    audits = ScoreAudits.fit(expected[:, 0], rate=0.2)
    p = audits.probabilities(expected.size, expected=expected.ravel()).reshape(expected.shape)
    seen = rng.random(p.shape) < p
    low, high = corrected_range(expected, p)
    whole = corrected_losses(
        losses.ravel(), expected=expected.ravel(), audited=seen.ravel(), probabilities=p.ravel()
    ).reshape(p.shape)
    corrected = RiskMonitor(RISK, average_run_length=2e4, lower=low, upper=high)
    plain = RiskMonitor(RISK, average_run_length=2e4)
    assert keeps(alarmed(corrected, whole), 0.1)
    assert keeps(alarmed(plain, losses, expected=np.maximum(expected, 1e-6), audited=seen), 0.1)
    assert not keeps(alarmed(plain, losses, audited=seen), 0.1), "as if audits were uniform"


def test_audits_by_evidence_keep_the_promise_and_audits_by_loss_do_not(rng):
    audits, monitor = (
        EvidenceAudits(0.05, 0.5),
        RiskMonitor(RISK, average_run_length=1e4, warn=0.01),
    )
    state, cheat = monitor.init(2000), monitor.init(2000)
    more = 0
    for _ in range(1000):
        losses = (rng.random(2000) < RISK).astype(float)
        p = audits.probabilities(2000, warned=monitor.warning(state))
        more += int((p > 0.05).sum())
        state = monitor.update(state, losses, audited=rng.random(2000) < p)
        chosen = rng.random(2000) < np.where(losses > 0.0, 0.5, 0.05)
        cheat = monitor.update(cheat, losses, audited=chosen)
    assert more > 10_000, "the higher rate was used"
    assert keeps(monitor.alarm(state), 0.1)
    assert not keeps(monitor.alarm(cheat), 0.1)


def test_a_wrong_resume_has_its_probability_and_recovery_is_not_held_back_by_the_incident(rng):
    test, plain = RecoveryTest(RISK, beta=0.05), MeanEProcess(level=RISK)
    quiet = (rng.random((2000, 2000)) < RISK).astype(float)
    state = test.init(2000)
    for row in quiet:
        state = test.update(state, row)
    assert keeps(test.resume(state), 0.05)
    wrong = RecoveryTest(1.2 * RISK, beta=0.05)  # the upper bound taken for the level
    state = wrong.init(2000)
    for row in quiet:
        state = wrong.update(state, row)
    assert not keeps(wrong.resume(state), 0.05)
    state, never_restarted = test.init(400), plain.init(400)
    for risk, units in ((0.3, 200), (0.01, 800)):
        for _ in range(units):
            losses = (rng.random(400) < risk).astype(float)
            state = test.update(state, losses)
            never_restarted = plain.update(never_restarted, losses)
    assert np.median(state.first_alarm) - 200 < 500
    assert (never_restarted.log_peak < np.log(20.0)).mean() > 0.9


def test_delay_beside_the_first_order_formula_and_a_product_that_never_restarts(rng):
    losses = BernoulliStream(RISK, after=0.1).draw(5000, 3000, streams=200, rng=rng)
    monitor = RiskMonitor(RISK, average_run_length=1e5)
    trial = try_monitor(monitor, losses, change=3000)
    plan = plan_detection(monitor, quiet=3000)
    assert keeps(trial.first_alarm > 0, 3000 / 1e5)
    assert trial.missed == 0.0
    assert 0.4 * plan.least_units < np.median(trial.delays) < plan.least_units
    assert np.median(trial.delays) < 1.1 * plan.median_units, "quiet time only helps"
    lifetime = try_monitor(LifetimeRiskMonitor(RISK), losses, change=3000)
    assert np.median(trial.delays) < np.median(lifetime.delays) < 3 * np.median(trial.delays)
    log_wealth = np.zeros((200, 8))
    found = np.zeros(200)
    for t, row in enumerate(losses, start=1):
        log_wealth += np.log1p(monitor.bet_sizes * (row - RISK)[:, None])
        wealth = np.logaddexp.reduce(log_wealth, axis=1) - np.log(8.0)
        found[(found == 0) & (wealth >= np.log(1e5))] = t
    never_restarted = np.where(found > 0, found - 3000, np.inf)
    assert np.median(never_restarted) > 4 * np.median(trial.delays)


@pytest.mark.parametrize(
    ("monitor", "rate", "factor", "quiet"),
    [
        (RiskMonitor(RISK, average_run_length=1e4), 1.0, 4.0, 0),
        (RiskMonitor(RISK, average_run_length=1e4), 0.1, 2.0, 2000),
        (LifetimeRiskMonitor(RISK, alpha=0.05), 0.5, 3.0, 1000),
    ],
)
def test_the_planner_says_what_happens(rng, monitor, rate, factor, quiet):
    plan = plan_detection(monitor, audit_rate=rate, factor=factor, quiet=quiet)
    units = quiet + int(4 * plan.q90_units)
    risk = np.where(np.arange(units) < quiet, RISK, factor * RISK)[:, None]
    losses = (rng.random((units, 400)) < risk).astype(float)
    audited = rng.random((units, 400)) < UniformAudits(rate).probabilities()[0]
    trial = try_monitor(monitor, losses, change=quiet, audited=audited)
    assert np.median(trial.delays) == pytest.approx(plan.median_units, rel=0.12)
    assert np.quantile(trial.delays, 0.9) == pytest.approx(plan.q90_units, rel=0.15)


def test_late_and_missing_labels_keep_the_promise_and_labels_by_complaint_do_not(rng):
    """Labels come up to 50 units late, one in three never; or losses are reported more often."""
    units, streams = 1000, 2000
    losses = (rng.random((units, streams)) < RISK).astype(float)
    arrival = np.arange(units)[:, None] + rng.integers(0, 50, (units, streams))
    never = rng.random((units, streams)) < 1 / 3
    late = RiskMonitor(RISK, average_run_length=1e4)
    state = late.init(streams)
    arrived = np.argsort(np.where(never, units + 60, arrival), axis=0, kind="stable")
    ordered = np.take_along_axis(losses, arrived, axis=0)
    for t, row in enumerate(ordered):
        state = late.update(state, row, active=t < units - never.sum(axis=0))
    assert (state.units == units - never.sum(axis=0)).all()
    assert keeps(late.alarm(state), 0.1)
    complaint, missing = late.init(streams), late.init(streams)
    for t, row in enumerate(losses):
        missing = late.update(missing, row, audited=~never[t])
        told = rng.random(streams) < np.where(row > 0.0, 0.9, 0.3)
        complaint = late.update(complaint, row, audited=told)
    assert keeps(late.alarm(missing), 0.1)
    assert not keeps(late.alarm(complaint), 0.1)


def test_the_mean_of_dependent_evidence_keeps_the_promise_and_the_largest_does_not(rng):
    """Eight detectors on losses that share half of their luck; wrong: the largest of them."""
    streams, tenants, length = 1500, 8, 1e4
    monitor = RiskMonitor(RISK, average_run_length=length)
    state = monitor.init(streams * tenants)
    peaks = {"mean": np.zeros(streams), "largest": np.zeros(streams)}
    for _ in range(1000):
        own = rng.random((streams, tenants)) < RISK
        shared = rng.random((streams, 1)) < RISK
        losses = np.where(rng.random((streams, tenants)) < 0.5, shared, own)
        state = monitor.update(state, losses.ravel().astype(float))
        evidence = monitor.evidence(state).reshape(streams, tenants)
        peaks["mean"] = np.maximum(peaks["mean"], combine_evidence(evidence))
        peaks["largest"] = np.maximum(peaks["largest"], evidence.max(axis=1))
    assert keeps(peaks["mean"] >= length, 0.1)
    assert not keeps(peaks["largest"] >= length, 0.1)


def test_a_certificate_and_its_monitor_are_quiet_on_ten_times_the_traffic(rng):
    """Levels add up, delta + alpha; wrong: the cheapest member whose measured mean is low."""
    replicates, n, risk, delta, alpha = 400, 200, 0.05, 0.1, 0.05
    risks = np.append(0.0, np.linspace(0.01, 0.12, 23))
    certified, measured = np.zeros(replicates), np.zeros(replicates)
    for i in range(replicates):
        losses = (rng.random((n, 1)) < risks).astype(float)
        found = control_risk(losses, risk=risk, delta=delta, loss_type="binary", rng=i)
        certified[i] = risks[found.index or 0]
        measured[i] = risks[losses.mean(axis=0) <= risk].max()
    monitor = LifetimeRiskMonitor(risk, alpha=alpha)
    quiet = (rng.random((10 * n, replicates)) < certified).astype(float)
    assert certified.mean() > 0.01, "something was certified"
    assert keeps(alarmed(monitor, quiet), delta + alpha)
    hoped = (rng.random((10 * n, replicates)) < measured).astype(float)
    assert not keeps(alarmed(monitor, hoped), delta + alpha)
