"""The monitor's state machine as pure functions: states, evidence, promises, exactness."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptive._monitor_channels import Signs
from adaptive._monitor_records import JournalError, Unit
from adaptive._monitor_rules import audit, evidence, label, observe, plan, trip
from adaptive._monitor_state import MonitorState, Rules, first_state
from adaptive.calibration import (
    EvidenceAudits,
    ExpectedLossCurve,
    InvalidArgumentError,
    InvalidTypeError,
    LifetimeRiskMonitor,
    RecoveryTest,
    RiskMonitor,
    ScoreAudits,
    UniformAudits,
)
from adaptive.calibration.conformance import violation_limit

BOUND = 0.1
CURVE = ExpectedLossCurve(edges=(0.5,), values=(0.4, 0.05), confidence=0.95, n_units=100)


def rules(**changes: Any) -> Rules:
    settings: dict[str, Any] = {
        "member": 3,
        "detector": LifetimeRiskMonitor(BOUND, alpha=0.05, warn=0.25),
        "recovery": RecoveryTest(BOUND, beta=0.05),
        "audits": UniformAudits(1.0),
        "probation": 20,
    }
    return Rules(**settings | changes)


def unit_of(
    given: Rules, state: MonitorState, loss: float | None, score: float | None = 0.7
) -> Unit:
    planned = plan(given, state)
    chance, audited = audit(given, planned, number=state.next_unit, score=score)
    return Unit(
        number=state.next_unit,
        epoch=planned.epoch,
        status=planned.status,
        member=planned.member,
        probability=chance,
        audited=audited,
        loss=loss if audited else None,
        score=score,
        depth=8.0,
        tokens=16,
    )


def run(given: Rules, losses: Any, state: MonitorState | None = None) -> Any:
    state = first_state(given) if state is None else state
    seen = []
    for loss in losses:
        state, watched = observe(given, state, unit_of(given, state, loss), time=0.0)
        seen.append(watched)
    return state, seen


def test_a_whole_life() -> None:
    given = rules()
    state, good = run(given, [0.02] * 100)
    assert state.status == "ok"
    assert all(w.inside for w in good)
    state, bad = run(given, [0.6] * 20, state)
    kinds = [event.kind for w in bad for event in w.events]
    assert kinds == ["warn", "alarm"]
    alarm = next(i for i, w in enumerate(bad) if w.status == "fallback")
    # the unit in which the alarm falls is outside, and so is every one after it
    assert [w.inside for w in bad] == [True] * alarm + [False] * (20 - alarm)
    assert plan(given, state).member == 0
    state, back = run(given, [0.0] * 300, state)
    kinds = [event.kind for w in back for event in w.events]
    assert kinds == ["resume", "clear"]
    resume = next(i for i, w in enumerate(back) if w.status == "probation")
    assert not any(w.inside for w in back[: resume + 1])
    assert all(w.inside for w in back[resume + 1 :])
    assert sum(w.unit.status == "probation" for w in back) == given.probation
    assert state.status == "ok"
    assert state.epoch == 2
    assert state.outside == 20 - alarm + resume + 1


def test_warning_tightens_and_audits_more_and_passes() -> None:
    given = rules(audits=EvidenceAudits(0.2, 1.0), tighten=2)
    assert plan(given, first_state(given)).member == 3
    state = first_state(given)
    while state.status == "ok":
        state, _ = run(given, [0.5], state)
    planned = plan(given, state)
    assert (state.status, planned.member, planned.warned) == ("warn", 1, True)
    assert audit(given, planned, number=0, score=None) == (1.0, True)
    state, seen = run(given, [0.0] * 30, state)
    assert [event.kind for w in seen for event in w.events] == ["calm"]
    assert state.status == "ok"


def test_tightening_stops_at_the_first_member() -> None:
    given = rules(tighten=9)
    state = replace(first_state(given), status="warn")
    assert plan(given, state).member == 1
    assert plan(replace(given, member=0), state).member == 0


def test_unlabelled_units_are_no_evidence() -> None:
    given = rules()
    state, _ = run(given, [None] * 40)
    assert state.labelled == 0
    assert evidence(given, state) <= 1.0 + 1e-12
    state, _ = run(rules(audits=UniformAudits(1e-9)), [0.9] * 40)
    assert state.labelled == 0
    assert evidence(given, state) <= 1.0 + 1e-12


def test_late_labels_are_evidence_when_they_come() -> None:
    """Whatever the delay, the same labels in the same order leave the same evidence."""
    given = rules(curve=CURVE, curve_weight=0.5)
    losses = [0.0, 0.8, 0.1, 0.9, 0.3]
    prompt, _ = run(given, losses)
    late, _ = run(given, [None] * 5)
    assert late.labelled == 0
    assert [unit.number for unit in late.awaiting] == [0, 1, 2, 3, 4]
    for number, loss in enumerate(losses):
        late, watched = label(given, late, number=number, loss=loss, time=0.0)
        assert watched.late
        assert watched.unit.loss == loss
    assert evidence(given, late) == evidence(given, prompt)
    assert (late.labelled, late.loss_sum) == (prompt.labelled, prompt.loss_sum)
    assert late.awaiting == ()


def test_a_late_label_can_alarm_and_one_from_before_the_alarm_is_no_evidence() -> None:
    given = rules(awaited=100)
    state, _ = run(given, [None] * 90)
    for number in range(90):
        state, watched = label(given, state, number=number, loss=1.0, time=0.0)
        if watched.events and watched.events[-1].kind == "alarm":
            break
    assert state.status == "fallback"
    before = evidence(given, state)
    state, watched = label(given, state, number=89, loss=0.0, time=0.0)
    assert evidence(given, state) == before
    assert watched.events == ()


def test_labels_that_nobody_waits_for_are_named() -> None:
    given = rules(awaited=3)
    state, _ = run(given, [None] * 5)
    for number in (0, 1, 9):
        with pytest.raises(InvalidArgumentError, match="among the newest 3"):
            label(given, state, number=number, loss=0.0, time=0.0)
    unseen = rules(audits=UniformAudits(1e-9))
    state, _ = run(unseen, [None] * 3)
    assert state.awaiting == ()


def test_units_of_another_epoch_are_outside_and_no_evidence() -> None:
    given = rules()
    state = first_state(given)
    late = unit_of(given, state, 1.0)
    state, events = trip(given, state, reason="by hand", time=1.0)
    assert [event.kind for event in events] == ["trip"]
    before = evidence(given, state)
    state, watched = observe(given, state, late, time=2.0)
    assert not watched.inside
    assert evidence(given, state) == before
    assert trip(given, state, reason="again", time=3.0) == (state, ())


def test_uncovered_and_withdrawn_units_are_outside() -> None:
    given = rules()
    state = first_state(given)
    unit = unit_of(given, state, 0.0)
    assert observe(given, state, unit, time=0.0)[1].inside
    for changes in ({"covered": False}, {"withdrawn": True}):
        assert not observe(given, state, replace(unit, **changes), time=0.0)[1].inside


def test_the_state_survives_json_to_the_last_bit() -> None:
    rng = np.random.default_rng(1)
    given = rules(curve=CURVE, curve_weight=0.5, signs=_signs(rng))
    losses = rng.random(60) * 0.3
    half, _ = run(given, losses[:30])
    text = json.dumps(half.to_dict(given))
    resumed = MonitorState.from_dict(json.loads(text), given)
    straight, jumped = run(given, losses[30:], half)[0], run(given, losses[30:], resumed)[0]
    assert json.dumps(straight.to_dict(given)) == json.dumps(jumped.to_dict(given))


def test_a_state_of_other_settings_is_refused() -> None:
    given = rules()
    data = first_state(given).to_dict(given)
    other = rules(detector=LifetimeRiskMonitor(BOUND, alpha=0.01))
    with pytest.raises(JournalError, match="alpha"):
        MonitorState.from_dict(data, other)
    del data["epoch"]
    with pytest.raises(JournalError, match="epoch"):
        MonitorState.from_dict(data, given)


def test_bursts_that_the_curve_explains_do_not_alarm() -> None:
    """Hard units come in bursts of 40; their scores say so."""
    rng = np.random.default_rng(2)
    plain, robust = rules(curve=CURVE), rules(curve=CURVE, curve_weight=1.0)
    hard = np.repeat(rng.random(20) < 0.2, 40)
    losses = (rng.random(800) < np.where(hard, 0.35, 0.03)).astype(float)
    alarms = {}
    for name, given in (("plain", plain), ("robust", robust)):
        state, seen = first_state(given), []
        for is_hard, loss in zip(hard, losses, strict=True):
            if state.status == "fallback":
                break
            score = 0.3 if is_hard else 0.8
            state, watched = observe(given, state, unit_of(given, state, loss, score), time=0.0)
            seen.append(watched)
        alarms[name] = state.status == "fallback"
    assert alarms == {"plain": True, "robust": False}


PROMISED = "evidence that losses exceed the 0.1 promised"
UNEXPLAINED = "what units with such scores may lose"


@pytest.mark.parametrize(
    ("score", "loss", "changes", "reason"),
    [
        (0.8, 0.38, {"curve": None}, PROMISED),
        (0.3, 0.38, {}, f"{PROMISED}; none that they exceed {UNEXPLAINED}"),
        # the curve is an upper limit: scores that mean something else may stay below it
        (0.3, 0.25, {}, f"{PROMISED}; none that they exceed {UNEXPLAINED}"),
        (0.8, 0.6, {}, f"{PROMISED}, and {UNEXPLAINED}: scores do not explain it"),
        # less than promised, but more than the scores let expect
        (0.8, 0.09, {"curve_weight": 1.0}, f"evidence that losses exceed {UNEXPLAINED}"),
    ],
)
def test_an_alarm_says_what_is_shown_and_no_more(
    score: float, loss: float, changes: dict[str, Any], reason: str
) -> None:
    given = rules(**{"curve": CURVE} | changes)
    state, seen = first_state(given), []
    while state.status != "fallback":
        state, watched = observe(given, state, unit_of(given, state, loss, score), time=0.0)
        seen += watched.events
    assert [event.kind for event in seen][-1] == "alarm"
    assert seen[-1].reason == reason


def test_every_sign_that_is_on_is_named() -> None:
    rng = np.random.default_rng(4)
    given = rules(signs=replace(_signs(rng), slowing=None))
    for score, named in ((float("nan"), 1), (2.5, 2)):  # without a score only depths can tell
        state, said = first_state(given), ()
        while not said:
            unit = replace(unit_of(given, state, 0.0, score), depth=12.0)
            state, watched = observe(given, state, unit, time=0.0)
            said = watched.events
        assert said[0].kind == "warn"
        assert said[0].reason.count("not like the calibration's") == named
        assert said[0].reason.endswith("; no evidence from labels yet")


def test_audits_by_score_refuse_what_has_no_label_yet() -> None:
    """A unit that was not audited counts with its expected loss: without the others, too high."""
    audits = ScoreAudits(0.8, 0.1)
    given = rules(
        curve=CURVE, audits=audits, detector=RiskMonitor(BOUND, lower=-4.0, upper=11.0, warn=0.25)
    )
    state = first_state(given)
    while not (unit := unit_of(given, state, None)).audited:
        state, _ = observe(given, state, unit, time=0.0)
    with pytest.raises(InvalidArgumentError, match=r"known when an audited unit finishes"):
        observe(given, state, unit, time=0.0)
    fallen, _ = trip(given, state, reason="by hand", time=0.0)
    assert not observe(given, fallen, unit, time=0.0)[1].inside


def _signs(rng: np.random.Generator) -> Signs:
    return Signs.fit(
        rng.normal(size=400).tolist(), rng.normal(8, 1, size=400).tolist(), average_run_length=1e3
    )


def test_signs_without_labels_warn_and_never_alarm() -> None:
    rng = np.random.default_rng(4)
    given = rules(signs=_signs(rng), audits=EvidenceAudits(0.01, 0.02))
    state = first_state(given)
    for _ in range(400):
        unit = replace(unit_of(given, state, 0.0, float(rng.normal(3.0))), depth=11.0)
        state, _ = observe(given, state, unit, time=0.0)
    assert state.status == "warn"
    assert set(given.signs.warnings(state.signs)) >= {"score", "depth"}


def test_a_sign_that_hovers_at_its_level_does_not_flap() -> None:
    """On at its warning's level, off at half of it."""
    rng = np.random.default_rng(6)
    given = rules(signs=replace(_signs(rng), depth=None, slowing=None))
    sign = given.signs.score
    assert sign is not None
    state, kinds = first_state(given), []
    while not kinds:
        state, watched = observe(given, state, unit_of(given, state, 0.0, 1.6), time=0.0)
        kinds += [event.kind for event in watched.events]
    level = sign.warn * sign.threshold
    while state.status == "warn":
        before = float(sign.evidence(state.signs["score"])[0])
        state, watched = observe(
            given, state, unit_of(given, state, 0.0, float(rng.normal())), time=0.0
        )
        kinds += [event.kind for event in watched.events]
    after = float(sign.evidence(state.signs["score"])[0])
    assert kinds == ["warn", "calm"]
    assert after < level / 2 <= before


