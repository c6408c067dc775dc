"""Rules without scores, keyed noise, and offline references."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import (
    FixedStage,
    RandomStage,
    SkipDecode,
    exit_stages,
    keyed_noise,
    oracle_stages,
    unit_costs,
    unit_keys,
)


def trace_of(n_units: int, *, length: int = 1, exits: int = 3) -> Trace:
    n = n_units * length
    return Trace(
        scores=np.zeros((n, exits)),
        losses={"disagreement": np.zeros((n, exits), dtype=bool)},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
        lengths=np.full(n_units, length),
    )


def test_fixed_stage() -> None:
    trace = trace_of(3)
    for stage, expected in ((0, 0), (1.5, 2), (2, 2), (3, 3), (math.inf, 3)):
        assert (exit_stages(FixedStage(stage), trace) == expected).all()
    assert exit_stages(FixedStage(1), trace, stages=(0, 2)).tolist() == [2] * 3


def test_skip_decode_known_answer() -> None:
    """L = 24, 22 to 8 layers, warm-up 2, length 128: never rising, and the sets are nested."""
    rule = SkipDecode(depths=(8, 16), most=22, length=128, least=8)
    counts = rule.layers(torch.arange(140)).tolist()
    assert counts[0] == 22
    assert counts[127] == counts[139] == 8
    assert all(later <= earlier for earlier, later in pairwise(counts))
    sets = [
        set(rule.active_layers(position, n_layers=24, warmup=2)) for position in range(0, 140, 9)
    ]
    for earlier, later in pairwise(sets):
        assert later <= earlier
        assert {0, 1} <= later
    for position in (0, 60, 127):
        n = counts[position]
        expected = (0, 1, *range(24 - (n - 2), 24))
        assert rule.active_layers(position, n_layers=24, warmup=2) == expected


def test_skip_decode_stops_at_the_first_exit_deep_enough() -> None:
    rule = SkipDecode(depths=(4, 8), most=12, length=9, least=4)
    trace = trace_of(2, length=10, exits=2)
    stages = exit_stages(rule, trace).reshape(2, 10)
    assert (stages[0] == stages[1]).all()
    wanted = rule.layers(torch.arange(10)).numpy()
    expected = np.where(wanted <= 4, 0, np.where(wanted <= 8, 1, 2))
    assert (stages[0] == expected).all()
    assert (np.diff(stages[0]) <= 0).all()
    assert rule.knobs(trace, size=4)[0] == math.inf


def test_random_stage_has_its_law_and_its_seed() -> None:
    trace = trace_of(30_000)
    stages = exit_stages(RandomStage(0.6), trace)
    law = [0.4, 0.24, 0.144, 0.216]
    counts = np.bincount(stages, minlength=4)
    assert stats.chisquare(counts, np.array(law) * 30_000).pvalue > 1e-3
    assert (exit_stages(RandomStage(0.6), trace, seed=1) != stages).any()
    assert (exit_stages(RandomStage(1.0), trace) == 3).all()


def test_noise_is_uniform_and_independent() -> None:
    keys = unit_keys([str(unit) for unit in range(20_000)])
    first, second = (keyed_noise(keys, torch.full_like(keys, place)) for place in (0, 1))
    for draw in (first, second):
        assert draw.dtype is torch.float32
        assert 0.0 <= draw.min() <= draw.max() < 1.0
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    other = keyed_noise(keys, torch.zeros_like(keys), seed=1)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
    along = keyed_noise(keys[:1].expand(20_000), torch.arange(20_000))
    assert stats.kstest(along.numpy(), "uniform").pvalue > 1e-3


def test_noise_is_the_same_for_ever() -> None:
    """A stored certificate names a seed: the draws behind it may never change."""
    keys = unit_keys(["a", "b"])
    assert keys.tolist() == KEYS
    noise = keyed_noise(keys, torch.tensor([0, 5]), seed=3)
    np.testing.assert_array_equal(noise, np.array(NOISE, dtype=np.float32))


def test_noise_of_huge_seeds() -> None:
    keys = unit_keys(["a"])
    for seed in (-(2**80), 2**80, -1):
        assert 0.0 <= keyed_noise(keys, torch.zeros(1, dtype=torch.int64), seed=seed).item() < 1.0


def test_oracle() -> None:
    trace = Trace(
        scores=np.zeros((4, 2)),
        losses={"disagreement": [[1, 0], [0, 0], [1, 1], [0, 1]]},
        costs=[1.0, 2.0, 4.0],
        cost_quantity="layers",
    )
    assert oracle_stages(trace).tolist() == [1, 0, 2, 0]
    assert oracle_stages(trace, price=0.5).tolist() == [0, 0, 0, 0]
    assert unit_costs(oracle_stages(trace), trace).mean() == 2.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedStage(math.nan), "stage"),
        (lambda: SkipDecode((), most=4, length=3), "depths"),
        (lambda: SkipDecode((2,), most=4, length=1), "length"),
        (lambda: SkipDecode((2,), most=4, length=3, least=5), "least"),
        (lambda: RandomStage(0.0), "going_on"),
        (lambda: exit_stages(FixedStage(), trace_of(2), stages=(3,)), "stages"),
        (lambda: exit_stages(FixedStage(), trace_of(2), stages=(1, 1)), "stages"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()


KEYS = [3405396810240292928, 8453121595177857668]
NOISE = [0.5149075388908386, 0.37731802463531494]
