"""One table: every family, on every tier it has, in every mode, against the model itself."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptive import UnsupportedError, _attention, _native, attach_exits, generate
from adaptive._executor import AbstractExecutor
from adaptive._families import Readout, _registry, family_of, layers_of
from adaptive._families._layer import Layer, RootMeanSquare
from adaptive._families._rope import rotary_of
from adaptive._fingerprint import lineage, related
from adaptive._generic import GenericExecutor
from adaptive._native import NativeExecutor
from adaptive._output import AdaptiveOutput
from adaptive._stack import ExactStack
from adaptive._tier import executor_for, forget
from adaptive.policies import Mode

MAIN = [name for name in helpers.MODELS if name not in helpers.VARIANTS]
ROWS = [(name, "native") for name in helpers.NATIVE] + [(name, "generic") for name in MAIN]
MODES: tuple[Mode, ...] = ("exact", "propagate", "verify")
NEW = 10

rows = pytest.mark.parametrize(("name", "tier"), ROWS, ids=["-".join(row) for row in ROWS])
few = pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("llama", "native"),
        ("gemma2", "native"),
        ("gpt-neox", "native"),
        ("gemma2", "generic"),
        ("gpt2", "generic"),
    ],
)
modes = pytest.mark.parametrize("mode", MODES)
families = pytest.mark.parametrize("name", MAIN)
natives = pytest.mark.parametrize("name", helpers.NATIVE)


def _plain(model: PreTrainedModel, ids: Tensor, mask: Tensor, **settings: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "do_sample": False}
    return model.generate(
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        **defaults | settings,
    )


def _ours(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, policy: Any, **settings: Any
) -> AdaptiveOutput:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    output = generate(model, ids, attention_mask=mask, policy=policy, **defaults | settings)
    assert isinstance(output, AdaptiveOutput)
    return output


@cache
def _eos(name: str) -> int:
    """Return a token that ends some rows of the plain run early, and not all at once."""
    ids, mask = helpers.prompts()
    text = _plain(helpers.shared(name), ids, mask).sequences[:, ids.shape[1] :]
    return int(text[0, 4])


def _seeded(seed: int = 5) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": 0.8, "top_k": 20}


# -- a policy that never stops early is the model itself ------------------------------------------


@rows
@modes
def test_never_stopping_is_plain_generate(name: str, tier: Any, mode: Mode) -> None:
    model, policy = helpers.shared(name), helpers.never(mode)
    ids, mask = helpers.prompts()
    eos = _eos(name)
    plain = _plain(model, ids, mask, eos_token_id=eos)
    ours = _ours(model, ids, mask, policy=policy, tier=tier, eos_token_id=eos)
    flips = helpers.near_ties(ours.sequences, plain.sequences, plain.scores, ids.shape[1])
    assert flips == 0  # float32 and these seeds: none is expected, all would be near-ties
    ended = ours.exit_stages < 0
    assert bool(ended.any())
    assert not bool(ended.all(dim=1).any())
    assert bool((ours.sequences[:, ids.shape[1] :][ended] == 0).all())
    assert ours.mean_depth == helpers.LAYERS
    if mode != "propagate":  # where nothing is compared, nothing is known
        assert bool((ours.agreement[~ended] == 1).all())


@rows
def test_never_stopping_samples_the_same_tokens(name: str, tier: Any) -> None:
    _sampled_is_plain(name, tier, "exact")


@few
@pytest.mark.parametrize("mode", ["propagate", "verify"])
def test_every_mode_samples_the_same_tokens(name: str, tier: Any, mode: Mode) -> None:
    _sampled_is_plain(name, tier, mode)


def _sampled_is_plain(name: str, tier: Any, mode: Mode) -> None:
    model, policy = helpers.shared(name), helpers.never(mode)
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask, **_seeded())
    after = torch.rand(1)
    ours = _ours(model, ids, mask, policy=policy, tier=tier, **_seeded())
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(torch.rand(1), after)  # and the generator is left where `generate` leaves it


# -- exact: every key and value is the full model's -----------------------------------------------


@rows
def test_exact_settles_to_the_full_model(name: str, tier: Any) -> None:
    model = helpers.shared(name)
    policy = helpers.mixed(model, "exact")
    ids, mask = helpers.prompts()
    eos = _eos(name)
    ours = _ours(model, ids, mask, policy=policy, tier=tier, max_pending=5, eos_token_id=eos)
    real = ours.exit_stages >= 0
    later = ours.exit_stages[:, 1:][real[:, 1:]]
    assert len(later.unique()) >= 3  # the run is worth testing: depths are mixed
    text = ours.sequences[:, :-1]
    cache, logits = helpers.own_cache(model, text, mask)
    counted = torch.cat([mask.bool(), real[:, :-1]], dim=1)
    for layer in range(helpers.LAYERS):
        theirs = cache.layers[layer]
        mine = ours.past_key_values.layers[layer]
        assert mine.get_seq_length() == theirs.get_seq_length()
        keys, values, slots = helpers.kept(mine, 0)
        for one, whole in ((keys, theirs.keys), (values, theirs.values)):
            other = whole[:, :, slots]
            gap = (one - other).abs().amax(dim=(1, 3))[counted[:, slots]]
            assert float(gap.max()) < 1e-5 * (1 + float(other.abs().max()))
    start = ids.shape[1]
    chosen = logits[:, start - 1 :].argmax(dim=-1)
    agree = (chosen == ours.sequences[:, start:]).to(torch.int8)
    assert torch.equal(ours.agreement[real], agree[real])
    assert bool((ours.agreement[~real] == -1).all())


# -- verify: the tokens are the full model's ------------------------------------------------------


@rows
def test_verify_is_plain_generate(name: str, tier: Any) -> None:
    model = helpers.shared(name)
    policy = helpers.mixed(model, "verify")
    ids, mask = helpers.prompts()
    eos = _eos(name)
    plain = _plain(model, ids, mask, eos_token_id=eos)
    ours = _ours(model, ids, mask, policy=policy, tier=tier, max_pending=4, eos_token_id=eos)
    assert helpers.near_ties(ours.sequences, plain.sequences, plain.scores, ids.shape[1]) == 0
    assert bool((ours.exit_stages[:, 1:] < len(helpers.EXITS)).any())
    plain = _plain(model, ids, mask, **_seeded())
    after = torch.rand(1)
    ours = _ours(model, ids, mask, policy=policy, tier=tier, max_pending=4, **_seeded())
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(torch.rand(1), after)
    cache, _ = helpers.own_cache(model, ours.sequences[:, :-1], mask)
    keys, _, slots = helpers.kept(ours.past_key_values.layers[-1], ids.shape[1])
    theirs = cache.layers[-1].keys[:, :, slots]
    torch.testing.assert_close(keys, theirs, atol=1e-4, rtol=1e-4)


# -- propagate: against a slow and obvious reference ----------------------------------------------


@rows
def test_propagate_is_the_slow_reference(name: str, tier: Any) -> None:
    _propagates_slowly(helpers.shared(name), tier)


@natives
def test_waiting_tokens_may_share_a_read_of_the_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "_LARGE", 0)  # as if the weights were too large for the caches
    _propagates_slowly(helpers.tiny(name), "native")


def _propagates_slowly(model: PreTrainedModel, tier: Any) -> None:
    policy = helpers.mixed(model, "propagate")
    ids, mask = helpers.prompts()
    ours = _ours(model, ids, mask, policy=policy, tier=tier)
    threshold = policy.rule.threshold
    for row in range(ids.shape[0]):
        prompt = ids[row : row + 1, mask[row].bool()]
        tokens, stages, cache = helpers.propagate_slowly(model, prompt, NEW, threshold)
        assert ours.sequences[row, ids.shape[1] :].tolist() == tokens
        assert ours.exit_stages[row].tolist() == stages
        alone = _ours(
            model,
            prompt,
            torch.ones_like(prompt),
            policy=policy,
            tier=tier,
            max_pending=2,
        )
        assert alone.sequences[0, prompt.shape[1] :].tolist() == tokens
        for mine, theirs in zip(alone.past_key_values.layers, cache.layers, strict=True):
            keys, values, slots = helpers.kept(mine, 0)
            torch.testing.assert_close(keys, theirs.keys[:, :, slots], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(values, theirs.values[:, :, slots], atol=2e-5, rtol=2e-5)
    assert len(ours.exit_stages[:, 1:].unique()) >= 3


# -- long texts: past every window, in chunks, under every rotary scheme ---------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [16, 70, 200])
@pytest.mark.parametrize(
    "name", ["mistral-window", "qwen2-window", "phi3-window", "gemma2", "gemma3", "gpt-neox"]
)
@torch.no_grad()
def test_long_prompts_in_chunks(name: str, chunk: int, padded: bool) -> None:
    model = helpers.shared(name)
    ids, mask = helpers.prompts((150, 90) if padded else (150, 150))
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    _, theirs = helpers.own_cache(model, ids, mask)
    executor = executor_for(model, tier="native")
    executor.begin(
        batch_size=2,
        max_length=150,
        padding=mask == 0 if padded else None,
        positions=positions,
    )
    ours = executor.readout(ExactStack(executor, ()).prefill(ids, chunk=chunk))
    executor.end()
    torch.testing.assert_close(ours, theirs[:, -1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_key_heads_are_repeated_where_no_kernel_shares_them_under_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where attention would otherwise write down all products of a long prompt."""
    model = helpers.shared("llama")
    ids, mask = helpers.prompts((150, 90))
    given = {"policy": helpers.never("exact"), "tier": "native"}
    expected = _ours(model, ids, mask, output_logits=True, **given)
    shared: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Tensor:
        shared.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(_attention, "_SHARED_UNDER_MASK", ())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    found = _ours(model, ids, mask, output_logits=True, **given)
    assert shared
    assert not any(shared)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