def test_signs_ignore_other_members() -> None:
    rng = np.random.default_rng(5)
    given = rules(signs=_signs(rng))
    state = first_state(given)
    for _ in range(100):
        unit = replace(unit_of(given, state, 0.0, 9.0), member=1)
        state, _ = observe(given, state, unit, time=0.0)
    assert state.status == "ok"


def test_signs_of_a_small_or_constant_calibration_are_left_out() -> None:
    assert Signs.fit([0.1] * 100, [3.0] * 5, average_run_length=1e3) == Signs()
    quiet = Signs.fit([0.1] * 100, list(range(40)), average_run_length=1e3)
    assert quiet.score is None
    assert quiet.depth is not None
    state = quiet.init()
    assert quiet.update(state, score=None, depth=float("nan")) == state


def test_audits_by_score_correct_the_losses() -> None:
    audits = ScoreAudits(0.8, 0.1)
    given = rules(
        curve=CURVE, audits=audits, detector=RiskMonitor(BOUND, lower=-4.0, upper=11.0, warn=0.25)
    )
    planned = plan(given, first_state(given))
    chances = [audit(given, planned, number=0, score=score)[0] for score in (0.3, 0.8)]
    assert chances == pytest.approx([0.8 * 0.4**0.5, 0.8 * 0.05**0.5])
    state, seen = run(given, [0.0] * 50)
    assert 0 < sum(w.unit.audited for w in seen) < 50
    assert state.status == "ok"
    state, _ = run(given, [1.0] * 2000, state)
    assert state.status == "fallback"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curve_weight": 1.5}, "curve_weight"),
        ({"curve_weight": 0.5}, "without a curve"),
        ({"audits": ScoreAudits(1.0, 0.1)}, "without a curve"),
        ({"tighten": -1}, "tighten"),
        ({"probation": 2.5}, "probation"),
    ],
)
def test_impossible_rules_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=words):
        rules(**changes)


