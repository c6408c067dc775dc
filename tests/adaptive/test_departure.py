"""One full-depth trace says where every member's own run departs: shown on real runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from adaptive import InvalidArgumentError, Trace, UnsupportedError
from adaptive._collect import collect
from adaptive._departure import (
    Departures,
    compare_with_real,
    derived_sequence_losses,
    first_departures,
    flip_bound,
    path_losses,
    regenerated,
)
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._inputs import Units, read_units
from adaptive._losses import edit_loss, rouge_l_loss
from adaptive._run import Run
from adaptive._runs import full_depth, run_units
from adaptive.calibration import InvalidTypeError
from adaptive.policies import (
    AbstractRule,
    DynamicVocabulary,
    Features,
    Margin,
    Patience,
    Policy,
    ProbeScore,
    RandomStage,
    SampledExit,
    Threshold,
    exit_stages,
)
from adaptive.policies._base import State

NEW = 9
KNOBS = tuple(float(knob) for knob in np.linspace(0.99, 0.4, 9))
#: A score nearer to the threshold, or two logits nearer to each other, may change sides.
NEAR = 1e-4


@dataclass(frozen=True)
class Momentum(AbstractRule):
    """Easier to stop after a token that stopped: memory that goes from token to token."""

    threshold: float = float("inf")

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {
            "last": torch.zeros(batch_size, dtype=torch.bool, device=device),
            "now": torch.zeros(batch_size, dtype=torch.bool, device=device),
        }

    def decide(
        self, features: Features, score: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, State]:
        stop = score >= self.threshold - 0.1 * state["last"]
        return stop, state | {"now": state["now"] | stop}

    def advance(self, state: State) -> State:
        return {"last": state["now"], "now": torch.zeros_like(state["now"])}

    def with_knob(self, knob: float) -> Momentum:
        return Momentum(knob)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        return (float("inf"), *np.linspace(1, 0, size - 1).tolist())


class Case(SimpleNamespace):
    """A model's full-depth texts of some units, their trace, and real runs on demand."""

    units: Units
    texts: list[tuple[int, ...]]
    trace: Trace

    def real(self, policy: Policy) -> tuple[Run, ...]:
        return run_units(self.model, self.units, policy, deployment=self.deployment, progress=False)


def case(model: Any, prompts: Any, *, score: Any = None, **generation: Any) -> Case:
    deployment = Deployment(
        NEW, batch_size=16, generation={"do_sample": False} | generation, seed=3
    )
    units = read_units(prompts, model=model)
    full = run_units(
        model,
        units,
        full_depth(require_exits(model)),
        deployment=deployment,
        labels=False,
        progress=False,
    )
    texts = [run.tokens for run in full]
    long = [i for i, text in enumerate(texts) if len(text) > 1]
    units, texts = units.select(long), [texts[i] for i in long]
    trace = collect(model, units, texts, deployment=deployment, score=score, progress=False)
    return Case(model=model, units=units, texts=texts, trace=trace, deployment=deployment)


@pytest.fixture(scope="module")
def model(tools: SimpleNamespace, saved_planted: Any) -> Any:
    return tools.reread(tools.model(), saved_planted)


@pytest.fixture(scope="module")
def greedy(model: Any, tools: SimpleNamespace) -> Case:
    return case(model, tools.prompts(24, seed=31))


PROBE = Policy(ProbeScore(), Threshold(), stages=(0, 1, 2))


def _explained(trace: Trace, unit: int, at: int, knob: float) -> bool:
    """Whether a score of the token at index ``at`` is within rounding of the threshold."""
    starts = np.concatenate(([0], np.cumsum(trace.lengths)))
    row = starts[unit] + at - 1
    return bool((np.abs(trace.scores[row] - knob) < NEAR).any())


# -- departures are where the trace says ----------------------------------------------------------


