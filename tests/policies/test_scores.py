"""Scores: known values, limits, and the defects of released code."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace, fit_isotonic, fit_platt
from adaptive.policies import (
    AbstractScore,
    BetaMajority,
    Calibrated,
    Concentration,
    DynamicVocabulary,
    Energy,
    Features,
    HaltingGate,
    LinearGate,
    LogitMargin,
    Margin,
    MaxProbability,
    MovingMean,
    NegativeEntropy,
    NoScore,
    Policy,
    ProbeScore,
    RecurrentGate,
    Saturation,
    StatisticsGate,
    Steadiness,
    Tempered,
    Threshold,
    VoteShare,
    decaying_vocabulary,
)

CPU = torch.device("cpu")
RECURRENT = RecurrentGate(ProbeScore(), (0.5,), ((1.0, 1.0),), (0.0,))


def at(stage: int = 0, *, position: int = 0, **given: Tensor | None) -> Features:
    batch = next(len(value) for value in given.values() if value is not None)
    where = torch.full((batch,), position, dtype=torch.int64)
    return Features(stage=stage, position=where, **given)  # type: ignore[arg-type]


def once(score: AbstractScore, features: Features) -> Tensor:
    return score.score(features, score.init(len(features.position), device=CPU))[0]


def logits_of(*probabilities: float) -> Tensor:
    return torch.log(torch.tensor([probabilities]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readout_scores_equal_their_definition(dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 17) * 4).to(dtype)
    p = torch.softmax(logits.double(), dim=-1).numpy()
    best = np.sort(p, axis=1)[:, ::-1]
    top = np.sort(logits.double().numpy(), axis=1)[:, ::-1]
    expected = {
        MaxProbability(): best[:, 0],
        Margin(): best[:, 0] - best[:, 1],
        LogitMargin(): top[:, 0] - top[:, 1],
        NegativeEntropy(): -stats.entropy(p, axis=1),
        Concentration(): 1 - stats.entropy(p, axis=1) / math.log(17),
        Energy(2.0): 2 * np.log(np.exp(logits.double().numpy() / 2).sum(axis=1)),
    }
    for score, value in expected.items():
        np.testing.assert_allclose(once(score, at(logits=logits)), value, rtol=2e-5, atol=2e-6)


def released_entropy(logits: Tensor) -> Tensor:
    """DeeBERT's entropy as released: raw exponentials."""
    raised = torch.exp(logits)
    total, weighted = raised.sum(dim=1), (logits * raised).sum(dim=1)
    return torch.log(total) - weighted / total


def test_entropy_survives_logits_of_any_size() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 1000.0], [-1000.0, -1000.0]])
    assert not torch.isfinite(released_entropy(logits)).all()
    torch.testing.assert_close(
        once(NegativeEntropy(), at(logits=logits)),
        torch.tensor([0.0, -math.log(2), -math.log(2)]),
    )


def test_entropy_ignores_tokens_that_a_processor_forbids() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    torch.testing.assert_close(
        once(NegativeEntropy(), at(logits=logits)),
        once(NegativeEntropy(), at(logits=logits[:, :2])),
    )


def test_posterior_share_of_two_hypotheses() -> None:
    """Early exits in speech recognition: log-scores (0, -1) of an N-best list give 0.7311."""
    share = once(MaxProbability(), at(logits=torch.tensor([[0.0, -1.0]])))
    assert share.item() == pytest.approx(0.7311, abs=1e-4)


def test_temperature_flips_the_exit_of_the_right_tool_for_the_job() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    plain, tempered = MaxProbability(), Tempered(MaxProbability(), (2.0,))
    assert once(plain, at(logits=logits)).item() == pytest.approx(0.8808, abs=1e-4)
    assert once(tempered, at(logits=logits)).item() == pytest.approx(0.7311, abs=1e-4)
    for score, expected in ((plain, True), (tempered, False)):
        policy = Policy(score, Threshold(0.8), stages=(0,))
        stop, _, _ = policy.update(at(logits=logits), policy.init(1, device=CPU))
        assert stop.item() is expected