_ORIGINAL = {"original_max_position_embeddings": 40, "rope_theta": 10000.0}
_HALF = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
_SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "llama3": (
        "llama",
        _ORIGINAL
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": ("qwen3", _ORIGINAL | {"rope_type": "yarn", "factor": 4.0}),
    "dynamic": ("phi", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
    "longrope": ("phi3", _ORIGINAL | _HALF | {"rope_type": "longrope"}),
    "by-layer": (
        "gemma3",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}


def _scheme(scheme: str) -> PreTrainedModel:
    name, parameters = _SCHEMES[scheme]
    lengths = {"max_position_embeddings": 40, "original_max_position_embeddings": 40}
    return helpers.tiny(name, rope_parameters=parameters, **lengths)


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_rotary_schemes(scheme: str) -> None:
    model = _scheme(scheme)
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask)
    ours = _ours(model, ids, mask, policy=helpers.never("exact"), tier="native")
    assert torch.equal(ours.sequences, plain.sequences)
    both = [
        _ours(model, ids, mask, policy=helpers.mixed(model, "propagate"), tier=tier)
        for tier in ("native", "generic")
    ]
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert torch.equal(both[0].exit_stages, both[1].exit_stages)


@pytest.mark.parametrize("tier", ["native", "generic"])
@pytest.mark.parametrize("scheme", ["dynamic", "longrope"])
def test_tables_that_would_change_are_refused_by_name(scheme: str, tier: Any) -> None:
    model = _scheme(scheme)
    ids, mask = helpers.prompts((30,))
    _ours(model, ids, mask, policy=helpers.never("exact"), tier=tier, max_new_tokens=9)
    with pytest.raises(UnsupportedError, match=r"rotary tables change after (39|40) tokens"):
        _ours(model, ids, mask, policy=helpers.never("exact"), tier=tier, max_new_tokens=11)


def test_an_unknown_rotary_scheme_is_refused_by_name() -> None:
    model = helpers.tiny("llama")
    model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(UnsupportedError, match="rotary scheme 'spiral' is not known"):
        executor_for(model, tier="native")
    assert isinstance(executor_for(model), GenericExecutor)


# -- both tiers, any batch, any inbox -------------------------------------------------------------


@natives
@modes
def test_tiers_are_equal(name: str, mode: Mode) -> None:
    model = helpers.shared(name)
    policy = helpers.mixed(model, mode)
    ids, mask = helpers.prompts()
    native, generic = (
        _ours(model, ids, mask, policy=policy, tier=tier, output_logits=True)
        for tier in ("native", "generic")
    )
    assert torch.equal(native.sequences, generic.sequences)
    assert torch.equal(native.exit_stages, generic.exit_stages)
    assert torch.equal(native.agreement, generic.agreement)
    for one, other in zip(native.logits, generic.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    width = ids.shape[1]
    for one, other in zip(
        native.past_key_values.layers, generic.past_key_values.layers, strict=True
    ):
        keys, values, slots = helpers.kept(one, width)
        torch.testing.assert_close(keys, other.keys[:, :, slots], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(values, other.values[:, :, slots], atol=2e-5, rtol=2e-5)


@families
@modes
def test_rows_never_depend_on_the_batch(name: str, mode: Mode) -> None:
    _alone_and_together(name, mode, (11, 3, 1), sampled=mode == "exact")


@modes
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_eight_rows_never_depend_on_each_other(mode: Mode, sampled: bool) -> None:
    _alone_and_together("llama", mode, (11, 3, 7, 1, 10, 9, 5, 8), sampled=sampled)


def _alone_and_together(name: str, mode: Mode, lengths: tuple[int, ...], *, sampled: bool) -> None:
    model = helpers.shared(name)
    policy = helpers.mixed(model, mode)
    ids, mask = helpers.prompts(lengths)
    units = torch.tensor([40, 12, 7, 3, 99, 5, 6, 1])[: len(lengths)]
    settings: dict[str, Any] = {"eos_token_id": _eos(name), "random": "keyed", "seed": 3}
    if sampled:
        settings |= {"do_sample": True, "top_k": 20}
    batch = _ours(model, ids, mask, policy=policy, units=units, max_pending=6, **settings)
    for row in range(ids.shape[0]):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = _ours(
            model,
            prompt,
            torch.ones_like(prompt),
            policy=policy,
            units=units[row : row + 1],
            **settings,
        )
        length = alone.sequences.shape[1] - prompt.shape[1]
        assert batch.sequences[row, ids.shape[1] :][:length].tolist() == (
            alone.sequences[0, prompt.shape[1] :].tolist()
        )
        assert batch.exit_stages[row, :length].tolist() == alone.exit_stages[0].tolist()
        assert batch.agreement[row, :length].tolist() == alone.agreement[0].tolist()
        assert bool((batch.exit_stages[row, length:] == -1).all())
        torch.testing.assert_close(
            batch.exit_scores[row, :length],
            alone.exit_scores[0],
            atol=1e-4,
            rtol=1e-4,
            equal_nan=True,
        )


@natives
@pytest.mark.parametrize("rows", [1, 8])
def test_ragged_batches_are_plain_generate(name: str, rows: int) -> None:
    model = helpers.shared(name)
    ids, mask = helpers.prompts((1, 11, 3, 7, 10, 9, 5, 8)[-rows:])
    plain = _plain(model, ids, mask)
    for mode in MODES:
        ours = _ours(model, ids, mask, policy=helpers.never(mode), tier="native")
        assert torch.equal(ours.sequences, plain.sequences)


@few
@modes
def test_inbox_size_changes_nothing(name: str, tier: Any, mode: Mode) -> None:
    model = helpers.shared(name)
    policy = helpers.mixed(model, mode, quantile=0.3)
    ids, mask = helpers.prompts()
    runs = [
        _ours(model, ids, mask, policy=policy, tier=tier, max_pending=pending)
        for pending in (1, 3, 32)
    ]
    for run in runs[1:]:
        assert torch.equal(run.sequences, runs[0].sequences)
        assert torch.equal(run.agreement, runs[0].agreement)
        if mode != "verify":  # a draft that was thrown away had another stage on record
            assert torch.equal(run.exit_stages, runs[0].exit_stages)


# -- the user's model is left alone ---------------------------------------------------------------


class _Failure(Exception):
    """Something of the user's that goes wrong in the middle."""


class _Broken:
    """A streamer that raises at its fourth call."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 4:
            raise _Failure

    def end(self) -> None:
        return


class _BrokenProcessor:
    """A logits processor that raises once the text is long enough."""

    is_pure = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 14:
            raise _Failure
        return scores


def _state(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "forwards": [
            name for name, module in model.named_modules() if "forward" in module.__dict__
        ],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict(),
        "parameters": {name: value.detach().clone() for name, value in model.named_parameters()},
    }


@few
@pytest.mark.parametrize(
    ("broken", "mode"),
    [("streamer", "exact"), ("streamer", "propagate"), ("processor", "verify")],
)
def test_exceptions_leave_the_model_as_it_was(
    name: str, tier: Any, broken: str, mode: Mode
) -> None:
    model = helpers.tiny(name)
    ids, mask = helpers.prompts()
    before, text = _state(model), _plain(model, ids, mask).sequences
    policy = helpers.mixed(model, mode)
    extra: dict[str, Any] = {"streamer": _Broken()}
    if broken == "processor":
        extra = {"logits_processor": [_BrokenProcessor()]}
    with pytest.raises(_Failure):
        _ours(model, ids, mask, policy=policy, tier=tier, **extra)
    after = _state(model)
    assert after["forwards"] == before["forwards"]
    assert after["hooks"] == before["hooks"]
    assert after["config"] == before["config"]
    for key, value in before["parameters"].items():
        assert torch.equal(after["parameters"][key], value)
    assert torch.equal(_plain(model, ids, mask).sequences, text)
    again = _ours(model, ids, mask, policy=helpers.never(mode), tier=tier)
    assert torch.equal(again.sequences, text)


# -- threads --------------------------------------------------------------------------------------


@few
def test_threads_generate_with_one_model_at_once(name: str, tier: Any) -> None:
    model = helpers.tiny(name)
    policy = helpers.mixed(model, "exact")
    state = _state(model)
    batches = [helpers.prompts(lengths) for lengths in ((11, 7, 10), (5,), (3, 9))]

    def text(batch: int) -> Tensor:
        ids, mask = batches[batch]
        return _ours(model, ids, mask, policy=policy, tier=tier, max_pending=4).sequences

    alone = [text(batch) for batch in range(len(batches))]
    forget(model)  # so that threads meet while weights are packed, too
    with ThreadPoolExecutor(len(batches)) as pool:
        for batch, found in [(i, pool.submit(text, i)) for i in [0, 1, 2] * 4]:
            assert torch.equal(found.result(), alone[batch])
    assert _state(model)["forwards"] == state["forwards"]


@contextmanager
def _recording(model: PreTrainedModel) -> Iterator[None]:
    """Hold a thread of the generic tier in the midst of the model's own forward pass."""
    ids, mask = helpers.prompts((5,))
    executor_for(model, tier="generic")  # its self-check calls the model too
    inside, going = threading.Event(), threading.Event()

    def hold(module: Any, args: Any) -> None:
        if threading.get_ident() == thread.ident:
            inside.set()
            assert going.wait(60)

    def run() -> None:
        _ours(model, ids, mask, policy=helpers.never("exact"), tier="generic", max_pending=4)

    thread = threading.Thread(target=run)
    hook = model.get_input_embeddings().register_forward_pre_hook(hold)
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        going.set()
        thread.join()
        hook.remove()


@families
@torch.no_grad()
def test_a_model_may_be_called_while_another_thread_generates(name: str) -> None:
    model = helpers.tiny(name)
    ids, _ = helpers.prompts((9, 9))
    own = model(input_ids=ids).logits
    with _recording(model):
        assert torch.equal(model(input_ids=ids).logits, own)
    assert torch.equal(model(input_ids=ids).logits, own)


def test_what_another_thread_records_is_no_hook() -> None:
    model = helpers.tiny("llama")
    with ThreadPoolExecutor(1) as pool:
        with _recording(model):
            found = pool.submit(executor_for, model, tier="native")
            assert not wait((found,), timeout=0.2).done  # it waits for its turn
        assert isinstance(found.result(), NativeExecutor)


# -- which tier -----------------------------------------------------------------------------------


@families
def test_self_check_chooses_the_tier(name: str) -> None:
    kind = NativeExecutor if name in helpers.NATIVE else GenericExecutor
    assert type(executor_for(helpers.shared(name))) is kind


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("opt-post-norm", {}, "`do_layer_norm_before=False`"),
        ("gemma2", {"_attn_implementation": "sdpa"}, "'sdpa' does not apply"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention looks ahead"),
    ],
)
def test_native_tier_is_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    model = helpers.tiny(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(UnsupportedError, match=f"`tier='native'` is not possible: .*{reason}"):
        executor_for(model, tier="native")


def test_norms_behind_run_on_the_generic_tier() -> None:
    assert isinstance(executor_for(helpers.tiny("opt-post-norm")), GenericExecutor)


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
@pytest.mark.parametrize("tier", [None, "generic"])
def test_layers_that_look_ahead_are_refused(name: str, tier: Any) -> None:
    model = helpers.tiny(name, use_bidirectional_attention=True)
    ids, mask = helpers.prompts()
    with pytest.raises(UnsupportedError, match=f"not possible on this .*'{name}.*look ahead"):
        _ours(model, ids, mask, policy=helpers.never("exact"), tier=tier)


def test_layers_that_hand_on_more_than_a_state_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = helpers.tiny("llama")
    kind = type(model.model.layers[0])
    original, kept = kind.forward, []

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        if self is model.model.layers[0]:
            kept[:] = [hidden_states]
        return original(self, hidden_states, **kwargs) + kept[0].mean(dim=1, keepdim=True)

    monkeypatch.setattr(kind, "forward", forward)
    for tier in (None, "generic"):
        with pytest.raises(UnsupportedError, match="hand each other more than the state"):
            executor_for(model, tier=tier)
    monkeypatch.undo()
    forget(model)
    assert isinstance(executor_for(model), NativeExecutor)


def _attending(layer: Layer, **changes: Any) -> Layer:
    return replace(layer, attention=replace(layer.attention, **changes))


#: One fact of each family told wrong: (row, the fact, what is made of its layers).
WRONG: list[tuple[str, str, Callable[[Layer], Layer]]] = [
    ("llama", "scale", lambda layer: _attending(layer, scale=layer.attention.scale * 1.1)),
    ("qwen3", "norm of keys", lambda layer: _attending(layer, query_norm=None, key_norm=None)),
    (
        "phi",
        "side by side",
        lambda layer: replace(layer, feedforward_norm=layer.norm, parallel=False),
    ),
    (
        "phi3",
        "activation",
        lambda layer: replace(layer, feedforward=replace(layer.feedforward, activation=torch.relu)),
    ),
    (
        "gemma",
        "gain of norms",
        lambda layer: replace(layer, norm=RootMeanSquare(layer.norm.gain, layer.norm.eps)),
    ),
    ("gemma2", "cap", lambda layer: _attending(layer, softcap=None)),
    ("gemma2", "norms behind", lambda layer: replace(layer, attention_post=None)),
    ("gemma3", "local tables", lambda layer: _attending(layer, rope="full_attention")),
    ("gpt2-scaled", "scale", lambda layer: _attending(layer, scale=8**-0.5)),
    ("opt", "norms", lambda layer: replace(layer, feedforward_norm=layer.norm)),
    ("gpt-neox", "side by side", lambda layer: replace(layer, parallel=False)),
    ("gpt-neox", "order of rows", lambda layer: _attending(layer, groups=1)),
]


@pytest.mark.parametrize(
    ("name", "change"), [row[::2] for row in WRONG], ids=["-".join(row[:2]) for row in WRONG]
)
def test_a_wrong_description_falls_back(
    name: str,
    change: Callable[[Layer], Layer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = helpers.tiny(name)
    family = family_of(model)
    right = family.native
    assert right is not None
    wrong = replace(right, layer=lambda *where: change(right.layer(*where)))
    monkeypatch.setattr(_registry, "FAMILIES", (replace(family, native=wrong),))
    assert isinstance(executor_for(model), GenericExecutor)
    assert "its logits differ from the model's own" in caplog.text
    with pytest.raises(UnsupportedError, match="its logits differ from the model's own"):
        executor_for(model, tier="native")
    monkeypatch.undo()
    forget(model)
    assert isinstance(executor_for(model), NativeExecutor)  # and the true one is taken


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_wrong_positions_fall_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.tiny(name)
    family = family_of(model)
    right = family.native
    assert right is not None
    embed = right.embed(model)
    wrong = replace(right, embed=lambda _: lambda tokens, positions: embed(tokens, positions + 1))
    monkeypatch.setattr(_registry, "FAMILIES", (replace(family, native=wrong),))
    assert isinstance(executor_for(model), GenericExecutor)


def test_parts_that_do_not_fit_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = helpers.tiny("gpt2")
    family = family_of(model)
    assert family.native is not None
    renamed = replace(family.native, embed=lambda model: model.transformer.wte_of_tomorrow)
    monkeypatch.setattr(_registry, "FAMILIES", (replace(family, native=renamed),))
    assert isinstance(executor_for(model), GenericExecutor)
    assert "its parts are not as the family describes them" in caplog.text
    with pytest.raises(UnsupportedError, match="no attribute 'wte_of_tomorrow'"):
        executor_for(model, tier="native")


def test_layers_built_otherwise_are_refused_by_name() -> None:
    model = helpers.tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(UnsupportedError, match="layer 0 is not built as its family's layers are"):
        executor_for(model, tier="native")


@natives
def test_changed_mathematics_fall_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.tiny(name)
    first = next(iter(layers_of(model)))
    parts = (getattr(first, path, None) for path in ("self_attn", "attn", "attention"))
    attention = next(type(part) for part in parts if part is not None)
    original = attention.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, *rest = original(self, *args, **kwargs)
        return (output.roll(1, dims=-1), *rest)

    monkeypatch.setattr(attention, "forward", scaled)
    executor: AbstractExecutor = executor_for(model)
    assert isinstance(executor, GenericExecutor)
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask)
    ours = _ours(model, ids, mask, policy=helpers.never("exact"))
    assert torch.equal(ours.sequences, plain.sequences)


def test_a_hook_added_later_is_seen() -> None:
    model = helpers.tiny("llama")
    assert isinstance(executor_for(model), NativeExecutor)
    layer = model.model.layers[2].mlp
    handle = layer.register_forward_hook(lambda module, args, output: output * 2.0)
    assert isinstance(executor_for(model), GenericExecutor)
    handle.remove()
    assert isinstance(executor_for(model), NativeExecutor)
    ids, _ = helpers.prompts()
    model(ids, output_hidden_states=True)  # leaves hooks on every layer that only look
    assert isinstance(executor_for(model), NativeExecutor)


# -- what is replaced after a first run is seen ---------------------------------------------------

#: Name of a part -> the modules of a model that it means.
PARTS: dict[str, Callable[[Any], list[Any]]] = {
    "head": lambda model: [model.get_output_embeddings()],
    "embeddings": lambda model: [model.get_input_embeddings()],
    "positions": lambda model: [
        module
        for path, module in model.named_modules()
        if path.endswith((".wpe", ".embed_positions"))
    ],
    "norms": lambda model: [
        module for path in family_of(model).norms if (module := attrgetter(path)(model)) is not None
    ],
    "rotary": lambda model: [rotary_of(model)],
    "layer": lambda model: [layers_of(model)[2]],
}
_EACH = [name for name in MAIN if name in helpers.NATIVE]
_LEARNED = [name for name in _EACH if name.startswith(("gpt2", "opt"))]


def _module_replaced(model: PreTrainedModel, module: Any) -> None:
    path = next(path for path, found in model.named_modules() if found is module)
    twin = copy.deepcopy(module)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.add_(0.3 * torch.randn_like(tensor))
    model.set_submodule(path, twin)


def _tensors_replaced(model: PreTrainedModel, module: Any) -> None:
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(value + 0.3 * torch.randn_like(value)))
        for name, value in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, value + 0.3 * torch.randn_like(value))


def _hooked(model: PreTrainedModel, module: Any) -> None:
    def changed(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(2.0 * part for part in output)
        return output.roll(1, dims=-1)

    module.register_forward_hook(changed)


REPLACED = [
    (name, part, how)
    for part in PARTS
    for name in _EACH
    if part not in ("positions", "rotary") or (part == "positions") == (name in _LEARNED)
    for how in (_module_replaced, _tensors_replaced, _hooked)
    if how is _module_replaced or name in ("llama", "gemma3", "opt-projected")
]


@pytest.mark.parametrize(
    ("name", "part", "how"),
    REPLACED,
    ids=[f"{row[0]}-{row[1]}{row[2].__name__}" for row in REPLACED],
)
@torch.no_grad()
def test_what_is_replaced_after_a_run_is_seen(
    name: str, part: str, how: Callable[[PreTrainedModel, Any], None]
) -> None:
    model, policy = helpers.tiny(name), helpers.never("exact")
    ids, mask = helpers.prompts()
    before = _ours(model, ids, mask, policy=policy, max_pending=4).sequences
    torch.manual_seed(2)
    for module in PARTS[part](model):
        how(model, module)
    plain = _plain(model, ids, mask).sequences
    assert not torch.equal(plain, before)  # the change is worth seeing
    for tier in (None, "generic"):
        assert torch.equal(
            _ours(model, ids, mask, policy=policy, max_pending=4, tier=tier).sequences, plain
        )
    if how is not _hooked or part != "layer":
        assert isinstance(executor_for(model), NativeExecutor)


@pytest.mark.parametrize("name", [*_EACH, "llama-tied-biased"])
@torch.no_grad()
def test_new_tokens_may_be_chosen_after_a_run(name: str) -> None:
    model, policy = helpers.tiny(name), helpers.never("exact")
    ids, mask = helpers.prompts()
    _ours(model, ids, mask, policy=policy, max_pending=4)
    model.resize_token_embeddings(helpers.VOCABULARY + 7, mean_resizing=False)
    model.get_output_embeddings().weight[helpers.VOCABULARY :] *= 100.0
    ids[:, -1] = helpers.VOCABULARY + 3
    plain = _plain(model, ids, mask).sequences
    assert bool((plain[:, ids.shape[1] :] >= helpers.VOCABULARY).any())
    assert torch.equal(
        _ours(model, ids, mask, policy=policy, max_pending=4, tier="native").sequences, plain
    )


def _new_activations(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def _fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = helpers.LAYERS - 1


@pytest.mark.parametrize("change", [_new_activations, _fewer_layers])
def test_what_has_no_parameters_and_is_changed_later_is_seen(change: Any) -> None:
    model, policy = helpers.tiny("llama"), helpers.never("exact")
    ids, mask = helpers.prompts()
    _ours(model, ids, mask, policy=policy, max_pending=4)
    change(model)
    plain = _plain(model, ids, mask).sequences
    assert torch.equal(
        _ours(model, ids, mask, policy=policy, max_pending=4, tier="native").sequences, plain
    )


def test_a_model_that_was_run_is_let_go() -> None:
    model = helpers.tiny("llama")
    executor_for(model, tier="native")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "qwen2", "qwen3"])
def test_weights_changed_in_place_are_seen(name: str) -> None:
    model = helpers.tiny(name)
    ids, mask = helpers.prompts()
    _ours(model, ids, mask, policy=helpers.never("exact"), tier="native")
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    plain = _plain(model, ids, mask)
    ours = _ours(model, ids, mask, policy=helpers.never("exact"), tier="native")
    assert torch.equal(ours.sequences, plain.sequences)
    forget(model)


@natives
def test_packed_models_are_still_ordinary_models(name: str, tmp_path: Path) -> None:
    model = helpers.tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    size = sum(p.untyped_storage().nbytes() for p in model.parameters())
    executor_for(model, tier="native")
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) <= size  # no second copy
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, before[key])
    model.to(torch.bfloat16).to(torch.float32)
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask)
    ours = _ours(model, ids, mask, policy=helpers.never("exact"), tier="native")
    assert torch.equal(ours.sequences, plain.sequences)


