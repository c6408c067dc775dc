"""Captured steps that outlive a call: what the next one reuses, and what it must not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tape
import torch
from torch import Tensor

from adaptive import _device_stack, attach_exits, generate, get_exits
from adaptive import policies as p
from adaptive._reuse import _kept, stretched, surroundings
from adaptive.policies import Features, Policy, State

MODES = ("exact", "propagate", "verify")
LENGTHS = (6, 3, 5)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[tape.TapeGraph]:
    return tape.install(monkeypatch)


@pytest.fixture
def model(helpers: Any) -> Any:
    """A model of its own: what is kept for it ends with the test."""
    return helpers.tiny("llama")


def _texts(
    model: Any, policy: Policy, ids: Tensor, mask: Tensor | None, capture: Any, **more: Any
) -> Tensor:
    settings = {"max_new_tokens": 10, "max_pending": 4, "pad_token_id": 0} | more
    if mask is not None:
        settings["attention_mask"] = mask
    text: Tensor = generate(model, ids, policy=policy, capture=capture, **settings)
    return text


@pytest.mark.parametrize("capture", ["segments", "step"])
@pytest.mark.parametrize("mode", MODES)
def test_the_next_call_captures_nothing(
    mode: str, capture: Any, model: Any, helpers: Any, taped: Any
) -> None:
    """Other prompts, lengths and numbers of tokens; what was kept is full of what is no number."""
    policy = helpers.mixed(model, mode)
    ids, mask = helpers.prompts(LENGTHS)
    made = []
    # the first and third prompts are the same: by then every piece has been needed
    other = (ids[:, :-1] + 1, mask[:, :-1])
    turns = [((ids, mask), 30), (other, 10), ((ids, mask), 30), (other, 17)]
    expected = [_texts(model, policy, *given, None, max_new_tokens=new) for given, new in turns]
    for (given, new), text in zip(turns, expected, strict=True):
        assert torch.equal(_texts(model, policy, *given, capture, max_new_tokens=new), text)
        made.append(taped.made)
        stack = _kept[model][1]
        memory = stack.executor._memory
        for values in (*memory.keys, *memory.values, stack.ring, stack.states):
            values.fill_(float("nan"))
    assert made[0] > 0
    assert made[2] == made[1]
    if capture == "step":  # in `verify` mode what settles is a graph of its own
        assert made[-1] == 1 + (mode == "verify")


@dataclass(frozen=True)
class DeepFrom(p.AbstractRule):
    """Stops at the first exit for so many tokens; later ones go to full depth."""

    first: int

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return features.position < self.first, state

    def with_knob(self, knob: float) -> DeepFrom:
        return self

    def knobs(self, trace: Any, *, size: int = 64) -> tuple[float, ...]:
        return (float("inf"),)


@pytest.mark.parametrize("capture", ["segments", "step"])
@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_a_bucket_that_one_comes_back_to(
    mode: Any, capture: Any, helpers: Any, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those first needed then read what that bucket's ``begin`` writes, not a later one's."""
    monkeypatch.setattr(_device_stack, "_BUCKET", 8)
    model, plain = helpers.tiny("llama"), helpers.tiny("llama")
    policy = Policy(p.NoScore(), DeepFrom(3), stages=(0, 1, 2), mode=mode)
    for length, new in ((3, 3), (12, 12), (1, 7), (5, 3)):
        ids, _ = helpers.prompts((length,))
        given = {"max_new_tokens": new, "max_pending": 1}
        text = _texts(plain, policy, ids, None, None, **given)
        assert torch.equal(_texts(model, policy, ids, None, capture, **given), text)


def test_noise_is_that_of_the_calls_own_units(model: Any, helpers: Any, taped: Any) -> None:
    policy = helpers.mixed(model, "propagate")
    ids, mask = helpers.prompts(LENGTHS)
    sampled = {"do_sample": True, "random": "keyed", "seed": 3}
    asked = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])]
    expected = [_texts(model, policy, ids, mask, None, units=own, **sampled) for own in asked]
    for own, text in zip(asked, expected, strict=True):
        units = own.clone()
        assert torch.equal(_texts(model, policy, ids, mask, "step", units=units, **sampled), text)
        assert torch.equal(units, own)
    assert taped.made == 1


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_calls_inside_and_outside_inference_mode(
    modes: tuple[bool, bool], model: Any, helpers: Any, taped: Any
) -> None:
    policy = helpers.mixed(model, "exact")
    ids, mask = helpers.prompts(LENGTHS)
    expected = _texts(helpers.tiny("llama"), policy, ids, mask, None)
    for inside in modes:
        with torch.inference_mode(inside):
            text = _texts(model, policy, ids, mask, "step")
        assert torch.equal(text, expected)
    assert taped.made == 2