def test_real_runs_depart_where_the_trace_says(greedy: Case) -> None:
    """24 prompts, 9 thresholds, float32: every flip is at a near-tie, and there are few."""
    departures = first_departures(PROBE, KNOBS, greedy.trace)
    flips = compared = 0
    for column, knob in enumerate(KNOBS):
        runs = greedy.real(PROBE.member(knob))
        both = compare_with_real(departures, column, greedy.texts, runs)
        for unit, (derived, real) in enumerate(both):
            compared += 1
            if derived == real:
                if derived >= 0:
                    assert departures.token[unit, column] == runs[unit].tokens[derived]
                continue
            flips += 1
            first = min(value for value in (derived, real) if value >= 0)
            assert _explained(greedy.trace, unit, int(first), knob)
    assert flips <= 0.02 * compared
    assert 0.1 < departures.losses.mean() < 0.9  # there was something to depart from


def test_derived_losses_are_those_of_real_runs(greedy: Case) -> None:
    departures = first_departures(PROBE, KNOBS[::4], greedy.trace)
    for column, knob in enumerate(KNOBS[::4]):
        real = np.array([float((r.agreement == 0).any()) for r in greedy.real(PROBE.member(knob))])
        flips = real != departures.losses[:, column]
        assert flips.sum() <= 1


@pytest.mark.parametrize(
    "policy",
    [
        Policy(Margin(), Threshold(0.3), stages=(0, 2)),
        Policy(ProbeScore(), Threshold(0.6, warmup=4), stages=(0, 1, 2)),
        Policy(ProbeScore(), Patience(1), stages=(0, 1, 2)),
        Policy(ProbeScore(), Momentum(0.8), stages=(0, 1, 2)),
        Policy(DynamicVocabulary((20, 10, 5)), Threshold(0.4), stages=(0, 1, 2)),
    ],
    ids=["margin", "warm-up", "patience", "memory across tokens", "memory in the score"],
)
def test_other_rules_and_scores(model: Any, tools: SimpleNamespace, policy: Policy) -> None:
    found = case(model, tools.prompts(12, seed=32), score=policy.score)
    knob = getattr(policy.rule, getattr(policy.rule, "knob_name", "threshold"))
    departures = first_departures(policy, [knob], found.trace)
    both = compare_with_real(departures, 0, found.texts, found.real(policy))
    assert (both[:, 0] != both[:, 1]).sum() <= 1
    assert (departures.index >= 0).any()