def test_damaged_units_are_named() -> None:
    data = unit_of(rules(), first_state(rules()), 0.0).to_dict()
    del data["loss"]
    with pytest.raises(JournalError, match="loss"):
        Unit.from_dict(data)
    with pytest.raises(JournalError, match="list"):
        Unit.from_dict([])  # type: ignore[arg-type]


def _share(given: Rules, *, mean: float, runs: int, length: int, seed: int) -> int:
    """How many of many lives alarm, with 0/1 losses of a given mean."""
    rng = np.random.default_rng(seed)
    alarmed = 0
    for _ in range(runs):
        state = first_state(given)
        for loss in (rng.random(length) < mean).astype(float):
            state, _ = observe(given, state, unit_of(given, state, loss), time=0.0)
            if state.status == "fallback":
                alarmed += 1
                break
    return alarmed


@pytest.mark.statistical
def test_false_alarms_at_the_boundary_keep_the_promise_and_a_lower_bound_does_not() -> None:
    runs, length, alpha = 80, 120, 0.1
    given = rules(detector=LifetimeRiskMonitor(BOUND, alpha=alpha), audits=UniformAudits(1.0))
    limit = violation_limit(runs, alpha)
    assert _share(given, mean=BOUND, runs=runs, length=length, seed=6) <= limit
    wrong = replace(given, detector=LifetimeRiskMonitor(BOUND / 4, alpha=alpha))
    assert _share(wrong, mean=BOUND, runs=runs, length=length, seed=6) > limit