def test_temperatures_are_recovered() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 5)) * 2
    labels = np.array([rng.choice(5, p=np.exp(x) / np.exp(x).sum()) for x in true])
    logits = np.stack([true * 2.0, true * 0.5], axis=1)
    fitted = Tempered.fit(MaxProbability(), logits, labels)
    np.testing.assert_allclose(fitted.temperatures, (2.0, 0.5), rtol=0.1)


def test_saturation_exits_where_layers_become_identities() -> None:
    """MuE: a stack whose layers do nothing from a known depth on exits there."""
    states = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    scores = [
        once(Saturation(), at(stage, hidden=state, previous=states[stage - 1] if stage else None))
        for stage, state in enumerate(states)
    ]
    assert scores[0].item() == -math.inf
    assert scores[1].item() == pytest.approx(math.sqrt(0.5))
    assert scores[2].item() == pytest.approx(1.0)


def test_pruned_confidence_is_full_confidence_over_kept_mass() -> None:
    score = DynamicVocabulary((3, 3))
    first = logits_of(0.4, 0.3, 0.2, 0.06, 0.04)
    later = logits_of(0.6, 0.2, 0.1, 0.06, 0.04)
    state = score.init(1, device=CPU)
    _, state = score.score(at(0, logits=first), state)
    assert sorted(state["ids"][0].tolist()) == [0, 1, 2]
    value, _ = score.score(at(1, logits=later), state)
    assert value.item() == pytest.approx(0.4 / 0.9, rel=1e-5)


def test_pruned_confidence_when_the_best_token_was_dropped() -> None:
    """With p = (.9 dropped, .05, .05) the full margin is .85 and the pruned one 0."""
    score = DynamicVocabulary((2, 2))
    state = score.init(1, device=CPU)
    _, state = score.score(at(0, logits=logits_of(0.1, 0.5, 0.4)), state)
    value, state = score.score(at(1, logits=logits_of(0.9, 0.05, 0.05)), state)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert once(Margin(), at(logits=logits_of(0.9, 0.05, 0.05))).item() == pytest.approx(0.85)
    _, state = score.score(at(0, logits=logits_of(0.9, 0.06, 0.04)), score.advance(state))
    assert sorted(state["ids"][0].tolist()) == [0, 1]


def test_decaying_vocabulary() -> None:
    sizes = decaying_vocabulary(256, 64, n_exits=8)
    assert sizes[0] == 256
    # max(k2, k1 / (1 + ((k1 - k2) / k2) i / L)) with k1 = 256, k2 = 64, L = 4
    assert decaying_vocabulary(256, 64, n_exits=4) == (256, 146, 102, 78)
    assert all(later <= earlier for earlier, later in pairwise(sizes))
    assert min(sizes) >= 64
    with pytest.raises(InvalidArgumentError, match="`last`"):
        decaying_vocabulary(10, 20, n_exits=2)


def test_eat_mean_and_variance() -> None:
    """EAT with alpha 1/2 on (1, .5, .5, .5): the variance is around the *updated* mean."""
    values = (1.0, 0.5, 0.5, 0.5)
    mean, spread = MovingMean(_Read(), 0.5), Steadiness(_Read(), 0.5, warmup=1)
    m, s = mean.init(1, device=CPU), spread.init(1, device=CPU)
    means, variances = [], []
    for stage, value in enumerate(values):
        here = at(stage, probe=torch.tensor([value]))
        one, m = mean.score(here, m)
        other, s = spread.score(here, s)
        means.append(one.item())
        variances.append(-other.item())
    assert means == [1.0, 0.75, 0.625, 0.5625]
    np.testing.assert_allclose(variances, [0.0, 0.03125, 0.0234375, 0.013671875], rtol=1e-6)