@pytest.mark.parametrize(
    "generation", [{"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 20}], ids=str
)
def test_other_decoding(model: Any, tools: SimpleNamespace, generation: dict[str, Any]) -> None:
    found = case(model, tools.prompts(12, seed=33), **generation)
    departures = first_departures(PROBE, [0.8], found.trace)
    both = compare_with_real(departures, 0, found.texts, found.real(PROBE.member(0.8)))
    assert (both[:, 0] != both[:, 1]).sum() <= 1
    assert (departures.index >= 0).any()


@pytest.mark.parametrize(
    "rule", [RandomStage(0.8), SampledExit(3.0)], ids=lambda rule: type(rule).__name__
)
def test_rules_that_draw_under_the_seed_of_the_deployment(
    model: Any, tools: SimpleNamespace, rule: AbstractRule
) -> None:
    """The deployment's seed is 3: the draws of another seed foretell other departures."""
    policy = Policy(ProbeScore(), rule, stages=(0, 1, 2))
    found = case(model, tools.prompts(24, seed=36))
    knob = getattr(rule, rule.knob_name)  # type: ignore[attr-defined]
    departures = first_departures(policy, [knob], found.trace, seed=3)
    runs = found.real(policy)
    both = compare_with_real(departures, 0, found.texts, runs)
    assert (both[:, 0] != both[:, 1]).sum() <= 1
    other = first_departures(policy, [knob], found.trace)
    assert (other.index != departures.index).sum() > 3
    derived = derived_sequence_losses(
        model,
        found.units,
        found.texts,
        policy,
        [knob],
        found.trace,
        loss=edit_loss,
        deployment=found.deployment,
    )
    real = [edit_loss(r.tokens, t, None) for r, t in zip(runs, found.texts, strict=True)]
    assert (np.abs(derived[:, 0] - real) > 1e-12).sum() <= 1


@pytest.mark.parametrize(
    "generation",
    [{"repetition_penalty": 5.0}, {"do_sample": True, "temperature": 3.0}],
    ids=["processors", "sampling"],
)
def test_rules_that_read_answers_see_the_same_under_other_decoding(
    model: Any, tools: SimpleNamespace, generation: dict[str, Any]
) -> None:
    """Patience compares the likeliest tokens, in the loop and offline, whatever is emitted."""
    policy = Policy(ProbeScore(), Patience(1), stages=(0, 1, 2))
    found = case(model, tools.prompts(24, seed=37), **generation)
    exit_choices = np.asarray(found.trace.columns["exit_choices"])
    assert (exit_choices != np.asarray(found.trace.columns["answers"])).mean() > 0.02
    departures = first_departures(policy, [1.0], found.trace)
    runs = found.real(policy)
    both = compare_with_real(departures, 0, found.texts, runs)
    assert (both[:, 0] != both[:, 1]).sum() <= 1
    again = collect(
        model,
        found.units,
        [run.tokens for run in runs],
        deployment=found.deployment,
        progress=False,
    )
    online = np.concatenate([run.stages[1:] for run in runs])
    np.testing.assert_array_equal(exit_stages(policy.rule, again), online)
    assert 0.0 < (online < 3).mean() < 1.0


def test_texts_that_end(model: Any, greedy: Case, tools: SimpleNamespace) -> None:
    """An end token inside: departures before it, at it, and runs that go on past it."""
    end = int(greedy.texts[0][4])
    found = case(model, tools.prompts(24, seed=31), eos_token_id=end)
    assert len({len(text) for text in found.texts}) > 1
    departures = first_departures(PROBE, [0.6], found.trace)
    runs = found.real(PROBE.member(0.6))
    both = compare_with_real(departures, 0, found.texts, runs)
    assert (both[:, 0] != both[:, 1]).sum() <= 1
    early = regenerated(
        model,
        found.units,
        found.texts,
        PROBE.member(0.6),
        departed=departures.index[:, 0],
        token=departures.token[:, 0],
        deployment=found.deployment,
    )
    same = both[:, 0] == both[:, 1]
    assert [e for e, s in zip(early, same, strict=True) if s] == [
        r.tokens for r, s in zip(runs, same, strict=True) if s
    ]


def test_flips_in_bfloat16_are_counted(tools: SimpleNamespace) -> None:
    """Half precision rounds earlier: some runs depart elsewhere, and the bound covers them."""
    from adaptive import attach_exits

    model = tools.model().to(torch.bfloat16)
    attach_exits(model, tools.EXITS)
    margin = replace(PROBE, score=Margin())
    found = case(model, tools.prompts(24, seed=34), score=Margin())
    departures = first_departures(margin, [0.3], found.trace)
    runs = found.real(margin.member(0.3))
    both = compare_with_real(departures, 0, found.texts, runs)
    real = (both[:, 1] >= 0).astype(float)
    flips = int((real != departures.losses[:, 0]).sum())
    assert flips < 0.35 * len(both)
    bound = flip_bound(departures.losses[:, 0], real, delta=0.05)
    assert bound >= flips / len(both)
    assert real.mean() <= departures.losses[:, 0].mean() + bound


# -- any sequence loss from departure points ------------------------------------------------------


@pytest.mark.parametrize("loss", [rouge_l_loss, edit_loss])
def test_derived_sequence_losses_are_those_of_real_runs(greedy: Case, loss: Any) -> None:
    knobs = [float("inf"), 0.85, 0.6]
    derived = derived_sequence_losses(
        greedy.model,
        greedy.units,
        greedy.texts,
        PROBE,
        knobs,
        greedy.trace,
        loss=loss,
        deployment=greedy.deployment,
    )
    assert derived.shape == (len(greedy.units), 3)
    assert not derived[:, 0].any()
    for column, knob in enumerate(knobs):
        runs = greedy.real(PROBE.member(knob))
        real = [loss(r.tokens, t, None) for r, t in zip(runs, greedy.texts, strict=True)]
        assert (np.abs(derived[:, column] - real) > 1e-12).sum() <= 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_going_on_is_generating_from_the_start(greedy: Case, batch_size: int) -> None:
    member = PROBE.member(0.6)
    departures = first_departures(PROBE, [0.6], greedy.trace)
    early = regenerated(
        greedy.model,
        greedy.units,
        greedy.texts,
        member,
        departed=departures.index[:, 0],
        token=departures.token[:, 0],
        deployment=replace(greedy.deployment, batch_size=batch_size),
    )
    runs = greedy.real(member)
    both = compare_with_real(departures, 0, greedy.texts, runs)
    for text, run, (derived, real) in zip(early, runs, both, strict=True):
        if derived == real:
            assert text == run.tokens


def test_what_never_departs_is_not_generated(greedy: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing departs")

    monkeypatch.setattr("adaptive._departure.generate", refuse)
    monkeypatch.setattr("adaptive._departure.run_units", refuse)
    none = np.full(len(greedy.units), -1)
    found = regenerated(
        greedy.model,
        greedy.units,
        greedy.texts,
        PROBE.member(float("inf")),
        departed=none,
        token=none,
        deployment=greedy.deployment,
    )
    assert list(found) == greedy.texts


def test_rules_with_memory_are_generated_from_the_start(model: Any, tools: SimpleNamespace) -> None:
    policy = Policy(ProbeScore(), Momentum(0.7), stages=(0, 1, 2))
    found = case(model, tools.prompts(10, seed=35))
    departures = first_departures(policy, [0.7], found.trace)
    early = regenerated(
        model,
        found.units,
        found.texts,
        policy,
        departed=departures.index[:, 0],
        token=departures.token[:, 0],
        deployment=found.deployment,
    )
    runs = found.real(policy)
    both = compare_with_real(departures, 0, found.texts, runs)
    assert (departures.index >= 0).any()
    for text, run, (derived, real) in zip(early, runs, both, strict=True):
        assert text == run.tokens or derived != real


# -- definitions ----------------------------------------------------------------------------------


def _hand_made(**changes: Any) -> Trace:
    """Two units of three and two tokens, two exits, scores and answers written down."""
    fields: dict[str, Any] = {
        "scores": np.array([[0.9, 0.9], [0.1, 0.8], [0.9, 0.9], [0.2, 0.3], [0.6, 0.9]], "float32"),
        "losses": {"disagreement": np.zeros((5, 2), dtype=bool)},
        "costs": np.array([1.0, 2.0, 3.0]),
        "cost_quantity": "layers",
        "lengths": np.array([3, 2]),
        "unit_ids": ("a", "b"),
        "columns": {
            "answers": np.array([[5, 5], [9, 7], [8, 7], [3, 3], [4, 2]]),
            "choices": np.array([5, 6, 7, 1, 2]),
            "emitted": np.array([5, 6, 7, 1, 2]),
            "positions": np.array([1, 2, 3, 1, 2]),
        },
    }
    return Trace(**(fields | changes))


def test_known_departures() -> None:
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 1))
    found = first_departures(policy, [float("inf"), 0.85, 0.7, 0.5, 0.0], _hand_made())
    assert found.index.tolist() == [[-1, 3, 2, 2, 2], [-1, -1, -1, 2, 1]]
    assert found.token.tolist() == [[-1, 8, 7, 7, 9], [-1, -1, -1, 4, 3]]
    assert found.losses.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_first_differences_are_found() -> None:
    departures = Departures(np.array([[1], [-1], [2], [2]]), np.zeros((4, 1), dtype=np.int64))
    full = [(1, 2, 3), (1, 2), (1, 2, 3), (1, 2)]
    early = [(1, 9, 3), (1, 2), (1, 2), (1, 2, 3)]
    nothing = [np.zeros(len(text)) for text in early]
    runs = [Run(text, none, none, none) for text, none in zip(early, nothing, strict=True)]  # type: ignore[arg-type]
    both = compare_with_real(departures, 0, full, runs)
    assert both.tolist() == [[1, 1], [-1, -1], [2, 2], [2, 2]]


def test_flip_bound_known_answer() -> None:
    real = np.zeros(60)
    assert flip_bound(real, real, delta=0.05) == pytest.approx(1 - 0.05 ** (1 / 60))
    derived = real.copy()
    derived[:3] = 1
    assert flip_bound(derived, real, delta=0.1) == pytest.approx(stats.beta.ppf(0.9, 4, 57))


def test_the_charge_for_flips_keeps_the_promise(rng: np.random.Generator) -> None:
    """Testing derived losses at ``risk - bound`` certifies the real risk (simulated)."""
    from adaptive.calibration import binomial_log_p
    from adaptive.calibration.conformance import violation_limit

    risk, delta, n, m, broken, replicates = 0.12, 0.1, 200, 150, 0, 2000
    true, flip = 0.09, 0.03 + 1e-6  # real risk 0.12 and a hair: every certification is wrong
    for _ in range(replicates):
        checked = (rng.random(m) < flip).astype(float)
        bound = flip_bound(np.zeros(m), checked, delta=delta / 2)
        if bound >= risk:
            continue
        wrong = int((rng.random(n) < true).sum())
        broken += bool(binomial_log_p(wrong, n, risk=risk - bound) <= np.log(delta / 2))
    assert broken <= violation_limit(replicates, delta)


@pytest.mark.parametrize("mode", ["propagate", "verify"])
def test_other_modes_are_refused(mode: Any) -> None:
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 1), mode=mode)
    with pytest.raises(UnsupportedError, match=f"`exact` mode only, not in `{mode}`"):
        first_departures(policy, [0.5], _hand_made())