@pytest.mark.statistical
def test_wrong_resumes_keep_the_promise_and_a_bound_a_tenth_too_high_does_not() -> None:
    """Whole fallbacks whose early answers, along full depth's text, miss just what is promised."""
    runs, length, beta, promise = 120, 60, 0.1, 0.5
    given = rules(detector=LifetimeRiskMonitor(promise), recovery=RecoveryTest(promise, beta=beta))

    def resumed(given: Rules) -> int:
        rng, count = np.random.default_rng(7), 0
        for _ in range(runs):
            state = trip(given, first_state(given), reason="", time=0.0)[0]
            for loss in rng.choice([0.3, 0.7], length):
                state, _ = observe(given, state, unit_of(given, state, loss), time=0.0)
                if state.status != "fallback":
                    count += 1
                    break
        return count

    limit = violation_limit(runs, beta)
    assert resumed(given) <= limit
    assert resumed(replace(given, recovery=RecoveryTest(1.1 * promise, beta=beta))) > limit


def test_units_begun_before_a_fallback_do_not_bring_the_policy_back() -> None:
    """Good units of the policy that end during the fallback say nothing of its comparisons."""
    given = rules()
    state = first_state(given)
    early = [replace(unit_of(given, state, 0.0), number=number) for number in range(400)]
    state, _ = trip(given, state, reason="by hand", time=0.0)
    for unit in early:
        state, watched = observe(given, state, unit, time=0.0)
        assert not watched.inside
    assert state.status == "fallback"
