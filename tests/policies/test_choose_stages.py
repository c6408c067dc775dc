"""Which exits are asked: known answers, brute force, and what must hold for any trace."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace, UnsupportedError
from adaptive.policies import (
    AllRows,
    DynamicVocabulary,
    MaxProbability,
    Policy,
    ProbeScore,
    Threshold,
    asked_at,
    choose_stages,
    exit_stages,
    expected_cost,
    unit_losses,
)

COSTS = (2.0, 4.0, 7.0, 12.0)
EVERYWHERE = Policy(ProbeScore(), Threshold(), stages=(0, 1, 2))


def trace_of(scores: Any, losses: Any, *, costs: Any = COSTS, lengths: Any = None) -> Trace:
    return Trace(
        scores=scores,
        losses={"disagreement": np.asarray(losses)},
        costs=costs,
        cost_quantity="layers",
        lengths=lengths,
    )


def known() -> Trace:
    """Ten tokens: five may stop at exit 0, three at exit 2, none at exit 1."""
    scores = np.full((10, 3), 0.1)
    scores[:5] = 0.9
    scores[5:8, 2] = 0.9
    return trace_of(scores, scores < 0.5)


# -- known answers --------------------------------------------------------------------------------


def test_an_exit_that_stops_nothing_goes_and_the_others_stay() -> None:
    chosen = choose_stages(EVERYWHERE, known(), risk=0.0, checks=0.1)
    assert chosen.stages == (0, 2)
    # 5 tokens pay one check and 2 layers, 3 two checks and 7 layers, 2 two checks and 12 layers
    cost = (5 * (2 + 0.1) + 3 * (7 + 0.2) + 2 * (12 + 0.2)) / 10
    assert expected_cost(chosen, known(), risk=0.0, checks=0.1) == pytest.approx(cost)


def test_a_useless_exit_goes_even_if_asking_is_free() -> None:
    assert choose_stages(EVERYWHERE, known(), risk=0.0, checks=0.0).stages == (0, 2)


def test_every_exit_that_stops_something_stays_if_asking_is_free() -> None:
    scores = np.diag([0.9, 0.9, 0.9])
    trace = trace_of(scores, scores < 0.5)
    assert choose_stages(EVERYWHERE, trace, risk=0.0, checks=0.0).stages == (0, 1, 2)


def test_an_exit_goes_where_its_check_costs_more_than_stopping_there_saves() -> None:
    # exit 2 saves 3 of 10 tokens 5 layers, and 5 of 10 are asked there: it is worth 3.0 a check
    def left(price: float, margin: float) -> tuple[int, ...]:
        checks = [0.0, 0.0, price]
        return choose_stages(EVERYWHERE, known(), risk=0.0, checks=checks, margin=margin).stages

    assert left(2.9, 0.0) == (0, 2)
    assert left(3.1, 0.0) == (0,)
    assert left(3.1, 0.25) == (0, 2)
    assert left(4.1, 0.25) == (0,)


def test_only_the_best_exit_remains_if_asking_costs_a_fortune() -> None:
    for checks in (100.0, [100.0, 100.0, 100.0]):
        assert choose_stages(EVERYWHERE, known(), risk=0.0, checks=checks).stages == (0,)


def test_the_price_is_of_the_exits_own_check() -> None:
    checks = [50.0, 0.0, 0.1]  # what exit 0 stopped then stops at exit 1
    assert choose_stages(EVERYWHERE, known(), risk=0.0, checks=checks).stages == (1, 2)


def test_equal_exits_are_told_apart_the_same_way_every_time() -> None:
    scores = np.full((8, 3), 0.9)
    trace = trace_of(scores, np.zeros((8, 3)))
    found = {choose_stages(EVERYWHERE, trace, risk=0.1, checks=0.0).stages for _ in range(3)}
    assert found == {(0,)}


def test_the_risk_is_the_mean_of_units_or_the_share_of_units_with_any_loss() -> None:
    # exit 0 is wrong at one of four tokens of one of two units, and cannot tell
    losses = np.zeros((8, 3))
    losses[0, 0] = 1.0
    trace = trace_of(np.full((8, 3), 0.9), losses, lengths=[4, 4])

    cheap = expected_cost(EVERYWHERE, trace, risk=0.125, checks=0.0)
    dear = expected_cost(EVERYWHERE, trace, risk=0.125, checks=0.0, reduction="any")
    assert cheap == 2.0
    assert dear == 12.0  # no threshold lets exits 1 and 2 stop where exit 0 must not


def test_only_the_exits_of_the_policy_are_considered() -> None:
    some = replace(EVERYWHERE, stages=(1, 2))
    assert choose_stages(some, known(), risk=0.0, checks=0.1).stages == (1, 2)
    assert choose_stages(some, known(), risk=0.0, checks=[0.0, 9.0, 0.1]).stages == (2,)


def test_a_policy_that_needs_an_exit_keeps_it() -> None:
    first = Policy(DynamicVocabulary((8, 4, 2)), Threshold(), stages=(0, 1, 2))
    assert choose_stages(first, known(), risk=0.0, checks=[100.0, 0.0, 0.1]).stages == (0, 2)


def test_the_rest_of_the_policy_is_left_alone() -> None:
    given = Policy(MaxProbability(), Threshold(0.7, warmup=0), stages=(0, 1, 2), mode="propagate")
    chosen = choose_stages(given, known(), risk=0.0, checks=0.1)
    assert chosen == replace(given, stages=(0, 2))
    assert Policy.from_dict(chosen.to_dict()) == chosen


# -- any trace ------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn, exits: int) -> Trace:
    units = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 3), min_size=units, max_size=units))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (sum(lengths), exits)
    scores = rng.integers(0, 6, shape) / 6  # ties
    losses = rng.uniform(size=shape) > scores
    costs = np.cumsum(rng.uniform(0.1, 3.0, exits + 1))
    return trace_of(scores, losses, costs=costs, lengths=lengths)


@settings(max_examples=30)
@given(
    trace=traces(4),
    risk=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
    check=st.sampled_from([0.0, 0.01, 0.3, 2.0, 50.0]),
    reduction=st.sampled_from(["mean", "any"]),
)
def test_the_chosen_schedule_is_never_predicted_slower(
    trace: Trace, risk: float, check: float, reduction: Any
) -> None:
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 1, 2, 3))
    asked: dict[str, Any] = {"risk": risk, "checks": check, "reduction": reduction}
    chosen = choose_stages(policy, trace, **asked)
    assert set(chosen.stages) <= set(policy.stages)
    before = expected_cost(policy, trace, **asked)
    assert expected_cost(chosen, trace, **asked) <= before
    assert choose_stages(policy, trace, **asked) == chosen
    assert choose_stages(chosen, trace, **asked) == chosen  # nothing more is to be left out


def _by_hand(trace: Trace, stages: tuple[int, ...], risk: float, check: float) -> float:
    """Cost at the largest stretch of thresholds from the safe end that keeps to the risk."""
    best = float(trace.costs[-1]) + check * len(stages)
    for threshold in sorted(set(trace.scores[:, stages].max(axis=1).tolist()), reverse=True):
        stop, paid = np.full(trace.n_tokens, trace.n_exits), np.full(trace.n_tokens, len(stages))
        for place, exit in reversed(list(enumerate(stages))):
            early = trace.scores[:, exit] >= np.float32(threshold)
            stop, paid = np.where(early, exit, stop), np.where(early, place + 1, paid)
        if unit_losses(stop, trace).mean() > risk:
            break
        best = float(trace.costs[stop].mean() + check * paid.mean())
    return best


@settings(max_examples=30)
@given(trace=traces(3), risk=st.sampled_from([0.0, 0.1, 0.4]), check=st.floats(0.0, 3.0))
def test_the_predicted_cost_is_what_a_plain_walk_finds(
    trace: Trace, risk: float, check: float
) -> None:
    for count in (1, 2, 3):
        for stages in itertools.combinations(range(3), count):
            policy = replace(EVERYWHERE, stages=stages)
            seen = asked_at(trace, stages)
            losses = [
                unit_losses(exit_stages(Threshold(knob), seen), trace).mean()
                for knob in Threshold().knobs(seen, size=100)
            ]
            if np.all(np.diff(losses) >= 0):  # else bisection may end at another crossing
                found = expected_cost(policy, trace, risk=risk, checks=check)
                assert found == pytest.approx(_by_hand(trace, stages, risk, check))


def test_noise_within_the_margin_does_not_change_the_schedule(rng: np.random.Generator) -> None:
    """Checks that are measured anew, a fifth up or down, leave a clear schedule as it is."""
    measured = 3.0 * rng.uniform(0.8, 1.2, (40, 3))
    clear = {choose_stages(EVERYWHERE, known(), risk=0.0, checks=0.1 * m).stages for m in measured}
    assert clear == {(0, 2)}
    # a check of exit 2 is worth 3.0: without a margin the schedule would be a coin's
    free = measured * [0.0, 0.0, 1.0]
    kept = {choose_stages(EVERYWHERE, known(), risk=0.0, checks=m).stages for m in free}
    assert kept == {(0, 2)}
    tossed = {
        choose_stages(EVERYWHERE, known(), risk=0.0, checks=m, margin=0.0).stages for m in free
    }
    assert tossed == {(0,), (0, 2)}


# -- a trace of some exits ------------------------------------------------------------------------


def test_a_trace_of_some_exits_hides_the_others() -> None:
    seen = asked_at(known(), (1, 2))
    assert np.isneginf(seen.scores[:, 0]).all()
    np.testing.assert_array_equal(seen.scores[:, 1:], known().scores[:, 1:])
    np.testing.assert_array_equal(seen.columns["asked"], np.tile([False, True, True], (10, 1)))
    np.testing.assert_array_equal(
        exit_stages(Threshold(0.5), seen), exit_stages(Threshold(0.5), known(), stages=(1, 2))
    )


# -- slips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy": "threshold"}, InvalidTypeError, "`policy` must be a Policy"),
        ({"trace": np.zeros((3, 3))}, InvalidTypeError, "`trace` must be a Trace"),
        ({"risk": -0.1}, InvalidArgumentError, "`risk` must be a finite number >= 0"),
        ({"risk": float("nan")}, InvalidArgumentError, "`risk`"),
        ({"checks": [0.1, 0.1]}, InvalidArgumentError, r"one per exit \(3\)"),
        ({"checks": -1.0}, InvalidArgumentError, "`checks` must be finite numbers >= 0"),
        ({"checks": float("inf")}, InvalidArgumentError, "`checks`"),
        ({"loss": "error"}, InvalidArgumentError, "'disagreement'"),
        ({"reduction": "sum"}, InvalidArgumentError, "'mean' or 'any'"),
        ({"margin": 1.0}, InvalidArgumentError, r"`margin` must be a number in \[0, 1\)"),
        (
            {"policy": replace(EVERYWHERE, stages=(0, 3))},
            InvalidArgumentError,
            r"exits of the trace, 0\.\.2",
        ),
        (
            {"policy": Policy(ProbeScore(), AllRows(Threshold()), stages=(0, 1))},
            UnsupportedError,
            "rows of AllRows decide together",
        ),
    ],
)
def test_slips_are_named(changes: dict[str, Any], error: Any, message: str) -> None:
    given: dict[str, Any] = {"policy": EVERYWHERE, "trace": known(), "risk": 0.1, "checks": 0.1}
    given |= changes
    policy, trace = given.pop("policy"), given.pop("trace")
    with pytest.raises(error, match=message):
        choose_stages(policy, trace, **given)