def test_traces_of_other_texts_are_refused() -> None:
    columns = dict(_hand_made().columns) | {"choices": np.array([5, 6, 8, 1, 2])}
    with pytest.raises(InvalidArgumentError, match="a trace of the model's own text"):
        first_departures(
            Policy(ProbeScore(), Threshold(), stages=(0,)), [0.5], _hand_made(columns=columns)
        )


# -- all of it at one call ------------------------------------------------------------------------

PATH = (float("inf"), 0.9, 0.7, 0.5)


def losses_of(model: Any, prompts: Any, policy: Policy = PROBE, **settings: Any) -> Any:
    defaults = {"new_tokens": NEW, "batch_size": 16, "rng": 3, "progress": False}
    return path_losses(model, prompts, policy, PATH, **(defaults | settings))


def test_path_losses_are_those_of_the_trace(greedy: Case, model: Any) -> None:
    found = losses_of(model, [list(prompt) for prompt in greedy.units.prompts])
    assert np.array_equal(found, first_departures(PROBE, PATH, greedy.trace).losses)
    assert found[:, 1:].any()
    texts = losses_of(model, [list(prompt) for prompt in greedy.units.prompts], loss="edit")
    assert ((texts > 0) <= (found > 0)).all()  # texts differ nowhere but behind a departure
    assert texts.any()


