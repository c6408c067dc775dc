"""Drift, tracking, audits and upper curves: known answers, saving, errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.calibration import (
    EvidenceAudits,
    ExpectedLossCurve,
    RiskTracker,
    ScoreAudits,
    ScoreDrift,
    UniformAudits,
    audit_coins,
    corrected_losses,
    corrected_range,
)

DRIFT = ScoreDrift((0.25, 0.5, 0.75), (0.3, 0.3, 0.3, 0.3, 0.55, 0.55), 0.05)


def test_tracking_known_positions():
    tracker = RiskTracker(0.1, step=0.05, start=0.1)
    state, found = tracker.init(), []
    for loss in (0, 0, 1, 0, 1, 1, 0):
        state = tracker.update(state, [loss])
        found.append(float(state.position[0]))
    assert found == pytest.approx([0.105, 0.11, 0.065, 0.07, 0.025, -0.02, -0.015])
    assert tracker.member(state, 100).tolist() == [0]
    assert tracker.mean_loss(state).tolist() == pytest.approx([3 / 7])
    again = tracker.from_dict(json.loads(json.dumps(tracker.to_dict(state))))
    assert again.position.tobytes() == state.position.tobytes()
    with pytest.raises(ValueError, match=r"a state of a RiskTracker with target = 0\.2"):
        RiskTracker(0.2, step=0.05, start=0.1).from_dict(tracker.to_dict(state))


@given(
    st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=60),
    st.floats(0.01, 0.9),
    st.floats(0.001, 3.0),
    st.floats(0.0, 1.0),
)
def test_tracking_keeps_its_limit_for_every_sequence(wanted, target, step, start):
    """Whatever is wanted where a member above full computation runs; 0 at full computation."""
    tracker = RiskTracker(target, step=step, start=start)
    state = tracker.init()
    for t, loss in enumerate(wanted, start=1):
        full = state.position[0] <= 0.0
        state = tracker.update(state, [min(loss, 0.0) if full else loss])
        excess = float(tracker.mean_loss(state)[0]) - target
        assert excess <= float(tracker.excess_limit(t)) + 1e-9


def test_tracking_members():
    tracker = RiskTracker(0.1)
    state = type(tracker.init())(np.array([-1.0, 0.0, 0.5, 1.0]), np.ones(4, np.int64), np.ones(4))
    assert tracker.member(state, 11).tolist() == [0, 0, 5, 10]
    assert tracker.member(state, 1).tolist() == [0, 0, 0, 0]


def test_drift_features_are_shares_and_ranks():
    found = DRIFT.features([0.1, 0.3, 0.3, 0.9, 0.75], ["a", "a", "a", "a", "b"])
    np.testing.assert_allclose(found[0], [0.25, 0.5, 0.0, 0.25, 5 / 12, 7 / 12])
    np.testing.assert_allclose(found[1], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    assert DRIFT.features([0.1, 0.9]).shape == (1, 6)


def test_drift_by_hand():
    """One unit: each factor is 1 + share (x - m) / m, the evidence their weighted mean."""
    table = DRIFT.features([0.9])
    state = DRIFT.update(DRIFT.init(), table)
    limits, shares = np.array(DRIFT.limits), np.geomspace(0.02, 0.9, 6)
    factors = 1.0 + (table[0] - limits)[:, None] * shares / limits[:, None]
    weights = np.array([0.125] * 4 + [0.25] * 2)
    assert float(DRIFT.evidence(state)[0]) == pytest.approx(float(weights @ factors.mean(axis=1)))
    assert int(DRIFT.contributions(state)[0].argmax()) in (3, 4)
    np.testing.assert_allclose(DRIFT.contributions(state).sum(axis=1), DRIFT.evidence(state))


def test_drift_saves_exactly_and_refuses_others():
    state = DRIFT.update(DRIFT.init(2), DRIFT.features([0.1, 0.8], [0, 1]))
    again = DRIFT.from_dict(json.loads(json.dumps(DRIFT.to_dict(state))))
    assert again.statistics.tobytes() == state.statistics.tobytes()
    assert ScoreDrift.from_settings(json.loads(json.dumps(DRIFT.settings()))) == DRIFT
    other = ScoreDrift(DRIFT.edges, (0.4,) * 6, 0.05)
    with pytest.raises(ValueError, match="a state of a ScoreDrift with limits"):
        other.from_dict(DRIFT.to_dict(state))


def test_a_limit_of_one_is_never_bet_on():
    drift = ScoreDrift((0.5,), (1.0, 1.0, 1.0, 1.0), 0.05)
    state = drift.update(drift.init(), drift.features([0.9]))
    assert float(drift.evidence(state)[0]) == pytest.approx(1.0, rel=1e-12)


def test_coins_are_a_function_of_seed_and_unit():
    p = np.full(2000, 0.3)
    first = audit_coins(p, seed=1, unit=5)
    np.testing.assert_array_equal(first, audit_coins(p, seed=1, unit=5))
    assert (first != audit_coins(p, seed=1, unit=6)).any()
    assert (first != audit_coins(p, seed=2, unit=5)).any()
    assert abs(first.mean() - 0.3) < 0.04
    assert audit_coins([1.0, 0.0], seed=0, unit=0).tolist() == [True, False]


def test_audit_probabilities():
    assert UniformAudits(0.2).probabilities(3).tolist() == [0.2] * 3
    audits = EvidenceAudits(0.02, 0.5)
    assert audits.probabilities(2, warned=[False, True]).tolist() == [0.02, 0.5]
    expected = np.linspace(0.0, 0.3, 50) ** 2
    scored = ScoreAudits.fit(expected, rate=0.1)
    p = scored.probabilities(50, expected=expected)
    assert p.mean() == pytest.approx(0.1, abs=1e-9)
    assert p.min() == pytest.approx(0.025)
    assert (np.diff(p) >= 0.0).all()


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.01, 1.0))
def test_corrected_losses_are_unbiased_and_in_range(loss, expected, p):
    known = {"expected": [expected], "probabilities": [p]}
    seen = float(corrected_losses([loss], audited=[True], **known)[0])
    unseen = float(corrected_losses([math.nan], audited=[False], **known)[0])
    assert p * seen + (1.0 - p) * unseen == pytest.approx(loss, abs=1e-9)
    low, high = corrected_range([expected], [p])
    assert low - 1e-9 <= min(seen, unseen)
    assert max(seen, unseen) <= high + 1e-9


def test_curves_save_and_answer_for_ties_and_missing_scores(rng):
    scores = rng.integers(0, 3, 300).astype(float)  # ties everywhere
    losses = (rng.random(300) < np.array([0.3, 0.1, 0.0])[scores.astype(int)]).astype(float)
    curve = ExpectedLossCurve.fit(scores, losses, bins=3)
    assert ExpectedLossCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    values = curve([0.0, 1.0, 2.0, math.nan])
    assert (values >= np.array([0.3, 0.1, 0.0, 1.0])).all()
    assert values[3] == 1.0
    assert curve(np.zeros((2, 3))).shape == (2, 3)


def test_a_bin_without_units_is_at_the_upper_end(rng):
    curve = ExpectedLossCurve.fit(rng.random(50), np.zeros(50), edges=[2.0])
    assert curve.values[1] == 1.0
    assert curve.values[0] < 0.15


def test_signed_and_scaled_losses_have_curves(rng):
    scores = rng.random(2000)
    losses = rng.uniform(-1.0, 1.0, 2000)
    curve = ExpectedLossCurve.fit(scores, 3.0 * losses, bins=2, lower=-3.0, upper=3.0)
    plain = ExpectedLossCurve.fit(scores, losses, bins=2, lower=-1.0, upper=1.0)
    np.testing.assert_allclose(curve.values, 3.0 * np.array(plain.values))
    assert all(0.0 < value < 0.25 for value in plain.values)


def test_more_confidence_is_a_higher_curve(rng):
    scores, losses = rng.random(500), rng.random(500)
    low = ExpectedLossCurve.fit(scores, losses, confidence=0.8).values
    high = ExpectedLossCurve.fit(scores, losses, confidence=0.99).values
    assert all(a < b for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: UniformAudits(0.0), r"`rate` must be in \(0, 1\]"),
        (lambda: EvidenceAudits(0.1, 2.0), r"`warned_rate` must be in \(0, 1\]"),
        (lambda: EvidenceAudits(0.1, 0.5).probabilities(1), "`warned` must be given"),
        (lambda: ScoreAudits(1.0, 0.1).probabilities(1), "`expected` must be given"),
        (lambda: ScoreAudits(1.0, 0.1).probabilities(1, expected=[math.nan]), "`expected` must be"),
        (lambda: ScoreAudits.fit([0.0], rate=0.1), "`expected` must be positive somewhere"),
        (lambda: ScoreAudits.fit([], rate=0.1), "`expected` must be a non-empty vector"),
        (
            lambda: corrected_losses([math.nan], expected=[0.1], audited=[True], probabilities=[1]),
            "`losses` must be finite",
        ),
        (
            lambda: corrected_losses([1.0], expected=[0.1], audited=[True], probabilities=[0.0]),
            r"`probabilities` must be in \(0, 1\]",
        ),
        (lambda: RiskTracker(1.0), r"`target` must be in \(0, 1\)"),
        (lambda: RiskTracker(0.1, start=2.0), r"`start` must be in \[0, 1\]"),
        (lambda: RiskTracker(0.1).update(RiskTracker(0.1).init(), [math.nan]), "`losses` must be"),
        (lambda: RiskTracker(0.1).update(RiskTracker(0.1).init(), [2.0]), "`losses` must be"),
        (lambda: ScoreDrift((0.5,), (0.5,), 0.05), "`limits` must be 4 numbers"),
        (lambda: ScoreDrift.fit([]), "`scores` must be a non-empty vector"),
        (lambda: ScoreDrift.fit([math.nan] * 50), "`scores` must be finite, got nan at position 0"),
        (lambda: ScoreDrift.fit(np.arange(5.0)), "`unit_ids` must be at least 10 units"),
        (lambda: ScoreDrift.fit(np.arange(50.0), edges=[2, 1]), "`edges` must be"),
        (lambda: DRIFT.update(DRIFT.init(), [[0.5] * 5]), r"`features` must be of shape \(1, 6\)"),
        (lambda: DRIFT.update(DRIFT.init(), [[math.nan] * 6]), r"`features` must be in \[0, 1\]"),
        (lambda: ExpectedLossCurve.fit([], []), "`scores` must be a non-empty vector"),
        (lambda: ExpectedLossCurve.fit([0.5] * 20, [0.0]), r"`losses` must be of shape \(20,\)"),
        (
            lambda: ExpectedLossCurve.fit([0.5] * 20, [0.0] * 19 + [2.0]),
            r"`losses` must be in \[0, 1\], got 2.0 at position 19",
        ),
        (lambda: ExpectedLossCurve.fit([0.5] * 20, [0.0] * 20, [1] * 20), "at least 10 units"),
        (lambda: ExpectedLossCurve.fit([0.5], [0.0], confidence=1.0), "`confidence` must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()