def test_streams_do_not_share_what_is_kept(model: Any, helpers: Any, taped: Any) -> None:
    """On another one, the next call would write where the last one may still be at work."""
    ids, mask = helpers.prompts(LENGTHS)
    _texts(model, helpers.mixed(model, "exact"), ids, mask, "step")
    plan = _kept[model][0]
    assert plan.around == surroundings(torch.device("cpu"))
    assert plan.serves(replace(plan))
    assert not plan.serves(replace(plan, around=(*plan.around[:-1], "another stream")))


CHANGES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "another policy": lambda model, policy, *given: (
        model,
        replace(policy, rule=policy.rule.with_knob(0.1)),
        *given,
    ),
    "fewer rows": lambda model, policy, ids, mask: (model, policy, ids[:2], mask[:2]),
    "no padding": lambda model, policy, ids, mask: (model, policy, ids.clamp(min=1), None),
    "new weights": lambda model, *given: (_with_weights(model), *given),
    "a head trained in place": lambda model, *given: (_with_head(model), *given),
    "exits that were away": lambda model, *given: (_with_exits_elsewhere(model), *given),
    "new exits": lambda model, *given: (_with_exits(model), *given),
}


def _with_weights(model: Any) -> Any:
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(2 * layer.up_proj.weight.detach())
    return model


@torch.no_grad()
def _with_head(model: Any) -> Any:
    model.lm_head.weight.mul_(-1.0)
    return model


def _with_exits_elsewhere(model: Any) -> Any:
    for parameter in get_exits(model).parameters():
        parameter.data = parameter.data.clone()
    return model


def _with_exits(model: Any) -> Any:
    attach_exits(model, get_exits(model).layers)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_captured_for_something_else_is_let_go(
    change: str, model: Any, helpers: Any, taped: Any
) -> None:
    policy = helpers.mixed(model, "exact")
    ids, mask = helpers.prompts(LENGTHS)
    _texts(model, policy, ids, mask, "step")
    before = weakref.ref(_kept[model][1])
    other = CHANGES[change](model, policy, ids, mask)
    found = _texts(*other, "step")
    assert taped.made == 2
    gc.collect()
    assert before() is None
    assert torch.equal(found, _texts(*other, None))


def test_a_cache_that_was_handed_out_is_not_written_again(
    model: Any, helpers: Any, taped: Any
) -> None:
    policy = helpers.mixed(model, "exact")
    ids, mask = helpers.prompts(LENGTHS)
    first = _texts(model, policy, ids, mask, "step", return_dict_in_generate=True)
    assert model not in _kept
    keys = first.past_key_values.layers[0].keys.clone()
    _texts(model, policy, ids + 1, mask, "step")
    assert torch.equal(first.past_key_values.layers[0].keys, keys)


def test_any_call_lets_go_of_what_is_kept(model: Any, helpers: Any, taped: Any) -> None:
    """So that there are never two lots of keys and values."""
    policy = helpers.mixed(model, "exact")
    ids, mask = helpers.prompts(LENGTHS)
    for capture in (None, "none"):
        _texts(model, policy, ids, mask, "step")
        there = weakref.ref(_kept[model][1])
        _texts(model, policy, ids, mask, capture)
        gc.collect()
        assert there() is None


def test_nothing_is_kept_of_a_run_that_failed(model: Any, helpers: Any, taped: Any) -> None:
    policy = helpers.mixed(model, "propagate")
    ids, mask = helpers.prompts(LENGTHS)
    calls = []

    def failing(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    _texts(model, policy, ids, mask, "step")
    with pytest.raises(KeyboardInterrupt):
        _texts(model, policy, ids, mask, "step", stopping_criteria=[failing])
    assert model not in _kept
    found = _texts(model, policy, ids, mask, "step")
    assert torch.equal(found, _texts(model, policy, ids, mask, None))


def test_what_is_kept_ends_with_the_model(helpers: Any, taped: Any) -> None:
    own = helpers.tiny("llama")
    ids, mask = helpers.prompts(LENGTHS)
    _texts(own, helpers.mixed(own, "exact"), ids, mask, "step")
    assert own in _kept
    there = weakref.ref(_kept[own][1])
    del own
    gc.collect()
    assert there() is None


def test_slots_are_laid_out_in_steps() -> None:
    positions = torch.arange(300)[None].expand(2, -1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, :2] = True
    wide, longer = stretched(padding, positions, limit=None)
    assert wide is not None
    assert wide.shape == longer.shape == (2, 512)
    assert int(wide.sum()) == 2
    assert torch.equal(longer[:, :300], positions)
    assert set(longer[:, 300:].flatten().tolist()) == {299}
    assert stretched(None, positions, limit=400)[1].shape == (2, 400)
    assert stretched(None, positions, limit=200)[1].shape == (2, 300)
