"""What a slip of the user meets: the argument is named when the policy is made, not in the loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import policy_table as table
import pytest
import torch
from torch import Tensor

from adaptive import policies as p
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace, fit_platt
from adaptive.policies import AbstractScore, Features, Policy, State, exit_stages

TRACE = table.make_trace(3, n_units=40)
FOUR = (0, 1, 2, 3)
BINS = ((0.0,),) * 2, ((-1.0, 1.0),) * 2
WIDE = Trace(  # scores that are no probabilities
    scores=np.linspace(-3.0, 3.0, 60)[:, None],
    losses={"disagreement": (np.arange(60) % 2 == 0)[:, None]},
    costs=[1.0, 2.0],
    cost_quantity="layers",
)

TWO_EXITS: list[Any] = [
    p.ScheduledThreshold(p.PerStage((0.1, 0.2)), 0.5),
    p.Within(p.ThresholdTable((0.5,), ((0.1, 0.2),), 0.5)),
    p.BetaMixtureThreshold((((0.5, 0.5), (2.0, 8.0), (3.0, 2.0)),) * 2, 0.4),
    p.AllOf((p.Threshold(), p.AccumulatedConfidence((1.0, 1.0), 0.5))),
    p.SkipDecode((2, 4), most=6, length=4, least=2),
    p.SequentialRatio(*BINS),
    p.EvidenceProcess(*BINS),
    p.OptimalStopping.fit(table.make_trace(1, n_exits=2, n_units=30)),
    p.LinearGate(((0.0,) * 6,) * 2, (0.0,) * 2),
    p.StatisticsGate(((0.0,) * 4,) * 2, (0.0,) * 2),
    p.HaltingGate((((0.0,) * 12,),), ((0.0,),), ((),) * 2),
    p.RecurrentGate(p.ProbeScore(), (0.5,), ((1.0, 1.0),) * 2, (0.0,) * 2),
    p.MovingMean(p.Calibrated(p.ProbeScore(), (((0.0, 1.0), (0.0, 1.0)),) * 2), 0.5),
    p.Tempered(p.MaxProbability(), (1.0, 2.0)),
    p.DynamicVocabulary((5, 4)),
    p.VoteShare(2),
    p.BetaMajority(2),
]


def _policy(part: Any, stages: tuple[int, ...]) -> Policy:
    if isinstance(part, AbstractScore):
        return Policy(part, p.Threshold(0.1), stages=stages)
    return Policy(p.ProbeScore(), part, stages=stages)


@pytest.mark.parametrize("part", TWO_EXITS, ids=lambda part: type(part).__name__)
def test_what_was_made_for_fewer_exits_is_refused_when_it_is_put_together(part: Any) -> None:
    assert _policy(part, (0, 1)).stages == (0, 1)
    with pytest.raises(InvalidArgumentError, match=r"at least 4 exits: \w+ is asked at"):
        _policy(part, FOUR)
    if not isinstance(part, AbstractScore):
        with pytest.raises(InvalidArgumentError, match="at least 4 exits"):
            exit_stages(part, TRACE)


def test_whatever_holds_something_per_exit_says_so() -> None:
    """Every fitted score and rule of the contract's table is refused at one exit more."""
    parts: list[Any] = [row.rule for row in table.RULES] + [score for _, score in table.SCORES]
    refused = set()
    for part in parts:
        try:
            _policy(part, (*FOUR, 4))
        except InvalidArgumentError:
            refused.add(type(part).__name__)
    plain = {type(part).__name__ for part in parts} - refused
    for name in plain:  # no tuple of a part that is not refused has one entry per exit
        for part in parts:
            if type(part).__name__ == name:
                held = [v for v in vars(part).values() if isinstance(v, tuple)]
                assert all(len(value) != table.N_EXITS for value in held), name


def test_votes_are_counted_not_indexed() -> None:
    assert _policy(p.VoteShare(2), (5, 9)).stages == (5, 9)


