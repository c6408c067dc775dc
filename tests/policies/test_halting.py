"""Halting distributions: PonderNet, PALBERT, JEI-DNN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import (
    AbstractRule,
    QuantileExit,
    SampledExit,
    TruncatedSumExit,
    exit_stages,
    expected_readout,
    halting_distribution,
    truncated_distribution,
)

PALBERT = (0.1, 0.2, 0.5)


def stages(rule: AbstractRule, scores: np.ndarray, *, seed: int = 0) -> np.ndarray:
    return exit_stages(rule, _trace(scores), seed=seed)


def _trace(scores: np.ndarray) -> Trace:
    n, exits = scores.shape
    return Trace(
        scores=scores,
        losses={"disagreement": np.zeros((n, exits), dtype=bool)},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
    )


def test_palbert_known_answers() -> None:
    """Lambda (.1, .2, .5, 1): p (.1, .18, .36, .36), Q-exit(.5) at layer 3, Q-exit(.7) at 4."""
    found = halting_distribution(torch.tensor([*PALBERT, 1.0]))
    np.testing.assert_allclose(found, [0.1, 0.18, 0.36, 0.36], rtol=1e-5)
    np.testing.assert_allclose(found.cumsum(0), [0.1, 0.28, 0.64, 1.0], rtol=1e-5)
    scores = np.array([PALBERT])
    assert stages(QuantileExit(1.0, quantile=0.5), scores).tolist() == [2]
    assert stages(QuantileExit(1.0, quantile=0.7), scores).tolist() == [3]
    assert stages(QuantileExit(1.0, quantile=0.0999), scores).tolist() == [0]
    assert stages(QuantileExit(), np.ones((1, 3))).tolist() == [3]


def test_slowness_runs_through_all_quantiles() -> None:
    """Slowness s at quantile q is the published rule at the quantile 1 - (1 - q)^s."""
    scores = np.random.default_rng(1).uniform(0.0, 0.5, (300, 4)).astype(np.float32)
    mass = halting_distribution(torch.from_numpy(np.c_[scores, np.ones(300)])).cumsum(dim=1)
    for slowness in (0.3, 1.0, 2.0):
        published = (mass > 1.0 - 0.5**slowness).numpy().argmax(axis=1)
        np.testing.assert_array_equal(stages(QuantileExit(slowness), scores), published)


def test_a_gate_that_is_nearly_sure_leaves_a_fine_path() -> None:
    """Masses of 1 - 1e-9 and 1 - 1e-12 are one float; the knob still tells them apart."""
    scores = np.array([[0.9, 0.999], [0.999, 0.999], [0.999, 0.9999]])
    path = QuantileExit().knobs(_trace(scores), size=4)
    assert len(path) == 4
    assert len({tuple(stages(QuantileExit(knob), scores)) for knob in path}) == 4


def test_the_last_stage_takes_what_is_left() -> None:
    """Released PALBERT weighs the last stage by 1 - p_K in its expectation branch."""
    halting = torch.tensor([0.1, 0.2, 0.5, 0.3])
    ours = halting_distribution(halting)
    assert ours.sum().item() == pytest.approx(1.0)
    released_last = 1 - 0.3 * 0.36
    assert released_last != pytest.approx(ours[-1].item())
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    expected = 0.1 + 2 * 0.18 + 3 * 0.36 + 4 * 0.36
    assert expected_readout(ours, values).item() == pytest.approx(expected)


def test_jei_dnn_known_answer() -> None:
    gates = torch.tensor([0.6, 0.7, 0.9])
    np.testing.assert_allclose(truncated_distribution(gates), [0.6, 0.4, 0.0, 0.0], atol=1e-7)
    scores = np.array([[0.6, 0.7, 0.9], [0.3, 0.4, 0.9], [0.3, 0.3, 0.1], [0.2, 0.2, 0.2]])
    assert stages(TruncatedSumExit(1.0), scores).tolist() == [0, 1, 3, 3]


def test_slow_gates_are_divided_gates() -> None:
    """Slowness 2 on some gates is the published rule on half of them, and the path has a scale."""
    scores = np.random.default_rng(2).uniform(0.3, 1.0, (300, 5)).astype(np.float32)
    slow = stages(TruncatedSumExit(2.0), scores)
    np.testing.assert_array_equal(slow, stages(TruncatedSumExit(1.0), scores / 2))
    assert np.unique(slow).size > 2
    assert (stages(TruncatedSumExit(1.0), scores) <= 2).all()
    assert len(TruncatedSumExit().knobs(_trace(scores), size=20)) == 20


def test_conditional_activation_is_share_of_the_remaining_mass() -> None:
    """p_l / prod (1 - a_j) with a_j = p_j / prod (1 - a_i): the product is the remaining mass."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.0, 0.6, (500, 4)).astype(np.float32)
    pmf = truncated_distribution(torch.from_numpy(scores)).numpy()
    expected = np.full(500, 4)
    passing = np.ones(500)
    for stage in range(4):
        share = np.divide(pmf[:, stage], passing, out=np.ones(500), where=passing > 1e-9)
        expected = np.where((expected == 4) & (share >= 0.5 - 1e-9), stage, expected)
        passing *= 1 - np.minimum(share, 1.0)
    assert (stages(TruncatedSumExit(1.0), scores) == expected).mean() > 0.995


def test_sampled_exit_has_the_halting_law() -> None:
    n = 40_000
    scores = np.tile(np.array([PALBERT], dtype=np.float32), (n, 1))
    counts = np.bincount(stages(SampledExit(1.0), scores), minlength=4)
    assert stats.chisquare(counts, n * np.array([0.1, 0.18, 0.36, 0.36])).pvalue > 1e-3


def test_slowness_scales_the_hazard() -> None:
    n = 40_000
    scores = np.full((n, 1), 0.75, dtype=np.float32)
    stopped = (stages(SampledExit(2.0), scores) == 0).sum()
    assert stats.binomtest(int(stopped), n, 0.5).pvalue > 1e-3


def test_sampling_is_seeded() -> None:
    scores = np.tile(np.array([PALBERT], dtype=np.float32), (200, 1))
    first = stages(SampledExit(1.0), scores, seed=1)
    assert (first == stages(SampledExit(1.0), scores, seed=1)).all()
    assert (first != stages(SampledExit(1.0), scores, seed=2)).any()


def test_certain_halting_and_certain_going_on() -> None:
    scores = np.array([[0.0, 1.0], [0.0, 0.0]])
    assert stages(SampledExit(5.0), scores).tolist() == [1, 2]
    assert stages(QuantileExit(5.0), scores).tolist() == [1, 2]
    assert stages(TruncatedSumExit(1.0, level=1.0), scores).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QuantileExit(math.nan), "slowness"),
        (lambda: QuantileExit(1.0, quantile=1.0), "quantile"),
        (lambda: SampledExit(0.0), "slowness"),
        (lambda: TruncatedSumExit(0.0), "slowness"),
        (lambda: TruncatedSumExit(1.0, level=0.0), "level"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
