"""Traces: the values of the model's own forward pass, whatever the batch, the padding, the tier."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive import InvalidArgumentError, NoExitsError, Trace, collect_trace, generate
from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._inputs import Units, read_units
from adaptive._output import AdaptiveOutput
from adaptive._runs import full_depth, run_units
from adaptive.calibration import InvalidTypeError
from adaptive.policies import (
    AbstractRule,
    AbstractScore,
    DynamicVocabulary,
    Margin,
    MaxProbability,
    Patience,
    Policy,
    ProbeScore,
    Saturation,
    Threshold,
    exit_stages,
)

NEW = 7
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}
tiers = pytest.mark.parametrize("tier", ["native", "generic"])


@pytest.fixture(scope="module")
def model(tools: SimpleNamespace, saved_planted: Any) -> Any:
    return tools.reread(tools.model(), saved_planted)


@pytest.fixture(scope="module")
def prompts(tools: SimpleNamespace) -> list[list[int]]:
    found: list[list[int]] = tools.prompts(11, seed=21, longest=9)
    return found


def _trace(model: Any, prompts: list[list[int]], **settings: Any) -> Trace:
    return collect_trace(model, prompts, progress=False, **({"new_tokens": NEW} | settings))


def _texts(trace: Trace) -> list[np.ndarray]:
    return np.split(np.asarray(trace.columns["emitted"]), np.cumsum(trace.lengths)[:-1])


# -- the slow reference ---------------------------------------------------------------------------


@torch.no_grad()
def _slow(model: Any, prompt: list[int], score: AbstractScore) -> dict[str, np.ndarray]:
    """One unpadded prompt: `model.generate`, then every exit read off the model's own states."""
    ids = torch.tensor([prompt])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    exits = require_exits(model)
    states = model(input_ids=text[:, :-1], use_cache=False, output_hidden_states=True).hidden_states
    logits = model(input_ids=text[:, :-1], use_cache=False).logits[0, len(prompt) :]
    rows: dict[str, list[Any]] = {"scores": [], "answers": []}
    for slot in range(len(prompt), text.shape[1] - 1):
        state = score.init(1, device=torch.device("cpu"))
        previous: Tensor | None = None
        scores, answers = [], []
        for exit, layer in enumerate(exits.layers):
            hidden = states[layer][:, slot]
            answers.append(model.lm_head(model.model.norm(exits.translate(exit, hidden))).argmax())
            features = exits.features(
                score.needs,
                exit,
                hidden,
                previous=previous,
                position=torch.tensor([slot + 1 - len(prompt)]),
                readout=lambda value: model.lm_head(model.model.norm(value)),  # type: ignore[arg-type]
            )
            value, state = score.score(features, state)
            scores.append(float(value))
            previous = hidden
        rows["scores"].append(scores)
        rows["answers"].append([int(answer) for answer in answers])
    return {
        "scores": np.array(rows["scores"]),
        "answers": np.array(rows["answers"]),
        "choices": logits.argmax(-1).numpy(),
        "emitted": text[0, len(prompt) + 1 :].numpy(),
    }


@tiers
@pytest.mark.parametrize(
    "score",
    [ProbeScore(), MaxProbability(), Margin(), Saturation(), DynamicVocabulary((20, 10, 5))],
    ids=lambda score: type(score).__name__,
)
def test_traces_are_the_models_own_values(
    model: Any, prompts: list[list[int]], score: AbstractScore, tier: Any
) -> None:
    trace = _trace(model, prompts[:4], score=score, tier=tier, batch_size=3)
    slow = [_slow(model, prompt, score) for prompt in prompts[:4]]
    for name in ("answers", "choices", "emitted"):
        expected = np.concatenate([part[name] for part in slow])
        assert np.array_equal(np.asarray(trace.columns[name]), expected)
    expected = np.concatenate([part["scores"] for part in slow])
    assert trace.scores.dtype == np.float32
    assert np.allclose(trace.scores, expected, atol=2e-5)
    wrong = np.asarray(trace.columns["answers"]) != np.asarray(trace.columns["choices"])[:, None]
    assert np.array_equal(np.asarray(trace.losses["disagreement"], dtype=bool), wrong)
    assert trace.lengths.tolist() == [NEW - 1] * 4
    assert np.asarray(trace.columns["positions"]).tolist() == [*range(1, NEW)] * 4


