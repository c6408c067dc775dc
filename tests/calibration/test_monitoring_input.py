"""What the monitoring objects answer to wrong input: an error of the library that names it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adaptive.calibration import (
    AdaptiveError,
    BernoulliStream,
    BetaStream,
    BurstyStream,
    ExpectedLossCurve,
    LifetimeRiskMonitor,
    MovingIndicators,
    OnlineMonitor,
    RampStream,
    RecoveryTest,
    RiskMonitor,
    RiskTracker,
    ScoreDrift,
    SlowingDown,
    audit_coins,
    combine_evidence,
    corrected_losses,
    corrected_range,
    early_warning_signals,
    simulate_fold,
    simulate_ou,
    try_detector,
    try_monitor,
)

RISK = RiskMonitor(0.05)
DRIFT = ScoreDrift((0.25, 0.5, 0.75), (0.3, 0.3, 0.3, 0.3, 0.55, 0.55), 0.05)
SLOW, TRACKER, MOVING = SlowingDown(2.0, 0.1), RiskTracker(0.1), MovingIndicators()
DETECTORS = [RISK, LifetimeRiskMonitor(0.05), RecoveryTest(0.05), SLOW, TRACKER, MOVING]
ALL = [*DETECTORS, DRIFT]
CURVE = ExpectedLossCurve((0.5,), (0.2, 0.1), 0.95, 100)


def names(detector):
    return type(detector).__name__


def moved(detector, streams=2):
    """A state that is not the first one."""
    state = detector.init(streams)
    if detector is DRIFT:
        return DRIFT.update(state, np.tile(DRIFT.features([0.1]), (streams, 1)))
    for value in (0.5, 0.25):
        state = detector.update(state, np.full(streams, value))
    return state


@pytest.mark.parametrize("detector", DETECTORS, ids=names)
@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        [1j, 0.0],
        [[1.0], [1.0, 2.0]],
        {},
        None,
        [math.nan, 0.0],
        [math.inf, 0.0],
        [1e200, 0.0],
        [],
        [0.0],
        [[0.0, 1.0]],
        0.5,
    ],
    ids=str,
)
def test_values_that_are_no_losses(detector, values):
    name = "values" if detector in (SLOW, MOVING) else "losses"
    with pytest.raises(AdaptiveError, match=f"`{name}` must be"):
        detector.update(detector.init(2), values)


@pytest.mark.parametrize("detector", DETECTORS, ids=names)
@pytest.mark.parametrize("kind", [bool, int, np.float32, np.float16, object])
def test_numbers_of_any_kind_are_numbers(detector, kind):
    state = detector.update(detector.init(2), np.array([0, 1]).astype(kind))
    expected = detector.update(detector.init(2), [0.0, 1.0])
    assert detector.to_dict(state) == detector.to_dict(expected)


@pytest.mark.parametrize("detector", ALL, ids=names)
def test_states_of_others(detector):
    others = [other.init(2) for other in ALL if type(other.init()) is not type(detector.init())]
    for state in [*others, None, 0.5, {}]:
        with pytest.raises(AdaptiveError, match=r"`state` must be a .* from `init`"):
            detector.update(state, np.zeros((2, 6)) if detector is DRIFT else [0.0, 0.0])


def test_states_with_other_bets():
    with pytest.raises(ValueError, match="`state` must be from this detector's `init`, with 8"):
        RISK.update(RecoveryTest(0.05).init(2), [0.0, 0.0])
    with pytest.raises(ValueError, match=r"`state` must be .* with 36 .*, got 8 statistics"):
        DRIFT.update(RISK.init(), DRIFT.features([0.1]))


@pytest.mark.parametrize("detector", ALL, ids=names)
def test_every_state_goes_through_strict_json_bit_by_bit(detector):
    for state in (detector.init(3), moved(detector, 3)):
        text = json.dumps(detector.to_dict(state), allow_nan=False)
        again = detector.from_dict(json.loads(text))
        for name, array in vars(state).items():
            copy = getattr(again, name)
            assert copy.tobytes() == array.tobytes(), name
            assert (copy.dtype, copy.shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("detector", ALL, ids=names)
def test_damaged_states_are_not_read(detector):
    def damaged(change):
        data = json.loads(json.dumps(detector.to_dict(moved(detector))))
        change(data)
        return data

    floats = next(k for k, v in vars(moved(detector)).items() if v.dtype == np.float64)

    def one_value(value, where):
        def change(data):
            spot = data["state"][where]["values"]
            while isinstance(spot[0], list):
                spot = spot[0]
            spot[0] = value

        return change

    changes = [
        lambda data: data["state"].pop("units"),
        lambda data: data["state"].update(more=1),
        lambda data: data["state"]["units"].update(dtype="float64"),
        lambda data: data["state"]["units"].update(dtype="int7"),
        lambda data: data["state"]["units"].update(shape=[7]),
        lambda data: data["state"]["units"].update(values=[0], shape=[1]),
        lambda data: data["state"]["units"].update(values=[], shape=[0]),
        lambda data: data["state"].update(units="x"),
        lambda data: data.update(state=[1]),
        lambda data: data.update(settings=None),
        lambda data: data.pop("settings"),
        one_value(-1, "units"),
        one_value("x", "units"),
        one_value(math.inf, floats),
        one_value(math.nan, floats),
    ]
    for change in changes:
        with pytest.raises(AdaptiveError, match="`data` must be"):
            detector.from_dict(damaged(change))
    for data in (None, [], {}, "x"):
        with pytest.raises(AdaptiveError, match="`data` must be"):
            detector.from_dict(data)


def test_settings_of_numpys_types_are_saved_too():
    monitor = RiskMonitor(np.float32(0.05), average_run_length=np.int64(1000))
    data = json.loads(json.dumps(monitor.to_dict(monitor.init())))
    assert monitor.from_dict(data).units.tolist() == [0]


@pytest.mark.parametrize("detector", [RISK, LifetimeRiskMonitor(0.05), DRIFT, SLOW], ids=names)
def test_restarts_name_their_streams(detector):
    state = moved(detector, 3)
    fresh = detector.init(3)
    for chosen, expected in (
        ([True, False, False], [0]),
        ([2, 0], [0, 2]),
        (1, [1]),
        ([], []),
    ):
        again = detector.restart(state, chosen)
        for name, array in vars(again).items():
            for stream in range(3):
                source = fresh if stream in expected else state
                assert array[stream].tobytes() == getattr(source, name)[stream].tobytes()
    for wrong in ([3], [-1], [0.5], [True], "all", [math.nan]):
        with pytest.raises(ValueError, match=r"`streams` must be a mask of shape \(3,\) or ind"):
            detector.restart(state, wrong)


@pytest.mark.parametrize("detector", [RISK, LifetimeRiskMonitor(0.05), RecoveryTest(0.05)])
def test_promises_beyond_reason_stay_finite(detector):
    """A promise of one false alarm in 1e300 units, a bound of almost nothing."""
    for extreme in (
        RiskMonitor(0.05, average_run_length=1e300),
        LifetimeRiskMonitor(0.05, alpha=1e-300),
        RecoveryTest(0.05, beta=1e-300),
        type(detector)(1e-300),
        type(detector)(1.0 - 1e-12),
    ):
        state = extreme.init(2)
        for _ in range(1500):
            state = extreme.update(state, [0.0, 1.0])
        assert np.isfinite(state.statistics).all()
        assert (extreme.evidence(state) >= 0.0).all()


def test_a_process_far_outside_its_model_gives_evidence_not_nan():
    for detector in (SlowingDown(1.0, 1e-100), SlowingDown(1e100, 1.0), SlowingDown(1e-100, 1.0)):
        state = detector.init(3)
        for row in ([1e100, 0.0, 1.0], [-1e100, 0.0, 1.0], [1e100, 0.0, 1.0 + 1e-15]):
            state = detector.update(state, row)
            assert np.isfinite(state.statistics).all()


def test_a_constant_calibration_score_is_watched_on_both_sides():
    drift = ScoreDrift.fit(np.ones(500), average_run_length=1e4)
    state = drift.init(3)
    for _ in range(100):
        state = drift.update(state, drift.features([1.0, 0.999, 1.001], [0, 1, 2]))
    assert drift.alarm(state).tolist() == [False, True, True]


def test_a_series_without_variation_is_significant_in_nothing():
    signals = early_warning_signals(np.ones(40), bandwidth=0.0)
    assert set(signals.significance(surrogates=3).values()) == {1.0}


KNOWN = {"expected": [0.1], "audited": [True], "probabilities": [0.5]}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RiskMonitor(0.1, bets=[1.0]), "`bets` must be a tuple"),
        (lambda: RiskMonitor(0.1, bets=2.0), "`bets` must be a tuple"),
        (lambda: RiskMonitor(0.1, bets=("a",)), "`bets` must be a real number"),
        (lambda: RiskMonitor("0.1"), "`bound` must be a real number"),
        (lambda: RiskMonitor(0.1, average_run_length=math.inf), "`average_run_length` must be fin"),
        (lambda: RiskMonitor(0.5, lower=1.0, upper=0.0), "`bound` must be in"),
        (lambda: RISK.init("2"), "`streams` must be an integer"),
        (lambda: RISK.update(RISK.init(), [0.0], expected=["a"]), "`expected` must be an array"),
        (lambda: combine_evidence(["a"]), "`evidence` must be an array"),
        (lambda: combine_evidence([-1.0]), "`evidence` must be non-empty, finite and not neg"),
        (lambda: combine_evidence([math.inf]), "`evidence` must be non-empty, finite"),
        (lambda: combine_evidence([]), "`evidence` must be non-empty"),
        (lambda: combine_evidence([1.0], weights=[math.inf]), "`weights` must be 1 finite"),
        (lambda: combine_evidence([1.0], weights=["a"]), "`weights` must be an array"),
        (lambda: ScoreDrift([0.5], (0.5,) * 4, 0.1), "`edges` must be a tuple"),
        (lambda: ScoreDrift((0.5,), None, 0.1), "`limits` must be a tuple"),
        (lambda: ScoreDrift((math.nan,), (0.5,) * 4, 0.1), "`edges` must be a vector, finite"),
        (lambda: ScoreDrift((0.5, 0.1), (0.5,) * 5, 0.1), "`edges` must be .* increasing"),
        (lambda: ScoreDrift((0.5,), ("a",) * 4, 0.1), "`limits` must be a real number"),
        (lambda: ScoreDrift((0.5,), (0.5,) * 4, 2.0), "`delta` must be in"),
        (lambda: ScoreDrift.from_settings({}), r"`data` must be \['average_run_length', 'delta'"),
        (lambda: ScoreDrift.from_settings(None), "`data` must be"),
        (lambda: ScoreDrift.from_settings({**DRIFT.settings(), "edges": 1}), "`data` must be a li"),
        (lambda: DRIFT.features(["a"]), "`scores` must be an array"),
        (lambda: DRIFT.update(DRIFT.init(), [["a"] * 6]), "`features` must be an array"),
        (lambda: ExpectedLossCurve((0.5,), (0.1,), 0.95, 10), "`values` must be 2 numbers"),
        (lambda: ExpectedLossCurve((), (2.0,), 0.95, 10), r"`values` must be in \[0, 1\]"),
        (lambda: ExpectedLossCurve((0.5, 0.1), (0.1,) * 3, 0.9, 9), "`edges` must be"),
        (lambda: ExpectedLossCurve((), (0.2,), 5.0, 10), "`confidence` must be in"),
        (lambda: ExpectedLossCurve.from_dict({}), "`data` must be"),
        (lambda: CURVE(["a"]), "`scores` must be an array"),
        (lambda: audit_coins([math.nan], seed=1, unit=1), r"`probabilities` must be in \[0, 1\]"),
        (lambda: audit_coins([1.5], seed=1, unit=1), r"`probabilities` must be in \[0, 1\]"),
        (lambda: audit_coins([0.5], seed=-1, unit=1), "`seed` must be at least 0"),
        (lambda: audit_coins([0.5], seed=1, unit=0.5), "`unit` must be an integer"),
        (lambda: corrected_losses([1.0], **KNOWN | {"expected": [math.nan]}), "`expected` must be"),
        (lambda: corrected_losses([1.0, 2.0], **KNOWN), r"`losses` must be of shape \(1,\)"),
        (lambda: corrected_losses([1.0], **KNOWN | {"probabilities": [0.5, 0.5]}), "`probabil"),
        (lambda: corrected_range([], []), "`expected` must be a non-empty vector"),
        (lambda: corrected_range([0.1], [0.0]), r"`probabilities` must be in \(0, 1\]"),
        (lambda: corrected_range([5.0], [0.5]), r"`expected` must be in \[0, 1\]"),
        (lambda: corrected_range([0.5], [0.5], lower=1.0, upper=0.0), "`upper` must be above"),
        (lambda: SlowingDown(1.0, 1e-200), "`noise` must be from 1e-100 to"),
        (lambda: SlowingDown.fit([1e200, 0.0] * 30), "`series` must be up to"),
        (lambda: SLOW.log_ratios(0.1, 0.1, rate=0.0), "`rate` must be positive"),
        (lambda: early_warning_signals([1e200, 0.0] * 30), "`series` must be up to"),
        (lambda: OnlineMonitor(RISK).update("a"), "`losses` must be an array"),
        (lambda: OnlineMonitor(RISK).update(math.nan), r"`losses` must be in \[0, 1\], got nan"),
        (lambda: try_detector("x", [0.0], change=0), "`make` must be a function"),
        (lambda: try_detector(OnlineMonitor(RISK), [0.0], change=0), "`make` must be a function"),
        (lambda: try_detector(object, ["a"], change=0), "`losses` must be an array"),
        (lambda: try_monitor("x", [0.0], change=0), "`monitor` must be a RiskMonitor"),
        (lambda: try_monitor(RISK, [0.0, 1.0], change=0, expected=[0.1]), "`expected` must be of"),
        (lambda: try_monitor(RISK, [0.0, 1.0], change=0, audited=[1, 0]), "`audited` must be bool"),
        (lambda: simulate_fold(10, end=math.nan), "`end` must be finite"),
        (lambda: simulate_fold(10, streams=0), "`streams` must be at least 1"),
        (lambda: simulate_ou(10, rate=1.0, mean=math.nan), "`mean` must be finite"),
        (lambda: simulate_ou(10, rate=1.0, streams=0), "`streams` must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(call, text):
    with pytest.raises(AdaptiveError, match=text):
        call()


@pytest.mark.parametrize("kind", [BernoulliStream, BetaStream, RampStream, BurstyStream])
def test_streams_check_their_sizes(kind):
    stream = kind(0.05, after=0.1)
    for settings, text in (
        ({"units": 10, "change": 11}, "`change` must be at most 10"),
        ({"units": 0, "change": 0}, "`units` must be at least 1"),
        ({"units": 10, "change": 5, "streams": 0}, "`streams` must be at least 1"),
        ({"units": 10, "change": 5, "streams": "a"}, "`streams` must be an integer"),
        ({"units": 10, "change": 5, "rng": "a"}, "`rng` must be"),
    ):
        with pytest.raises(AdaptiveError, match=text):
            stream.draw(**settings)
    for before, after in ((math.nan, 0.1), (0.0, 0.1), (0.1, 1.0), ("a", 0.1)):
        with pytest.raises(AdaptiveError, match=r"`(before|after)` must be"):
            kind(before, after=after)
