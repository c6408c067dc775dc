"""Peak memory of a run: a tenth over transformers' static cache; long prompts in pieces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from adaptive import attach_exits, generate
from adaptive._native import NativeExecutor
from adaptive._tier import executor_for
from adaptive.policies import Mode, NoScore, Policy, Threshold

Peak = Callable[[Callable[[], Any]], int]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODES: tuple[Mode, ...] = ("exact", "propagate", "verify")


@pytest.fixture(scope="module")
def peak() -> Peak:
    """The measure of the benchmark: most bytes that were allocated at once during a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        found: Peak = importlib.import_module("bench_memory").peak
    return found


def narrow(*, layers: int = 4, heads: int = 2, context: int = 2048) -> LlamaForCausalLM:
    """A model whose keys and values are most of what a run needs, weights aside."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    attach_exits(model, tuple(range(1, layers)))
    return model


def weights(model: LlamaForCausalLM) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_the_measure_sees_what_is_allocated(peak: Peak) -> None:
    """It counts a temporary that nobody keeps, and nothing that was there before."""
    before = torch.zeros(2**20)
    # a view holds no memory of its own
    assert peak(lambda: before[:4]) < 2**10
    assert 2**22 <= peak(lambda: torch.zeros(2**20).sum()) < 2**22 + 2**10


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mode", MODES)
def test_a_tenth_over_the_static_cache(mode: Mode, batch: int, peak: Peak) -> None:
    model = narrow()
    executor_for(model)
    ids = torch.randint(2, 97, (batch, 64), generator=torch.Generator().manual_seed(0))
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 64,
        "do_sample": False,
    }
    policy = helpers.mixed(model, mode)

    def ours() -> None:
        generate(model, ids, policy=policy, **settings)

    def static() -> None:
        model.generate(ids, cache_implementation="static", disable_compile=True, **settings)

    ours(), static()
    assert weights(model) + peak(ours) <= 1.1 * (weights(model) + peak(static))


@pytest.mark.parametrize("kind", ["every layer", "five of six"])
@pytest.mark.parametrize("mode", MODES)
def test_a_tenth_over_the_static_cache_where_layers_have_windows(
    mode: Mode, kind: str, peak: Peak
) -> None:
    """A static cache keeps a window's worth in them; so do we, and what may wait."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "sliding_window": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(3)
    if kind == "every layer":
        model: Any = MistralForCausalLM(MistralConfig(**settings)).eval()
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**settings)).eval()
    attach_exits(model, (2, 4))
    assert isinstance(executor_for(model), NativeExecutor)
    ids = torch.randint(2, 97, (2, 1500), generator=torch.Generator().manual_seed(0))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    policy = replace(helpers.mixed(model, mode), stages=(0, 1))
    held: list[int] = []
    end = NativeExecutor.end

    def noted(own: NativeExecutor) -> None:
        memory = own._memory
        held.append(sum(states.nbytes for states in (*memory.keys, *memory.values)))
        end(own)

    def ours() -> None:
        generate(model, ids, policy=policy, max_pending=32, **given)

    def static(**more: Any) -> Any:
        return model.generate(
            ids, cache_implementation="static", disable_compile=True, **given, **more
        )

    ours()
    assert peak(ours) <= 1.1 * peak(static)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeExecutor, "end", noted)
        ours()
    layers = static(return_dict_in_generate=True).past_key_values.layers
    assert held[-1] <= 1.1 * sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_packed_weights_are_the_models_own() -> None:
    """Nothing is left behind by packing: the model takes what it took."""
    model = narrow()
    before = weights(model)
    executor = executor_for(model)
    assert isinstance(executor, NativeExecutor)
    owned = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in model.parameters()
    }
    assert sum(owned.values()) == before


@pytest.mark.slow
def test_a_prompt_of_32k(peak: Peak) -> None:
    """The full model's own tokens, and no mask of prompt times prompt."""
    length = 32_768
    model = narrow(layers=2, heads=1, context=length + 8)
    executor_for(model)
    ids = torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    policy = Policy(NoScore(), Threshold(), stages=(0,))
    texts = []

    def ours() -> None:
        texts.append(generate(model, ids, policy=policy, tier="native", **settings))

    most = peak(ours)
    assert torch.equal(texts[0], model.generate(ids, **settings))
    # a mask of all by all would be 1 GiB; those of 1024 by all are 160 MiB in their two types
    assert most < 2**28
