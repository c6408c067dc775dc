"""Families of the generic tier alone: every one against the model itself, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adaptive import UnsupportedError, attach_exits, generate
from adaptive._families import FAMILIES
from adaptive._output import AdaptiveOutput
from adaptive.policies import Margin, Mode, Policy, Threshold

NEW = 9
_MODERN: dict[str, Any] = {
    "vocab_size": helpers.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT = {
    key: value
    for key, value in _MODERN.items()
    if key not in ("num_key_value_heads", "head_dim", "intermediate_size")
}
#: Four experts, of which two, in the words of the families.
_EXPERTS: dict[str, Any] = (
    dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
)
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}

_MOE = _MODERN | _EXPERTS
#: Windows and chunks here are so small that every text outgrows them.
_WINDOW = {"sliding_window": 7}
_SLIDING = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}

MODELS: dict[str, dict[str, Any]] = {
    "afmoe": _MOE | _SLIDING | {"num_dense_layers": 1},
    "apertus": _MODERN,
    "arcee": _MODERN,
    "biogpt": _GPT | {"intermediate_size": 48},
    "bitnet": _MODERN,
    "bloom": _GPT,
    "codegen": _GPT | {"rotary_dim": 4, "n_ctx": 256},
    "cohere": _MODERN | {"logit_scale": 0.3},
    "cohere2": _MODERN | _SLIDING | {"logit_scale": 0.3},
    "cwm": _MODERN | _SLIDING,
    "deepseek_v2": _MOE | _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _MOE | _LATENT,
    "diffllama": _MODERN,
    "dots1": _MOE,
    "ernie4_5": _MODERN,
    "ernie4_5_moe": _MOE | {"moe_num_shared_experts": 1},
    "exaone4": _MODERN | _SLIDING,
    "exaone_moe": _MOE | _SLIDING,
    "falcon": _GPT | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-alibi": _GPT | {"alibi": True},
    "flex_olmo": _MOE,
    "glm": _MODERN,
    "glm4": _MODERN,
    "glm4_moe": _MOE,
    "gpt_bigcode": _GPT | {"n_inner": 48},
    "gpt_neo": _GPT | {"attention_types": [[["global", "local"], 1]], "window_size": 7},
    "gpt_oss": _MOE | _SLIDING,
    "gptj": _GPT | {"rotary_dim": 4},
    "granite": _MODERN | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "granitemoe": _MOE | {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "granitemoeshared": _MOE | {"logits_scaling": 3.0, "shared_intermediate_size": 16},
    "helium": _MODERN,
    "hunyuan_v1_dense": _MODERN,
    "hunyuan_v1_moe": _MOE,
    "hyperclovax": _MODERN | {"logits_scaling": 3.0},
    "internlm3": _MODERN,
    "jais2": _MODERN,
    "llama4_text": _MOE
    | {
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "minimax_m2": _MOE,
    "ministral": _MODERN | _SLIDING,
    "ministral3": _MODERN | _WINDOW,
    "mixtral": _MOE | _WINDOW,
    "mpt": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": 256,
        "vocab_size": helpers.VOCABULARY,
        "initializer_range": 0.25,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "nanochat": _MODERN | {"final_logit_softcapping": 3.0},
    "nemotron": _MODERN,
    "olmo": _MODERN | {"clip_qkv": 1.0},
    "olmo2": _MODERN,
    "olmo3": _MODERN | _SLIDING,
    "olmoe": _MOE,
    "persimmon": _GPT | {"intermediate_size": 48},
    "phimoe": _MOE | _WINDOW,
    "qwen2_moe": _MOE | _SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": _MOE | _WINDOW | {"use_sliding_window": True},
    "seed_oss": _MODERN,
    "smollm3": _MODERN | {"no_rope_layers": [1, 0]},
    "solar_open": _MOE,
    "stablelm": _MODERN | {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": _MODERN | _WINDOW,
    "vaultgemma": _MODERN | {"final_logit_softcapping": 3.0},
    "xglm": _GPT | {"ffn_dim": 48},
    "youtu": _MODERN | _LATENT,
}


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """Return a random model with an exit after the first of its two layers."""
    config = AutoConfig.for_model(name.partition("-")[0], **MODELS[name] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attach_exits(model, (1,))
    return model


def _ours(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, mode: Mode, knob: float = float("inf")
) -> AdaptiveOutput:
    output = generate(
        model,
        ids,
        attention_mask=mask,
        policy=Policy(Margin(), Threshold(knob), stages=(0,), mode=mode),
        max_new_tokens=NEW,
        do_sample=False,
        max_pending=3,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AdaptiveOutput)
    return output


def test_every_family_has_a_row() -> None:
    known = {name for family in FAMILIES if family.native is None for name in family.model_types}
    assert known == {name.partition("-")[0] for name in MODELS}


def test_the_docs_name_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
    missing = [
        name for family in FAMILIES for name in family.model_types if f"`{name}`" not in text
    ]
    assert not missing


def _row(name: str) -> Any:
    there = name.partition("-")[0] in CONFIG_MAPPING
    reason = "this release of transformers does not have it yet"
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=reason))


@pytest.mark.parametrize("name", [_row(name) for name in MODELS])
def test_text_and_settled_cache_are_the_models_own(name: str) -> None:
    model = tiny(name)
    ids, mask = helpers.prompts((9, 5, 8))
    plain = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    never = _ours(model, ids, mask, "propagate")
    knob = float(never.exit_scores.nanmedian()) + 1e-3  # which no score comes near
    verified = _ours(model, ids, mask, "verify", knob)
    for ours in (never, verified):
        assert helpers.near_ties(ours.sequences, plain.sequences, plain.scores, ids.shape[1]) == 0

    exact = _ours(model, ids, mask, "exact", knob)
    assert len(exact.exit_stages[:, 1:].unique()) > 1  # the run is worth testing
    cache, logits = helpers.own_cache(model, exact.sequences[:, :-1], mask)
    chosen = logits[:, ids.shape[1] - 1 :].argmax(dim=-1)
    assert torch.equal(exact.agreement.bool(), chosen == exact.sequences[:, ids.shape[1] :])
    real = torch.nn.functional.pad(mask, (0, NEW - 1), value=1).bool()
    for mine, theirs in zip(exact.past_key_values.layers, cache.layers, strict=True):
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            gap = (one - other).abs().amax(dim=(1, 3))[real]
            assert float(gap.max()) < 1e-5 * (1 + float(other.abs().max()))

    together = _ours(model, ids, mask, "propagate", knob)
    alone = _ours(model, ids[1:2, 4:], mask[1:2, 4:], "propagate", knob)
    assert together.sequences[1, 9:].tolist() == alone.sequences[0, 5:].tolist()
    assert together.exit_stages[1].tolist() == alone.exit_stages[0].tolist()


_SCHEMES: dict[str, dict[str, Any]] = {
    "olmo2": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "phimoe": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "short_mscale": 1.0,
        "long_mscale": 1.5,
        "original_max_position_embeddings": 20,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("name", _SCHEMES)
def test_tables_that_would_change_are_refused_by_name(name: str) -> None:
    model = tiny(name, rope_parameters=_SCHEMES[name], max_position_embeddings=20)
    _ours(model, *helpers.prompts((10,)), "exact")
    with pytest.raises(UnsupportedError, match=r"rotary tables change after (19|20) tokens"):
        _ours(model, *helpers.prompts((12,)), "exact")
