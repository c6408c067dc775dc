"""Thresholds that vary with stage and position."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import (
    Decay,
    Features,
    PerStage,
    Phases,
    ScheduledThreshold,
    Threshold,
    exit_stages,
)

CPU = torch.device("cpu")


def stops(rule: ScheduledThreshold | Threshold, score: float, positions: list[int]) -> list[bool]:
    here = Features(stage=0, position=torch.tensor(positions))
    state = rule.init(len(positions), device=CPU)
    return rule.decide(here, torch.full((len(positions),), score), state)[0].tolist()


def trace_of(scores: np.ndarray, *, positions: np.ndarray | None = None) -> Trace:
    n, exits = scores.shape
    return Trace(
        scores=scores,
        losses={"disagreement": np.zeros((n, exits), dtype=bool)},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
        lengths=[n],
        columns={} if positions is None else {"positions": positions},
    )


def test_calm_decay_receives_the_position() -> None:
    """T = 0.8, tau = 4, N = 100: 0.8, 0.74943, 0.730827, 0.721465 at positions 0, 25, 50, 100."""
    positions = [0, 25, 50, 100]
    known = [0.8, 0.74943, 0.730827, 0.721465]
    here = Features(stage=0, position=torch.tensor(positions))
    decay = Decay(tau=4.0, length=100)
    found = decay.threshold(torch.tensor(0.8), here, decay.tables(device=CPU))
    np.testing.assert_allclose(found, known, atol=5e-6)
    rule = ScheduledThreshold(decay, 0.8)
    for place, level in enumerate(known):
        expected = [other <= place for other in range(4)]
        assert stops(rule, level - 1e-4, positions) == [not kept for kept in expected]


def released_calm(threshold: float, *, tau: float, length: int, position: int = 0) -> float:
    """CALM as released: the position defaults to 0, and no caller passes it."""
    decayed = threshold * math.exp(-tau * position / length)
    return min(1.0, max(0.0, 0.9 * threshold + 0.1 * decayed))


def test_the_release_never_decays() -> None:
    released = [released_calm(0.8, tau=4.0, length=100) for _ in range(3)]
    assert released == pytest.approx([0.8] * 3)
    trace = trace_of(np.full((100, 1), 0.75, dtype=np.float32))
    ours = exit_stages(ScheduledThreshold(Decay(tau=4.0, length=100), 0.8), trace)
    assert ours[0] == 1
    assert ours[-1] == 0
    assert (np.diff(ours) <= 0).all()


def test_positions_come_from_the_trace_where_it_has_them() -> None:
    """A loop whose first token comes from the prompt pass starts at position 1."""
    scores = np.full((3, 1), 0.5, dtype=np.float32)
    rule = ScheduledThreshold(Phases((2,), (math.inf, 0.0)), 0.4)
    assert exit_stages(rule, trace_of(scores)).tolist() == [1, 1, 0]
    shifted = trace_of(scores, positions=np.array([1, 2, 3]))
    assert exit_stages(rule, shifted).tolist() == [1, 0, 0]


def test_full_depth_survives_a_score_of_one_and_the_clip() -> None:
    assert (
        stops(ScheduledThreshold(Decay(tau=4.0, length=10), math.inf), 1.0, [0, 9]) == [False] * 2
    )
    assert stops(ScheduledThreshold(Decay(tau=4.0, length=10), 2.0), 1.0, [0, 9]) == [True] * 2


def test_prophet_steps() -> None:
    """Logit gaps of 7.5, 5 and 2.5 over the thirds of a denoising schedule."""
    rule = ScheduledThreshold(PerStage((7.5,) * 2 + (5.0,) * 2 + (2.5,) * 2), 0.0)
    gaps = np.array([[6.0, 6.0, 6.0, 1.0, 1.0, 1.0], [2.0, 3.0, 4.0, 4.0, 3.0, 9.0]])
    assert exit_stages(rule, trace_of(gaps)).tolist() == [2, 4]


def test_protected_stages_and_phases() -> None:
    scores = np.full((4, 2), 0.9, dtype=np.float32)
    protected = ScheduledThreshold(PerStage((math.inf, 0.0)), 0.5)
    assert exit_stages(protected, trace_of(scores)).tolist() == [1] * 4
    warm = ScheduledThreshold(Phases((2,), (math.inf, 0.0)), 0.5)
    assert exit_stages(warm, trace_of(scores)).tolist() == [2, 2, 0, 0]
    assert exit_stages(Threshold(0.5, warmup=2), trace_of(scores)).tolist() == [2, 2, 0, 0]


def test_each_knob_of_the_path_moves_a_token() -> None:
    rng = np.random.default_rng(0)
    trace = trace_of(rng.uniform(0.1, 0.9, (200, 3)).astype(np.float32))
    for schedule in (
        PerStage((0.1, 0.0, -0.1)),
        Decay(tau=4.0, length=200),
        Phases((50,), (0.2, 0.0)),
    ):
        rule = ScheduledThreshold(schedule)
        depth = [exit_stages(rule.with_knob(k), trace).sum() for k in rule.knobs(trace, size=8)]
        assert all(later < earlier for earlier, later in pairwise(depth))
        stopped = exit_stages(rule.with_knob(rule.knobs(trace, size=8)[-1]), trace) < 3
        assert stopped.all()


def test_thresholds_are_stops_at_equality_and_at_minus_infinity() -> None:
    assert stops(Threshold(0.5), 0.5, [0]) == [True]
    assert stops(Threshold(-math.inf), -3.0, [0]) == [True]
    assert stops(Threshold(-math.inf), -math.inf, [0]) == [False]
    assert stops(Threshold(math.inf), math.inf, [0]) == [False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Decay(tau=-1.0, length=3), "tau"),
        (lambda: Decay(tau=1.0, length=0), "length"),
        (lambda: PerStage(()), "offsets"),
        (lambda: PerStage((math.nan,)), "offsets"),
        (lambda: Phases((3, 3), (0.0, 0.0, 0.0)), "starts"),
        (lambda: Phases((3,), (0.0,)), "offsets"),
        (lambda: Threshold(math.nan), "threshold"),
        (lambda: Threshold(0.5, warmup=-1), "warmup"),
        (lambda: Threshold().knobs(trace_of(np.ones((2, 1))), size=1), "size"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