@natives
def test_a_model_first_run_under_inference_mode_can_be_trained(name: str) -> None:
    model = helpers.tiny(name)
    ids, mask = helpers.prompts()
    with torch.inference_mode():
        _ours(model, ids, mask, policy=helpers.never("exact"), max_pending=4, tier="native")
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    plain = _plain(model, ids, mask)
    ours = _ours(model, ids, mask, policy=helpers.never("exact"), max_pending=4, tier="native")
    assert torch.equal(ours.sequences, plain.sequences)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_models_made_under_inference_mode_run_on_the_generic_tier(mode: Any) -> None:
    with torch.inference_mode():
        model = helpers.tiny("llama")
    ids, mask = helpers.prompts()
    with mode():
        assert isinstance(executor_for(model), GenericExecutor)
        with pytest.raises(UnsupportedError, match=r"made under `torch\.inference_mode"):
            executor_for(model, tier="native")
        ours = _ours(model, ids, mask, policy=helpers.never("exact"), max_pending=4)
        assert torch.equal(ours.sequences, _plain(model, ids, mask).sequences)


class _Adapter(torch.nn.Module):
    """A linear layer with a low-rank correction beside it, as adapters have."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class _WeightedAdapter(_Adapter):
    """An adapter that hands out the base's weight, as those of PEFT do."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def test_layers_with_adapters_run_on_the_generic_tier() -> None:
    model = helpers.tiny("llama")
    assert isinstance(executor_for(model), NativeExecutor)
    for layer in model.model.layers:
        layer.self_attn.v_proj = _Adapter(layer.self_attn.v_proj)
    assert isinstance(executor_for(model), GenericExecutor)
    with pytest.raises(UnsupportedError, match="quantised or wrapped"):
        executor_for(model, tier="native")
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask).sequences
    for mode in MODES:
        ours = _ours(model, ids, mask, policy=helpers.never(mode))
        assert torch.equal(ours.sequences, plain)