def test_steadiness_waits_for_its_warm_up() -> None:
    score = Steadiness(_Read(), 0.5, warmup=3)
    state = score.init(1, device=CPU)
    for expected in (True, True, False):
        value, state = score.score(at(probe=torch.tensor([0.5])), state)
        assert math.isinf(value.item()) is expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((7, 7, 7), 0.9375),
        ((7, 7, 7, 7), 0.96875),
        ((7, 7, 1, 7, 7, 7), 0.9375),
        ((7, 1, 7, 7, 7, 7, 7), 0.9648),
        ((7, 7, 7, 7, 1, 7, 7, 7), 0.9805),
        ((7, 1, 2), 0.5),
    ],
)
def test_adaptive_consistency(answers: tuple[int, ...], expected: float) -> None:
    score, share = BetaMajority(8), VoteShare(8, against=0.0)
    state, ballot = score.init(1, device=CPU), share.init(1, device=CPU)
    for answer in answers:
        here = at(answer=torch.tensor([answer]))
        value, state = score.score(here, state)
        part, ballot = share.score(here, ballot)
    assert value.item() == pytest.approx(expected, abs=5e-5)
    assert part.item() == pytest.approx(answers.count(answers[-1]) / len(answers))


def test_one_vote_is_not_unanimity() -> None:
    """The plain share of one vote is 1; with a vote against, agreement has to last."""
    share = VoteShare(4)
    state, found = share.init(1, device=CPU), []
    for answer in (5, 5, 5, 2):
        value, state = share.score(at(answer=torch.tensor([answer])), state)
        found.append(value.item())
    assert found == pytest.approx([1 / 2, 2 / 3, 3 / 4, 1 / 5])


def test_linear_gate_weighs_the_classes_alike() -> None:
    """With 95 % agreement the unweighted fit says "agrees" to everything near the border."""
    rng = np.random.default_rng(0)
    agree = rng.uniform(size=(20_000, 1)) < 0.95
    hidden = rng.normal(size=(20_000, 1, 2)) + np.where(agree, 1.0, -1.0)[:, :, None]
    gate = LinearGate.fit(hidden, agree)
    middle = once(gate, at(hidden=torch.zeros(1, 2)))
    assert middle.item() == pytest.approx(0.5, abs=0.05)
    assert once(gate, at(hidden=torch.ones(1, 2))).item() > 0.95


def test_an_exit_of_one_class_only_gets_a_constant_gate() -> None:
    hidden = np.random.default_rng(0).normal(size=(20, 2, 3))
    agree = np.zeros((20, 2), dtype=bool)
    agree[:, 1] = True
    gate = LinearGate.fit(hidden, agree)
    assert once(gate, at(0, hidden=torch.randn(1, 3))).item() < 0.05
    assert once(gate, at(1, hidden=torch.randn(1, 3))).item() > 0.95


def test_statistics_gate_reads_jei_dnns_four_statistics() -> None:
    p = np.array([0.6, 0.3, 0.1])
    q = p**2 / (p**2).sum()
    expected = [0.6, stats.entropy(p), 0.3, stats.entropy(q)]
    for place, value in enumerate(expected):
        weights = tuple(float(place == other) for other in range(4))
        found = once(StatisticsGate((weights,), (0.0,)), at(logits=logits_of(*p)))
        assert torch.logit(found).item() == pytest.approx(value, rel=1e-4)