def test_a_config_that_samples_is_not_overruled(model: Any, tools: SimpleNamespace) -> None:
    from transformers import GenerationConfig

    prompts = tools.prompts(24, seed=31)
    config = GenerationConfig(do_sample=True, top_k=30, pad_token_id=0)
    sampled = losses_of(model, prompts, do_sample=True, top_k=30)
    assert np.array_equal(losses_of(model, prompts, generation_config=config), sampled)
    assert not np.array_equal(losses_of(model, prompts), sampled)


def test_texts_that_end_at_once_never_depart(model: Any, tools: SimpleNamespace) -> None:
    found = losses_of(model, tools.prompts(3, seed=31), eos_token_id=list(range(97)))
    assert found.shape == (3, len(PATH))
    assert not found.any()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"loss": "disagreement"}, InvalidArgumentError, "`loss` must be a loss between texts"),
        ({"loss": "bleu"}, InvalidArgumentError, "`loss` must be one of"),
        ({"policy": replace(PROBE, mode="propagate")}, UnsupportedError, "`exact` mode only"),
        ({"policy": replace(PROBE, stages=(0, 3))}, InvalidArgumentError, "exits 0..2"),
        ({"policy": "cheap"}, InvalidTypeError, "`policy` must be a Policy"),
    ],
)
def test_path_losses_name_what_is_wrong_before_they_generate(
    model: Any,
    tools: SimpleNamespace,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adaptive._departure.full_depth_texts", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(kind, match=message):
        losses_of(model, tools.prompts(3, seed=31), **changes)
