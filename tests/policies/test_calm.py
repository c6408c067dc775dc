"""CALM: sequence losses, risk control on a toy decoder, and the off-by-one of released code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import InvalidArgumentError, control_risk
from adaptive.policies import (
    Decay,
    LinearGate,
    Margin,
    Saturation,
    ScheduledThreshold,
    calm_policy,
    risk_consistency,
    rouge_l_distance,
    textual_consistency,
    token_f1_distance,
)


def test_distances() -> None:
    assert rouge_l_distance("abcd", "abcd") == 0.0
    assert rouge_l_distance("", "") == 0.0
    assert rouge_l_distance("", "a") == 1.0
    assert rouge_l_distance(
        "police killed the gunman".split(), "police kill the gunman".split()
    ) == (pytest.approx(0.25))
    assert rouge_l_distance("axbycz", "abc") == pytest.approx(1 - 6 / 9)
    assert token_f1_distance([1, 1, 2], [1, 3]) == pytest.approx(1 - 2 / 5)


def test_both_consistencies() -> None:
    found = textual_consistency(["ab", "cd"], ["ab", "ce"], distance=token_f1_distance)
    assert found.tolist() == [0.0, 0.5]
    assert risk_consistency([0.5, 0.1], [0.2, 0.4]).tolist() == pytest.approx([0.3, 0.0])
    with pytest.raises(InvalidArgumentError, match="`early`"):
        textual_consistency(["a"], [], distance=token_f1_distance)


@pytest.mark.parametrize("score", [Margin(), Saturation(), LinearGate(((1.0,),) * 2, (0.0,) * 2)])
def test_calm_is_three_scores_and_one_rule(score) -> None:
    policy = calm_policy(score, stages=(0, 1), length=100)
    assert policy.mode == "propagate"
    assert policy.rule == ScheduledThreshold(Decay(tau=4.0, length=100), math.inf)
    assert policy.certificate is None


class ToyDecoder:
    """A deterministic decoder of three exits where each layer agrees from a known depth on.

    The next token depends on the whole prefix, so one early mistake changes all later inputs.
    """

    exits, length = 3, 12

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _draw(self, prefix: tuple[int, ...]) -> np.random.Generator:
        return np.random.default_rng([self.seed, *prefix])

    def generate(self, threshold: float) -> tuple[tuple[int, ...], list[int]]:
        prefix: tuple[int, ...] = ()
        stages = []
        for _ in range(self.length):
            rng = self._draw(prefix)
            token, agrees_from = int(rng.integers(0, 50)), int(rng.integers(0, self.exits + 1))
            noise = rng.uniform(-0.3, 0.3, self.exits)
            for stage in range(self.exits):
                settled = stage >= agrees_from
                if (0.75 if settled else 0.25) + noise[stage] >= threshold:
                    token = token if settled else token + 50
                    stages.append(stage)
                    break
            else:
                stages.append(self.exits)
            prefix = (*prefix, token)
        return prefix, stages


def test_losses_come_from_generation_and_the_oracle_exits_where_layers_agree() -> None:
    decoders = [ToyDecoder(seed) for seed in range(60)]
    grid = (math.inf, 0.6, 0.5, 0.3, 0.0)
    full = [one.generate(math.inf)[0] for one in decoders]
    losses, depths = [], []
    for threshold in grid:
        runs = [one.generate(threshold) for one in decoders]
        texts = [run[0] for run in runs]
        losses.append(textual_consistency(texts, full, distance=rouge_l_distance))
        depths.append(np.mean([run[1] for run in runs]))
    assert losses[0].max() == 0.0
    assert losses[1].max() == 0.0  # 0.6 separates settled from unsettled: the local oracle
    assert depths[1] < depths[0]
    per_token = np.mean([len(set(a) - set(b)) for a, b in zip(texts, full, strict=True)]) / 12
    assert losses[-1].mean() > 0.5
    assert per_token > 0.5
    result = control_risk(np.stack(losses, axis=1), risk=0.2, delta=0.05)
    assert result.index is not None
    assert losses[result.index].mean() < 0.2


@pytest.mark.statistical
def test_the_last_certified_member_is_returned_not_the_first_failure() -> None:
    """Risk .3 (1 - lambda), n = 100, 11-point grid: 1.4 % violations against 10.2 %."""
    rng = np.random.default_rng(0)
    lambdas = np.linspace(1.0, 0.0, 11)
    risks = 0.3 * (1 - lambdas)
    ours = released = 0
    for _ in range(1000):
        losses = (rng.uniform(size=(100, 1)) < risks[None, :]).astype(float)
        index = control_risk(losses, risk=0.1, delta=0.1, loss_type="binary").index or 0
        ours += risks[index] > 0.1
        released += risks[min(index + 1, 10)] > 0.1
    assert ours <= 130  # 0.999 quantile of Binomial(1000, 0.1)
    assert released > 2 * ours


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(
    ("points", "certified", "released"),
    [(11, 0.014, 0.102), (21, 0.041, 0.105), (101, 0.053, 0.065)],
)
def test_off_by_one_on_three_grids(points: int, certified: float, released: float) -> None:
    """4,000 calibrations: violation rates of the last certified and the first failing member."""
    rng = np.random.default_rng(points)
    risks = 0.3 * np.linspace(0.0, 1.0, points)
    ours = theirs = 0
    for _ in range(4000):
        draw = rng.uniform(size=100)
        index = (
            control_risk(
                lambda column, draw=draw: (draw < risks[column]).astype(float),
                n_columns=points,
                risk=0.1,
                delta=0.1,
                loss_type="binary",
            ).index
            or 0
        )
        ours += risks[index] > 0.1 + 1e-12
        theirs += risks[min(index + 1, points - 1)] > 0.1 + 1e-12
    assert ours <= stats.binom.ppf(0.999, 4000, 0.1)
    assert ours / 4000 == pytest.approx(certified, abs=0.015)
    assert theirs / 4000 == pytest.approx(released, abs=0.015)
