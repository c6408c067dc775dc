"""The choice of the fastest policy and measured costs: what a busy machine may not change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import adaptive._timing as timing
from adaptive import get_exits
from adaptive._fastest import fastest
from adaptive.calibration.conformance import violation_limit

PIECES = 4


def _busy(seconds: Any, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """Rounds on a machine where half of the runs are held up, some for many times their length."""
    seconds = np.asarray(seconds, dtype=np.float64)

    def round_of() -> np.ndarray:
        shape = (PIECES, len(seconds))
        held = rng.random(shape) < 0.5
        return seconds * (1 + 0.02 * rng.random(shape) + held * rng.exponential(1.0, shape))

    return round_of


def test_a_busy_machine_chooses_what_a_calm_one_does() -> None:
    rng = np.random.default_rng(0)
    seconds, trials = [1.0, 0.72, 0.66, 0.62, 0.6], 400
    choices = [fastest(_busy(seconds, rng), preferred=4).index for _ in range(trials)]
    assert np.sum(np.array(choices) != 4) <= violation_limit(trials, 0.05)


def test_the_least_median_of_three_rounds_would_not() -> None:
    """What was done before: the same trials tell it from what is done now."""
    rng = np.random.default_rng(0)
    seconds, trials = [1.0, 0.72, 0.66, 0.62, 0.6], 400
    wrong = 0
    for _ in range(trials):
        round_of = _busy(seconds, rng)
        totals = np.median([round_of().sum(axis=0) for _ in range(3)], axis=0)
        wrong += int(np.argmin(totals)) != 4
    assert wrong > violation_limit(trials, 0.05)


def test_what_is_clearly_faster_is_taken() -> None:
    rng = np.random.default_rng(1)
    calm = partial(rng.uniform, 1.0, 1.02, (PIECES, 4))
    for seconds, expected in (([1, 0.9, 0.8, 0.9], 2), ([1, 1.1, 1.1, 1.2], 0)):
        choice = fastest(lambda s=seconds: np.array(s) * calm(), preferred=3)
        assert choice.index == expected
        np.testing.assert_allclose(choice.seconds, seconds, rtol=0.03)


def test_equal_times_speak_for_nobody() -> None:
    assert fastest(lambda: np.ones((PIECES, 3)), preferred=2).index == 2
    assert fastest(lambda: np.ones((PIECES, 1)), preferred=0).index == 0


def test_more_is_measured_while_it_is_undecided() -> None:
    calls: list[int] = []

    def counted(seconds: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.tile(seconds, (PIECES, 1))

    fastest(lambda: counted(np.array([1.0, 0.5])), preferred=1)
    assert len(calls) == 3  # 12 pieces
    calls.clear()
    rng = np.random.default_rng(2)
    fastest(lambda: counted(rng.permutation([1.0, 1.01])), preferred=1)
    assert 3 < len(calls) <= 6
    calls.clear()
    fastest(lambda: counted(np.array([1.0])), preferred=0)
    assert len(calls) == 3


def test_costs_of_a_trace_are_those_of_undisturbed_layers(
    tools: SimpleNamespace, saved_planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four measurements take up to ten times as long: the costs do not move."""
    model = tools.reread(tools.model(), saved_planted)
    exits = get_exits(model)
    rng = np.random.default_rng(3)

    def disturbed(work: Any, device: Any) -> float:
        low, high = work.args[:2] if len(work.args) > 1 else (0, 2)
        held = rng.random() < 0.75
        return 1e-3 * (high - low) * (1 + held * rng.uniform(0, 9))

    monkeypatch.setattr(timing, "seconds", disturbed)
    found = timing.stage_seconds(model, exits)
    layers = np.array([*exits.layers, model.config.num_hidden_layers])
    np.testing.assert_allclose(found, 1e-3 * layers + 2e-3)