def test_lists_and_numpy_numbers_are_what_a_file_gives_back() -> None:
    given = Policy(
        p.MovingMean(p.LinearGate([[0.1, 0.2], [0.3, 0.4]], [0.0, 1.0]), np.float32(0.5)),  # type: ignore[arg-type]
        p.AllOf([p.ScheduledThreshold(p.PerStage([0.1, math.inf])), p.Patience(2)]),  # type: ignore[arg-type]
        stages=np.arange(2),  # type: ignore[arg-type]
    )
    assert given.stages == (0, 1)
    assert hash(given.score) == hash(given.score)
    assert Policy.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False))) == given


@dataclass(frozen=True)
class Coarse(AbstractScore):
    """A user's score that forgot to return float32."""

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        assert features.probe is not None
        return features.probe, state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_score_of_another_dtype_is_compared_as_in_a_trace(dtype: torch.dtype) -> None:
    """0.7 rounds to another number in every format: the score must not round the threshold."""
    values = torch.linspace(0.69, 0.71, 400).to(dtype)
    trace = Trace(
        scores=values.float().numpy()[:, None],
        losses={"disagreement": np.zeros((400, 1))},
        costs=[1.0, 2.0],
        cost_quantity="layers",
    )
    for threshold in (0.7, *(values[::40].double() + 1e-6).tolist()):
        policy = Policy(Coarse(), p.Threshold(threshold), stages=(0,))
        here = Features(stage=0, position=torch.zeros(400, dtype=torch.int64), probe=values)
        stop, score, _ = policy.update(here, policy.init(400, device=table.CPU))
        assert score.dtype is torch.float32
        assert (exit_stages(policy.rule, trace) == 0).tolist() == stop.tolist()


LABELLED: list[Callable[[str], object]] = [
    lambda loss: p.BetaMixtureThreshold.fit(TRACE, loss=loss),
    lambda loss: p.SequentialRatio.fit(TRACE, loss=loss),
    lambda loss: p.EvidenceProcess.fit(TRACE, loss=loss),
    lambda loss: p.OptimalStopping.fit(TRACE, loss=loss),
    lambda loss: p.Calibrated.fit(p.ProbeScore(), TRACE, method=fit_platt, loss=loss),
    lambda loss: p.RecurrentGate.fit(p.ProbeScore(), TRACE, loss=loss),
    lambda loss: p.agreement_thresholds(TRACE, targets=(0.9,), loss=loss),
    lambda loss: p.certified_agreement_thresholds(TRACE, targets=(0.9,), delta=0.1, loss=loss),
    lambda loss: p.budget_thresholds(TRACE, budgets=(3.0,), loss=loss),
    lambda loss: p.oracle_stages(TRACE, loss=loss),
    lambda loss: p.unit_losses(np.zeros(TRACE.n_tokens), TRACE, loss=loss),
]


@pytest.mark.parametrize("build", LABELLED)
def test_a_loss_that_the_trace_does_not_have_is_named(build: Callable[[str], object]) -> None:
    with pytest.raises(InvalidArgumentError, match="`loss` must be one of 'disagreement', got 'x'"):
        build("x")