def test_a_trace_names_its_units_groups_and_costs(model: Any, prompts: list[list[int]]) -> None:
    items = [{"input_ids": p, "doc": i // 2} for i, p in enumerate(prompts[:5])]
    trace = _trace(model, [*items, items[0]], groups="doc")
    assert trace.unit_ids == read_units(prompts[:5], model=model).ids  # the repetition counts once
    assert trace.groups is not None
    assert np.asarray(trace.groups).tolist() == [0, 0, 1, 1, 2]
    assert trace.cost_quantity == "seconds"
    assert trace.costs.shape == (4,)
    assert (np.diff(trace.costs) > 0).all()


# -- nothing depends on the company ---------------------------------------------------------------


@cache
def _alone(model: Any, prompts: tuple[tuple[int, ...], ...], sampled: bool) -> Trace:
    settings = SAMPLED if sampled else {}
    return _trace(model, [list(p) for p in prompts], batch_size=1, **settings)


@tiers
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_batches_and_padding_change_nothing(
    model: Any, prompts: list[list[int]], batch_size: int, sampled: bool, tier: Any
) -> None:
    alone = _alone(model, tuple(map(tuple, prompts)), sampled)
    settings = SAMPLED if sampled else {}
    together = _trace(model, prompts, batch_size=batch_size, tier=tier, **settings)
    for name in ("answers", "choices", "emitted", "positions"):
        assert np.array_equal(np.asarray(together.columns[name]), np.asarray(alone.columns[name]))
    assert np.allclose(together.scores, alone.scores, atol=2e-5)
    assert together.unit_ids == alone.unit_ids
    assert together.lengths.tolist() == alone.lengths.tolist()


def test_order_and_neighbours_change_nothing(model: Any, prompts: list[list[int]]) -> None:
    alone = _alone(model, tuple(map(tuple, prompts)), True)
    reverse = _trace(model, prompts[::-1], batch_size=5, **SAMPLED)
    for ours, theirs in zip(_texts(reverse)[::-1], _texts(alone), strict=True):
        assert np.array_equal(ours, theirs)


def test_texts_of_mixed_lengths(model: Any, prompts: list[list[int]]) -> None:
    """With an end token rows stop at their own places, and one-token texts leave no rows."""
    plain = _alone(model, tuple(map(tuple, prompts)), False)
    end = int(_texts(plain)[0][2])
    ragged = _trace(model, prompts, batch_size=4, eos_token_id=end)
    assert len(set(ragged.lengths.tolist())) > 1
    kept = {name: i for i, name in enumerate(plain.unit_ids)}
    full = np.split(plain.scores, np.cumsum(plain.lengths)[:-1])
    parts = np.split(ragged.scores, np.cumsum(ragged.lengths)[:-1])
    for name, part, text in zip(ragged.unit_ids, parts, _texts(ragged), strict=True):
        theirs = _texts(plain)[kept[name]][: len(text)]
        assert np.array_equal(text, theirs)
        assert end not in text[:-1]
        assert np.allclose(part, full[kept[name]][: len(part)], atol=2e-5)


def test_chunks_change_nothing(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for score in (ProbeScore(), Saturation(), Margin()):
        whole = _trace(model, prompts[:3], score=score)
        with monkeypatch.context() as patch:
            patch.setattr("adaptive._collect._CHUNK", 2)
            pieces = _trace(model, prompts[:3], score=score)
        assert np.allclose(whole.scores, pieces.scores, atol=1e-6, equal_nan=True)


# -- sampling and processors ----------------------------------------------------------------------


@torch.no_grad()
def test_choices_are_made_after_processors_and_noise(model: Any, prompts: list[list[int]]) -> None:
    """The full model's choice under the same noise is the token it emitted, at every position."""
    trace = _trace(model, prompts, rng=5, **SAMPLED)
    emitted, choices = trace.columns["emitted"], trace.columns["choices"]
    assert np.array_equal(np.asarray(choices), np.asarray(emitted))
    greedy = _trace(model, prompts, rng=5)
    assert not np.array_equal(np.asarray(greedy.columns["emitted"]), np.asarray(emitted))
    other = _trace(model, prompts, rng=6, **SAMPLED)
    assert not np.array_equal(np.asarray(other.columns["emitted"]), np.asarray(emitted))


# -- offline decisions are online decisions -------------------------------------------------------

POLICIES: dict[str, tuple[AbstractScore, AbstractRule]] = {
    "probe": (ProbeScore(), Threshold(0.9)),
    "margin": (Margin(), Threshold(0.5)),
    "saturation": (Saturation(), Threshold(0.9)),
    "memory in the score": (DynamicVocabulary((20, 10, 5)), Threshold(0.6)),
    "warm-up": (ProbeScore(), Threshold(0.85, warmup=3)),
    "patience": (ProbeScore(), Patience(1)),
}


@pytest.mark.parametrize("mode", ["exact", "propagate"])
@pytest.mark.parametrize("name", POLICIES)
def test_offline_decisions_are_the_loops(
    model: Any, prompts: list[list[int]], name: str, mode: Any
) -> None:
    """Up to and including a run's first departure its decisions are those of the trace.

    (In ``propagate`` mode keys and values change with the first early stop, so the comparison
    ends there.)
    """
    score, rule = POLICIES[name]
    trace = _trace(model, prompts, score=score)
    stages = np.split(exit_stages(rule, trace), np.cumsum(trace.lengths)[:-1])
    policy = Policy(score, rule, stages=(0, 1, 2), mode=mode)
    units = read_units(prompts, model=model)
    runs = run_units(model, units, policy, deployment=Deployment(NEW, batch_size=4), progress=False)
    compared = early = 0
    for run, offline, text in zip(runs, stages, _texts(trace), strict=True):
        for token in range(NEW - 1):
            assert run.stages[token + 1] == offline[token]
            compared += 1
            early += int(offline[token] < 3)
            changed = mode == "propagate" and offline[token] < 3
            if changed or run.tokens[token + 1] != text[token]:
                break
    assert early > 3
    assert compared > (len(prompts) if mode == "exact" else 0)


def test_exit_scores_of_the_loop_are_the_traces(model: Any, prompts: list[list[int]]) -> None:
    trace = _trace(model, prompts[:1])
    policy = Policy(ProbeScore(), Threshold(), stages=(1,))
    ids = torch.tensor(prompts[:1])
    output = generate(
        model, ids, policy=policy, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(output, AdaptiveOutput)
    assert output.exit_scores is not None
    assert np.allclose(output.exit_scores[0, 1:].numpy(), trace.scores[:, 1], atol=2e-5)


# -- bad input ------------------------------------------------------------------------------------


def test_models_without_exits(helpers: Any) -> None:
    with pytest.raises(NoExitsError, match="attach_exits"):
        collect_trace(helpers.tiny("llama", exits=False), [[2, 3]], progress=False)


@pytest.mark.parametrize("value", [0, 2.5, "8", True, None], ids=repr)
@pytest.mark.parametrize("name", ["new_tokens", "batch_size"])
def test_bad_sizes_are_named(model: Any, name: str, value: Any) -> None:
    error = InvalidArgumentError if value == 0 else InvalidTypeError
    with pytest.raises(error, match=f"`{name}` must be a"):
        collect_trace(model, [[2, 3]], progress=False, **{name: value})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rng": -1}, InvalidArgumentError),
        ({"rng": 2**32}, InvalidArgumentError),
        ({"rng": 1.5}, InvalidTypeError),
        ({"rng": "x"}, InvalidTypeError),
        ({"score": 3}, InvalidTypeError),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model: Any, settings: Any, error: Any) -> None:
    with pytest.raises(error, match=f"`{next(iter(settings))}` must be"):
        collect_trace(model, [[2, 3]], progress=False, **settings)


def test_integers_of_numpy_will_do(model: Any) -> None:
    sizes = {"new_tokens": 4, "batch_size": 2, "rng": 3}
    settings = {"progress": False, "do_sample": True}
    prompts = [[2, 3], [4, 5, 6], [7]]
    same = {name: np.int64(value) for name, value in sizes.items()}
    plain = collect_trace(model, prompts, **settings, **sizes)
    other = collect_trace(model, prompts, **settings, **same)
    assert np.array_equal(plain.columns["emitted"], other.columns["emitted"])


def test_texts_of_one_token_only(model: Any) -> None:
    units = Units(prompts=((2, 3),), ids=("a",), references=(None,))
    with pytest.raises(InvalidArgumentError, match="no text of two tokens"):
        collect(model, units, [(5,)], deployment=Deployment(4), progress=False)


def test_full_depth_never_stops(model: Any, prompts: list[list[int]]) -> None:
    units = read_units(prompts[:3], model=model)
    runs = run_units(
        model, units, full_depth(require_exits(model)), deployment=Deployment(4), progress=False
    )
    assert all((run.stages == 3).all() and (run.agreement == 1).all() for run in runs)