def test_a_gate_forgets_the_gradients_of_earlier_steps() -> None:
    """EENet's fit loop never clears them: the same steps then lead elsewhere."""
    rng = np.random.default_rng(2)
    hidden, agree = rng.normal(size=(50, 2, 3)), rng.uniform(size=(50, 2)) < 0.5

    def trained(*, clear: bool) -> HaltingGate:
        cleared = torch.optim.Adam.zero_grad
        with pytest.MonkeyPatch.context() as patch:
            if not clear:
                patch.setattr(torch.optim.Adam, "zero_grad", lambda *_, **__: None)
            assert clear is (torch.optim.Adam.zero_grad is cleared)
            return HaltingGate.fit(hidden, agree, width=4, embedding=1, steps=40)

    def loss(gate: HaltingGate) -> float:
        found, state = [], gate.init(50, device=CPU)
        for stage in range(2):
            before = torch.tensor(hidden[:, stage - 1]).float() if stage else None
            here = at(stage, hidden=torch.tensor(hidden[:, stage]).float(), previous=before)
            found.append(gate.score(here, state)[0])
        label = torch.tensor(agree).float()
        return float(torch.nn.functional.binary_cross_entropy(torch.stack(found, dim=1), label))

    right, wrong = trained(clear=True), trained(clear=False)
    assert right != wrong
    assert loss(right) < 0.6


def test_statistics_survive_logits_of_any_size() -> None:
    logits = torch.tensor([[1000.0, 0.0, -math.inf], [1.0, 1.0, -math.inf]])
    found = [
        torch.logit(once(StatisticsGate((tuple(row),), (0.0,)), at(logits=logits)))
        for row in torch.eye(4).tolist()
    ]
    half = [0.5, math.log(2), 0.0, math.log(2)]
    np.testing.assert_allclose([value[1].item() for value in found], half, atol=1e-6)
    np.testing.assert_allclose([value[0].item() for value in found], [1, 0, 1, 0], atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_gate_is_trained_where_gradients_are_off(mode: Any) -> None:
    """Traces are collected without gradients; a fit in the same block must not fail."""
    rng = np.random.default_rng(3)
    hidden, agree = rng.normal(size=(30, 2, 3)), rng.uniform(size=(30, 2)) < 0.5
    settings = {"width": 4, "embedding": 1, "steps": 3}
    with mode():
        inside = HaltingGate.fit(hidden, agree, **settings)
    assert inside == HaltingGate.fit(hidden, agree, **settings)


def test_halting_gate_learns_what_a_linear_gate_cannot() -> None:
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(600, 2, 2))
    agree = hidden[..., 0] * hidden[..., 1] > 0
    gate = HaltingGate.fit(hidden, agree, width=16, steps=200)
    found = [
        once(
            gate,
            at(
                stage,
                hidden=torch.tensor(hidden[:, stage]).float(),
                previous=torch.tensor(hidden[:, 0]).float() if stage else None,
            ),
        )
        for stage in range(2)
    ]
    right = (torch.stack(found, dim=1).numpy() > 0.5) == agree
    assert right.mean() > 0.9


def test_recurrent_gate_remembers_the_sequence_and_forgets_it_after() -> None:
    """Memory holds only what every token visits: early stops of earlier tokens change nothing."""
    gate = RecurrentGate(_Read(), decays=(0.5,), weights=((0.0, 1.0),) * 2, biases=(0.0, 0.0))
    values = ((0.2, 0.9), (0.6, 0.1), (0.4, 0.4))
    for visited in (1, 2):
        state = gate.init(1, device=CPU)
        mean, seen = 0.0, []
        for first, second in values:
            mean = 0.5 * mean + 0.5 * first
            for stage, value in enumerate((first, second)[:visited]):
                here = at(stage, probe=torch.tensor([value]))
                found, state = gate.score(here, state)
                seen.append(torch.logit(found).item() - mean)
            state = gate.advance(state)
        np.testing.assert_allclose(seen, 0.0, atol=1e-6)
    assert gate.init(1, device=CPU)["means"].item() == 0.0