class _Packed(Tensor):
    """Integers and scales in place of a weight, as quantisation makes them: good for products only.

    ``reshape``, ``to`` and most other operations fail, as those of torchao's tensors do.
    """

    whole: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, scales: Tensor) -> _Packed:
        found: _Packed = Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scales.dtype)  # type: ignore[attr-defined]
        found.whole, found.scales = whole, scales
        return found

    @classmethod
    def of(cls, weight: Tensor) -> _Packed:
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["whole", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scales)
        raise NotImplementedError(f"{func} of packed weights")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            plain = (arg.whole * arg.scales if type(arg) is cls else arg for arg in args)
            return func(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@torch.no_grad()
def _packed(model: Any, *, head: bool) -> None:
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear and (head or path != "lm_head"):
            module.weight = torch.nn.Parameter(_Packed.of(module.weight), requires_grad=False)


@pytest.mark.parametrize("head", [False, True], ids=["layers", "head too"])
def test_packed_weights_run_on_the_generic_tier(head: bool) -> None:
    model = helpers.tiny("llama", exits=False)
    _packed(model, head=head)
    attach_exits(model, helpers.EXITS)
    with pytest.raises(UnsupportedError, match="quantised or wrapped"):
        executor_for(model, tier="native")
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask).sequences
    for policy in (helpers.never("exact"), helpers.mixed(model, "verify")):
        assert torch.equal(_ours(model, ids, mask, policy=policy).sequences, plain)
    before = lineage(model)
    fresh = helpers.tiny("llama", exits=False)
    _packed(fresh, head=head)
    assert related(before, lineage(fresh))
    fresh.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        _Packed.of(2 * torch.rand(48, 32)), requires_grad=False
    )
    assert not related(before, lineage(fresh))