def _walk(score: AbstractScore) -> None:
    policy = Policy(score, p.Threshold(0.1), stages=FOUR)
    state = policy.init(3, device=table.CPU)
    for stage in FOUR:
        _, _, state = policy.update(table.features_at(stage, 3), state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Policy(p.Threshold(), p.ProbeScore(), (0,)), "`score` must be an instance of an"),
        (lambda: Policy(p.ProbeScore(), p.Threshold, (0,)), "`rule` must be an instance of an"),
        (
            lambda: Policy(p.ProbeScore(), p.AllOf((p.Threshold, p.Patience)), (0,)),
            r"`rules` must be an instance: Threshold\(...\)",
        ),
        (lambda: Policy(p.ProbeScore(), p.Threshold(), 2), "`stages` must be a tuple of exit ind"),
        (lambda: p.Threshold("0.5"), "`threshold` must be a number, got '0.5' of type str"),
        (lambda: exit_stages(Policy(p.ProbeScore(), p.Threshold(), (0,)), TRACE), "`policy.rule`"),
        (
            lambda: Policy(p.LinearGate(((math.nan,),), (0.0,)), p.Threshold(), (0,)).to_dict(),
            "`weights` must be made of numbers but NaN",
        ),
        (lambda: p.Calibrated.fit(p.ProbeScore(), TRACE, method="platt"), "such as fit_isotonic"),
        (lambda: p.BetaMixtureThreshold.fit(TRACE, estimator="mle"), "as beta_from_likelihood"),
    ],
)
def test_a_wrong_kind_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: p.BetaMixtureThreshold.fit(WIDE), r"scores in \[-3, 3\]"),
        (lambda: p.BetaMixtureThreshold.fit_unlabelled(WIDE), r"scores in \[-3, 3\]"),
        (lambda: p.agreement_thresholds(TRACE, targets=np.array([0.5, 0.9])), "`targets` must be"),
        (lambda: p.budget_thresholds(TRACE, budgets=(2.0, 3.0)), "`budgets` must be mean costs"),
        (lambda: p.Tempered(p.Saturation(), (1.0,)), "`base` must be a score that reads logits"),
        (lambda: p.wald_boundaries(0.7, 0.7), r"`beta` must be below 1 - alpha = 0.3"),
        (lambda: p.SequentialRatio(*BINS, threshold=-1.0, give_up=0.0), "`give_up` must be below"),
        (
            lambda: p.SkipDecode((2,), most=3, length=4).active_layers(0, n_layers=6, warmup=1),
            "`least` must be finite",
        ),
        (lambda: p.unit_costs(np.full(TRACE.n_tokens, -1), TRACE), r"`stages` must be in 0..4"),
        (lambda: p.LinearGate.fit(np.ones((3, 2)), np.ones((3, 1))), r"`hidden` must be of shape"),
        (lambda: p.HaltingGate.fit(np.ones((3, 2, 4)), np.ones((4, 2))), "`agree` must be of shap"),
        (
            lambda: _walk(p.LinearGate(((0.0,) * 5,) * 4, (0.0,) * 4)),
            "of width 5, as what the gate was fitted on, got width 6",
        ),
        (lambda: _walk(p.DynamicVocabulary((50, 4, 4, 4))), "at most 11, the size of the vocab"),
    ],
)
def test_a_value_out_of_range_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        build()


def test_targets_and_budgets_may_be_arrays() -> None:
    table_ = p.agreement_thresholds(TRACE, targets=np.linspace(0.9, 0.5, 3))
    assert table_.levels == pytest.approx((0.9, 0.7, 0.5))
    assert p.budget_thresholds(TRACE, budgets=np.array([4.0, 3.0])).levels == (4.0, 3.0)


def test_a_tracker_without_observations_says_what_to_do() -> None:
    tracker = p.BetaMixtureTracker(target=0.5)
    with pytest.raises(InvalidArgumentError, match="run the first unit at full depth"):
        tracker.rule()
    with pytest.raises(InvalidArgumentError, match=r"`scores` must be \[n_tokens, n_exits\]"):
        tracker.observe([0.1, 0.2], [True, False])
    with pytest.raises(InvalidArgumentError, match=r"`agree` must be of shape \(3, 2\)"):
        tracker.observe(np.full((3, 2), 0.5), np.ones((3, 1)))
    seen = tracker.observe(np.full((3, 2), 0.5), np.ones((3, 2)))
    with pytest.raises(InvalidArgumentError, match=r"`scores` must be \[n_tokens, 2\]"):
        seen.observe(np.full((3, 3), 0.5), np.ones((3, 3)))
    assert seen.rule().thresholds() == (math.inf, math.inf)