def test_recurrent_gate_of_a_trace_is_the_gate_of_the_loop() -> None:
    rng = np.random.default_rng(2)
    scores = rng.uniform(size=(60, 2)).astype(np.float32)
    trace = Trace(
        scores=scores,
        losses={"disagreement": rng.uniform(size=(60, 2)) > scores},
        costs=[1.0, 2.0, 3.0],
        cost_quantity="layers",
        lengths=[20, 30, 10],
    )
    gate = RecurrentGate.fit(_Read(), trace, decays=(0.5, 0.9))
    weights = np.array(gate.weights[1])
    state = gate.init(1, device=CPU)
    means = np.zeros(2)
    for token in range(20):
        means = means * gate.decays + (1 - np.array(gate.decays)) * scores[token, 0]
        for stage in range(2):
            found, state = gate.score(
                at(stage, probe=torch.tensor(scores[token, stage])[None]), state
            )
        expected = weights @ np.array([scores[token, 1], *means]) + gate.biases[1]
        assert torch.logit(found).item() == pytest.approx(expected, abs=1e-4)
        state = gate.advance(state)


@pytest.mark.parametrize("method", [fit_isotonic, fit_platt])
def test_calibration_keeps_the_order_and_gives_probabilities(method) -> None:
    rng = np.random.default_rng(4)
    scores = rng.uniform(size=(5000, 2)).astype(np.float32)
    wrong = rng.uniform(size=(5000, 2)) > scores**2
    trace = Trace(
        scores=scores,
        losses={"disagreement": wrong},
        costs=[1.0, 2.0, 3.0],
        cost_quantity="layers",
    )
    score = Calibrated.fit(_Read(), trace, method=method)
    raw = torch.linspace(0.05, 0.95, 19)
    mapped = once(score, at(1, probe=raw))
    assert (mapped.diff() >= 0).all()
    assert (mapped - raw**2).abs().max() < 0.12
    special = once(score, at(1, probe=torch.tensor([-math.inf, math.nan])))
    assert special[0].item() == -math.inf
    assert special[1].isnan()


def test_a_missing_feature_is_named() -> None:
    here = at(probe=torch.zeros(1))
    with pytest.raises(InvalidArgumentError, match="feature `logits`"):
        once(MaxProbability(), here)
    with pytest.raises(InvalidArgumentError, match="feature `hidden`"):
        once(Saturation(), here)


def test_probe_and_none() -> None:
    here = at(probe=torch.tensor([0.0, 100.0]))
    assert once(ProbeScore(), here).tolist() == [0.5, 1.0]
    assert once(NoScore(), here).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Energy(0.0), "temperature"),
        (lambda: DynamicVocabulary((4, 5)), "kept"),
        (lambda: LinearGate((), ()), "weights"),
        (lambda: StatisticsGate(((1.0,),), (0.0, 1.0)), "weights"),
        (lambda: HaltingGate((), (), ()), "layers"),
        (lambda: RecurrentGate(ProbeScore(), (1.0,), ((1.0, 1.0),), (0.0,)), "decays"),
        (lambda: MovingMean(ProbeScore(), 0.0), "weight"),
        (lambda: MovingMean(RECURRENT, 0.5), "base"),
        (lambda: Steadiness(RECURRENT, 0.5, warmup=1), "base"),
        (lambda: Steadiness(ProbeScore(), 0.5, warmup=0), "warmup"),
        (lambda: VoteShare(0), "n_stages"),
        (lambda: VoteShare(3, against=-1.0), "against"),
        (lambda: Tempered(ProbeScore(), (0.0,)), "temperatures"),
        (lambda: Calibrated(ProbeScore(), (((0.0, 0.0), (0.0, 1.0)),)), "tables"),
        (lambda: Calibrated(ProbeScore(), (((0.0, 1.0), (1.0, 0.0)),)), "tables"),
        (lambda: LinearGate.fit(np.zeros((3, 1, 2)), np.zeros((4, 1))), "agree"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()


class _Read(AbstractScore):
    """The number in the feature ``probe``."""

    needs = frozenset({"probe"})

    def init(self, batch_size: int, *, device: torch.device) -> dict[str, Tensor]:
        return {}

    def score(
        self, features: Features, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert features.probe is not None
        return features.probe, state
