"""A check must cost less than it can save: time of a decision beside one call of a head.

    python -m pytest tests/benchmarks/bench_policy_cost.py

Times depend on the machine and on what else it does, so the suite does not collect this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from adaptive.policies import (
    AccumulatedConfidence,
    Features,
    LogitMargin,
    Margin,
    MaxProbability,
    NegativeEntropy,
    Patience,
    Policy,
    ProbeScore,
    QuantileExit,
    Threshold,
)

WIDTH, VOCABULARY = 1024, 50_000
CHEAP = (Threshold(0.5), Patience(2), QuantileExit(0.5), AccumulatedConfidence((1.0,), 2.0))


def seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Fastest of many calls: what the work takes when nothing else runs."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def ratio(policy: Policy) -> float:
    head, hidden = torch.randn(VOCABULARY, WIDTH), torch.randn(1, WIDTH)
    logits = hidden @ head.T
    state = policy.init(1, device=torch.device("cpu"))
    features = Features(
        stage=0,
        position=torch.zeros(1, dtype=torch.int64),
        probe=torch.zeros(1),
        logits=logits,
        pruned_logits=logits[:, :512],
        answer=torch.zeros(1, dtype=torch.int64),
    )
    check = seconds(lambda: policy.update(features, state), repeats=200)
    return check / seconds(lambda: hidden @ head.T, repeats=10)


@pytest.mark.slow
@pytest.mark.parametrize("rule", CHEAP, ids=lambda rule: type(rule).__name__)
def test_a_probe_and_a_rule_cost_a_small_part_of_a_head(rule) -> None:
    assert ratio(Policy(ProbeScore(), rule, stages=(0,))) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("score", [Margin(pruned=True), MaxProbability(pruned=True)])
def test_a_pruned_score_costs_a_small_part_of_a_head(score) -> None:
    assert ratio(Policy(score, Threshold(0.0), stages=(0,))) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("score", [Margin(), MaxProbability(), LogitMargin(), NegativeEntropy()])
def test_a_full_score_costs_less_than_the_head_it_reads(score) -> None:
    assert ratio(Policy(score, Threshold(0.0), stages=(0,))) < 0.5
