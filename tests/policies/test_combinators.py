"""Rules made of rules, and decisions that a batch takes together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptive.calibration import InvalidArgumentError, Trace, control_risk
from adaptive.policies import (
    AbstractRule,
    AllOf,
    AllRows,
    AnyOf,
    Features,
    FixedStage,
    LeastScore,
    Patience,
    Policy,
    ProbeScore,
    Protected,
    Threshold,
    TwoSided,
    Veto,
    Within,
    exit_stages,
)

SCORES = np.array([[0.9, 0.9, 0.9], [0.2, 0.9, 0.9], [0.2, 0.2, 0.9], [0.2, 0.2, 0.2]])
ANSWERS = np.array([[1, 1, 1], [1, 2, 2], [1, 1, 2], [1, 1, 1]])


def stages(rule: AbstractRule, *, length: int = 1) -> list[int]:
    trace = Trace(
        scores=SCORES,
        losses={"disagreement": np.zeros((4, 3), dtype=bool)},
        costs=[1.0, 2.0, 3.0, 4.0],
        cost_quantity="layers",
        lengths=np.full(4 // length, length),
        columns={"answers": ANSWERS},
    )
    found: list[int] = exit_stages(rule, trace).tolist()
    return found


def test_conjunction_disjunction_and_veto() -> None:
    sure, patient = Threshold(0.5), Patience(1)
    assert stages(sure) == [0, 1, 2, 3]
    assert stages(patient) == [1, 2, 1, 1]
    assert stages(AllOf((sure, patient))) == [1, 2, 3, 3]
    assert stages(AnyOf((sure, patient))) == [0, 1, 1, 1]
    assert stages(Veto((sure, patient))) == [0, 1, 2, 3]
    assert stages(Veto((patient, sure))) == [3, 3, 1, 1]


def test_one_failing_signal_blocks() -> None:
    """SpecExit: confidence, progress and remaining length must all agree."""
    both = AllOf((Threshold(0.5), Threshold(0.8), FixedStage(1)))
    assert stages(both) == [1, 1, 2, 3]
    assert stages(AllOf((Threshold(0.5), Threshold(math.inf)))) == [3] * 4


def test_bounds_and_protection() -> None:
    assert stages(Within(Threshold(0.5), first=1, last=2)) == [1, 1, 2, 2]
    assert stages(Within(Threshold(0.5), last=0)) == [0] * 4
    assert stages(Protected(Threshold(0.5), stages=(1,))) == [0, 2, 2, 3]
    assert stages(Protected(Threshold(0.5), tokens=1), length=2) == [3, 1, 3, 3]


def test_a_hidden_stop_does_not_clear_the_memory() -> None:
    """A protected stage still counts towards patience."""
    assert stages(Protected(Patience(2), stages=(0, 1))) == [2, 3, 3, 2]


def test_infinity_disarms_whatever_else_would_stop() -> None:
    for rule in (
        AnyOf((Threshold(0.9), FixedStage(0))),
        Within(Threshold(0.5), last=0),
        TwoSided(hopeless=0.3, threshold=0.5),
        Veto((FixedStage(0), Threshold())),
    ):
        assert stages(rule.with_knob(math.inf)) == [3] * 4
        assert min(stages(rule.with_knob(0.5))) < 3


def test_two_sided_says_which_side() -> None:
    rule = TwoSided(hopeless=0.3, threshold=0.8)
    state = rule.init(4, device=torch.device("cpu"))
    here = Features(stage=0, position=torch.zeros(4, dtype=torch.int64))
    scores = torch.tensor([0.9, 0.5, 0.1, math.nan])
    stop, state = rule.decide(here, scores, state)
    assert stop.tolist() == [True, False, True, False]
    assert state["verdict"].tolist() == [1, 0, -1, 0]
    assert rule.advance(state)["verdict"].tolist() == [0, 0, 0, 0]


def test_two_risks_of_two_sides_are_certified_apart() -> None:
    """Conformal Thinking: wrong answers that were accepted, right ones that were given up."""
    rng = np.random.default_rng(0)
    n = 1500
    right = rng.uniform(size=n) < 0.7
    scores = np.where(right, rng.beta(6, 2, n), rng.beta(2, 6, n))[:, None]
    trace = Trace(
        scores=scores,
        losses={"disagreement": ~right[:, None]},
        costs=[1.0, 4.0],
        cost_quantity="layers",
    )
    rule = TwoSided(hopeless=0.15)
    accepted, given_up = [], []
    for knob in (math.inf, 0.9, 0.7, 0.5, 0.3):
        stopped = exit_stages(rule.with_knob(knob), trace) == 0
        hopeless = stopped & (scores[:, 0] <= rule.hopeless)
        accepted.append((stopped & ~hopeless & ~right).astype(float))
        given_up.append((hopeless & right).astype(float))
    losses = {"accepted": np.stack(accepted, axis=1), "given up": np.stack(given_up, axis=1)}
    result = control_risk(losses, risk={"accepted": 0.05, "given up": 0.02}, delta=0.1)
    assert result.index is not None
    assert all(loss[:, result.index].mean() <= 0.05 for loss in losses.values())


def update(rule: AbstractRule, scores: list[float], running: list[bool] | None) -> list[bool]:
    policy = Policy(ProbeScore(), rule, stages=(0,))
    batch = len(scores)
    features = Features(
        stage=0,
        position=torch.zeros(batch, dtype=torch.int64),
        probe=torch.logit(torch.tensor(scores)),
        running=None if running is None else torch.tensor(running),
    )
    stop, _, _ = policy.update(features, policy.init(batch, device=torch.device("cpu")))
    found: list[bool] = stop.tolist()
    return found


@pytest.mark.parametrize("shared", [AllRows, LeastScore])
def test_a_batch_waits_for_its_least_settled_row(shared) -> None:
    """Miao et al. wait for all rows; CALM's release takes the minimum (its comment says mean)."""
    rule = shared(Threshold(0.5))
    assert Policy(ProbeScore(), rule, stages=(0,)).scope == "batch"
    assert update(rule, [0.9, 0.6, 0.8], None) == [True] * 3
    assert update(rule, [0.9, 0.9, 0.3], None) == [False] * 3
    assert np.mean([0.9, 0.9, 0.3]) > 0.5
    assert update(rule, [0.9, 0.9, 0.3], [True, True, False])[:2] == [True] * 2
    assert update(rule, [0.9, 0.9, math.nan], None) == [False] * 3


def test_batch_depth_is_the_deepest_rows() -> None:
    alone = stages(Threshold(0.5))
    together = stages(AllRows(Threshold(0.5)))
    assert together == [max(alone)] * 4


def test_scope_needs_and_nesting_pass_through() -> None:
    shared = AllRows(Threshold(0.5))
    combined = AllOf((shared, Patience(1)))
    assert combined.scope == "batch"
    assert combined.needs == {"answer"}
    assert Within(Patience(1)).needs == {"answer"}
    assert AnyOf((Threshold(), Patience(1))).scope == "row"
    assert Protected(shared).scope == "batch"
    assert Policy(ProbeScore(), combined, stages=(0,)).needs == {"probe", "answer"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AllOf((Threshold(),)), "rules"),
        (lambda: AnyOf(()), "rules"),
        (lambda: Veto((Threshold(),)), "rules"),
        (lambda: Within(Threshold(), first=-1), "first"),
        (lambda: Within(Threshold(), first=3, last=2), "last"),
        (lambda: Protected(Threshold(), tokens=-1), "tokens"),
        (lambda: TwoSided(hopeless=0.9, threshold=0.5), "hopeless"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