@torch.no_grad()
def test_rows_of_a_head_that_is_more_than_its_weight() -> None:
    model = helpers.tiny("llama")
    model.lm_head = _WeightedAdapter(model.lm_head)
    read = Readout(model)
    states, ids = torch.randn(3, 32), torch.tensor([[1, 5], [90, 2], [7, 7]])
    logits = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(read(states), logits)
    torch.testing.assert_close(read.at(states, ids), logits.gather(1, ids))
    torch.testing.assert_close(read.over(ids[1])(states), logits[:, ids[1]])


def test_a_head_without_a_weight_is_named() -> None:
    model = helpers.tiny("llama", exits=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedError, match="is a Sequential without a tensor `weight`"):
        attach_exits(model, (1,))


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt-neox"])
@pytest.mark.parametrize("field", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_the_layers_do_not_know_is_named(name: str, field: str) -> None:
    model = helpers.tiny(name, exits=False)
    setattr(model.config, field, 7)
    with pytest.raises(UnsupportedError, match=rf"`{field}=7`, which its layers .* do not know"):
        attach_exits(model, helpers.EXITS)
    setattr(model.config, field, None)  # which is what the message says
    attach_exits(model, helpers.EXITS)
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask).sequences
    for tier in ("native", "generic"):
        ours = _ours(model, ids, mask, policy=helpers.never("exact"), tier=tier)
        assert torch.equal(ours.sequences, plain)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["native", "generic"])
