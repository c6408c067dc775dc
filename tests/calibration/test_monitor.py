"""The risk monitors and the recovery test: known answers, errors, saving, extremes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.calibration import (
    InvalidArgumentError,
    LifetimeRiskMonitor,
    RecoveryTest,
    RiskMonitor,
    combine_evidence,
    p_to_log_e,
)

X = [0, 1, 0, 0, 1, 1, 0, 1]
KINDS = [
    RiskMonitor(0.1, average_run_length=500.0),
    LifetimeRiskMonitor(0.1, alpha=0.01),
    RecoveryTest(0.1, beta=0.01),
]


def evidence(monitor, values, **settings):
    """Evidence after each of the values of one stream."""
    state, found = monitor.init(), []
    for value in values:
        state = monitor.update(state, [value], **settings)
        found.append(float(monitor.evidence(state)[0]))
    return found


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        (
            RiskMonitor(0.1, average_run_length=1e9, bets=(2.0,)),
            [0.8, 5.04, 4.832, 4.6656, 15.86368, 47.218304, 38.5746432, 110.80900096],
        ),
        (
            RiskMonitor(0.1, average_run_length=1e9, bets=(1.0, 4.0)),
            [
                *(0.75, 5.485, 4.5825, 4.12185, 15.954475, 62.1891185),
                *(41.39933625, 165.451439035),
            ],
        ),
        (
            LifetimeRiskMonitor(0.1, alpha=1e-9, bets=(2.0,)),
            [0.9, 1.92, 1.586, 1.3088, 3.36464, 9.163849142857, 7.356079314286, 20.39702208],
        ),
    ],
)
def test_known_answers(monitor, expected):
    assert evidence(monitor, X) == pytest.approx(expected, rel=1e-12)


def test_the_default_bets_are_the_documented_grid():
    np.testing.assert_allclose(RiskMonitor(0.05).bet_sizes, np.geomspace(0.05, 9.0, 8))
    shifted = RiskMonitor(0.0, lower=-0.5, upper=1.5)
    np.testing.assert_allclose(shifted.bet_sizes, np.geomspace(0.025, 0.9, 8))


@pytest.mark.parametrize("monitor", KINDS, ids=lambda m: type(m).__name__)
def test_saving_is_exact_and_for_the_same_monitor_only(monitor, rng):
    state = monitor.init(3)
    for _ in range(50):
        state = monitor.update(state, rng.random(3), audited=rng.random(3) < 0.5)
    again = monitor.from_dict(json.loads(json.dumps(monitor.to_dict(state))))
    for name, array in vars(state).items():
        assert getattr(again, name).tobytes() == array.tobytes(), name
        assert getattr(again, name).dtype == array.dtype
    values = rng.random(3)
    one, two = monitor.update(state, values), monitor.update(again, values)
    assert one.statistics.tobytes() == two.statistics.tobytes()
    for other in (*KINDS, RiskMonitor(0.2), RecoveryTest(0.2), LifetimeRiskMonitor(0.2)):
        if other != monitor:
            with pytest.raises(InvalidArgumentError, match="a state of"):
                other.from_dict(monitor.to_dict(state))
    with pytest.raises(InvalidArgumentError, match="to_dict"):
        monitor.from_dict({"state": {}})


@pytest.mark.parametrize("monitor", KINDS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([math.nan, 0.0], r"`losses` must be .*in \[0, 1\], got"),
        ([0.0, math.inf], r"`losses`"),
        ([1.5, 0.0], r"`losses` must be .*in \[0, 1\], got"),
        ([0.0, -0.1], r"`losses` must be .*in \[0, 1\], got"),
        ([], r"`losses` must be of shape \(2,\), got shape \(0,\)"),
        ([0.0], r"`losses` must be of shape \(2,\), got shape \(1,\)"),
        (0.0, r"`losses` must be of shape \(2,\), got shape \(\)"),
    ],
)
def test_bad_losses_are_refused_by_name(monitor, losses, text):
    state = monitor.init(2)
    with pytest.raises(ValueError, match=text):
        monitor.update(state, losses)


def test_bad_companions_are_refused_by_name():
    monitor = RiskMonitor(0.1)
    state = monitor.init(2)
    with pytest.raises(ValueError, match=r"`expected` must be in \[0, 1\], got nan at stream 1"):
        monitor.update(state, [0.0, 0.0], expected=[0.1, math.nan])
    with pytest.raises(ValueError, match=r"`audited` must be booleans of shape \(2,\)"):
        monitor.update(state, [0.0, 0.0], audited=[1, 0])
    with pytest.raises(ValueError, match=r"`active` must be booleans of shape \(2,\)"):
        monitor.update(state, [0.0, 0.0], active=[True])
    with pytest.raises(ValueError, match="`streams` must be at least 1"):
        monitor.init(0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RiskMonitor(0.0), r"`bound` must be in \(0, 1\)"),
        (lambda: RiskMonitor(1.0), r"`bound` must be in \(0, 1\)"),
        (lambda: RiskMonitor(math.nan), "`bound` must be finite"),
        (lambda: RiskMonitor(0.1, average_run_length=1.0), "`average_run_length` must be above 1"),
        (lambda: RiskMonitor(0.1, bets=(10.0,)), r"`bets` must be in \(0, 10\), at least one"),
        (lambda: RiskMonitor(0.1, bets=()), "`bets` must be"),
        (lambda: RiskMonitor(0.1, warn=1.0), r"`warn` must be in \(0, 1\)"),
        (lambda: LifetimeRiskMonitor(0.1, alpha=0.0), r"`alpha` must be in \(0, 1\)"),
        (lambda: RecoveryTest(0.1, beta=1.0), r"`beta` must be in \(0, 1\)"),
        (lambda: RecoveryTest(2.0), r"`bound` must be in \(0, 1\)"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_unit_without_a_label_has_factor_one_and_its_loss_is_not_read():
    monitor = RiskMonitor(0.1, average_run_length=1e9, bets=(2.0,))
    state = monitor.update(monitor.init(2), [1.0, 1.0])
    state = monitor.update(state, [math.nan, 1.0], audited=[False, True])
    assert monitor.evidence(state).tolist() == pytest.approx([2.8 + 1.0, 2.8 * 3.8])
    assert state.units.tolist() == [2, 2]
    assert state.labelled.tolist() == [1, 2]
    later = monitor.update(state, [math.nan, 0.0], active=[False, True])
    assert later.units.tolist() == [2, 3]
    assert later.statistics[0].tobytes() == state.statistics[0].tobytes()


def test_one_call_for_many_streams_is_many_calls_for_one(rng):
    monitor = RiskMonitor(0.1)
    losses, expected = rng.random((40, 6)), rng.uniform(0.05, 0.95, (40, 6))
    seen = rng.random((40, 6)) < 0.7
    together = monitor.init(6)
    for t in range(40):
        together = monitor.update(together, losses[t], expected=expected[t], audited=seen[t])
    for j in range(6):
        state = monitor.init()
        for t in range(40):
            state = monitor.update(
                state, losses[t, [j]], expected=expected[t, [j]], audited=seen[t, [j]]
            )
        np.testing.assert_array_equal(state.statistics[0], together.statistics[j])
        assert state.first_alarm[0] == together.first_alarm[j]


def test_an_expected_loss_at_the_top_cannot_be_exceeded_and_at_the_bottom_bets_stay_finite():
    monitor = RiskMonitor(0.1, average_run_length=1e9)
    state = monitor.update(monitor.init(2), [1.0, 1.0], expected=[1.0, 0.0])
    assert state.statistics[0].tolist() == [1.0] * 8
    np.testing.assert_allclose(state.statistics[1], 1.0 + monitor.bet_sizes)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30),
    st.floats(0.02, 0.5),
    st.integers(0, 29),
    st.floats(0.0, 1.0),
)
def test_more_loss_is_more_evidence_and_a_higher_bound_is_less(values, bound, where, extra):
    bets = (0.3, 0.9)
    base = evidence(RiskMonitor(bound, bets=bets), values)[-1]
    worse = list(values)
    worse[where % len(worse)] = min(1.0, worse[where % len(worse)] + extra)
    assert evidence(RiskMonitor(bound, bets=bets), worse)[-1] >= base * (1 - 1e-12)
    assert evidence(RiskMonitor(bound + 0.1, bets=bets), values)[-1] <= base * (1 + 1e-12)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_a_mirrored_monitor_sees_what_the_recovery_test_sees(values):
    recovery = RecoveryTest(0.2, beta=0.05)
    bets = tuple(share / 0.8 for share in (0.25, 0.5, 0.75, 0.9))
    mirrored = LifetimeRiskMonitor(0.8, alpha=0.05, bets=bets)
    flipped = evidence(mirrored, [1.0 - value for value in values])
    assert evidence(recovery, values) == pytest.approx(flipped, rel=1e-9)


@pytest.mark.parametrize("monitor", KINDS, ids=lambda m: type(m).__name__)
def test_extremes_stay_finite_and_positive(monitor):
    """A statistic never leaves [least factor x least weight, ceiling], whatever came before."""
    state = monitor.init(2)
    worst, best = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for losses in (worst, best):
        for _ in range(3000):
            state = monitor.update(state, losses)
        assert np.isfinite(state.statistics).all()
        assert (state.statistics > 0.0).all()
    old = type(state)(state.statistics, state.units + 10**8, state.labelled, state.first_alarm * 0)
    moved = monitor.update(old, best)
    assert (moved.statistics > 1e-18).all()
    assert np.isfinite(moved.statistics).all()
    assert monitor.evidence(moved).max() >= monitor.threshold


def test_restarting_forgets_the_chosen_streams_only():
    monitor = RiskMonitor(0.1, average_run_length=20.0)
    state = monitor.init(2)
    for _ in range(5):
        state = monitor.update(state, [1.0, 1.0])
    assert monitor.alarm(state).all()
    assert monitor.warning(state).all()
    again = monitor.restart(state, [True, False])
    assert monitor.alarm(again).tolist() == [False, True]
    assert again.units.tolist() == [0, 5]
    assert monitor.evidence(again)[0] == 0.0
    assert monitor.alarm(state).all(), "states are never changed in place"


def test_evidence_is_combined_by_a_weighted_mean():
    assert combine_evidence([[1.0, 3.0], [2.0, 6.0]]).tolist() == [2.0, 4.0]
    assert float(combine_evidence([1.0, 3.0], weights=[3.0, 1.0])) == 1.5
    with pytest.raises(ValueError, match="`evidence` must be"):
        combine_evidence([math.nan])
    with pytest.raises(ValueError, match="`weights` must be"):
        combine_evidence([1.0, 2.0], weights=[1.0])


def test_known_powers_of_p_values():
    p = [0.01, 0.5, 0.2, 0.03]
    half = np.exp(np.cumsum(p_to_log_e(p, power=0.5)))
    assert half.tolist() == pytest.approx([5.0, 3.5355339, 3.9528471, 11.4108866])
    assert math.exp(float(p_to_log_e(p, power=0.92).sum())) == pytest.approx(1.6480926)