def test_compiled_models_give_the_same(tier: Any) -> None:
    model = helpers.tiny("llama")
    ids, mask = helpers.prompts()
    plain = _plain(model, ids, mask).sequences
    model.compile(backend="eager")
    ours = _ours(model, ids, mask, policy=helpers.never("exact"), tier=tier)
    assert torch.equal(ours.sequences, plain)


# -- families that are not there ------------------------------------------------------------------


def test_unknown_family_is_named() -> None:
    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedError, match="'mamba' is not known: missing are the path"):
        attach_exits(MambaForCausalLM(config), (1,))


def test_encoder_decoder_is_named() -> None:
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match="'t5' is an encoder-decoder"):
        attach_exits(model, (1,))
    with pytest.raises(UnsupportedError, match="'t5' is an encoder-decoder"):
        generate(model, torch.ones(1, 3, dtype=torch.int64), policy=helpers.never("exact"))


def test_wrapped_or_headless_models_are_named() -> None:
    model = helpers.tiny("llama", exits=False)
    with pytest.raises(UnsupportedError, match=r"has no `model\.layers`"):
        attach_exits(model.model, (1,))
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        is_decoder=True,
    )
    with pytest.raises(UnsupportedError, match="'bert' is not known"):
        attach_exits(BertLMHeadModel(config), (1,))
