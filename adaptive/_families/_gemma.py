"""Gemma 1 to 3: norms with gain 1 + w; from 2 on also behind each part, and sliding windows."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Family, Native
from adaptive._families._layer import (
    Attention,
    Gated,
    Layer,
    OffsetRootMeanSquare,
    head_width,
    matrix,
    window,
)


def _norm(module: Any) -> OffsetRootMeanSquare:
    return OffsetRootMeanSquare(module.weight, module.eps)


def _attention(module: Any, config: Any, **details: Any) -> Attention:
    return Attention(
        projections=(module.q_proj, module.k_proj, module.v_proj),
        output=matrix(module.o_proj),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=head_width(config),
        scale=module.scaling,
        **details,
    )


def _feedforward(module: Any) -> Gated:
    return Gated(
        matrix(module.gate_proj),
        matrix(module.up_proj),
        matrix(module.down_proj),
        module.act_fn.forward,
    )


def _layer(module: Any, index: int, config: Any) -> Layer:
    return Layer(
        norm=_norm(module.input_layernorm),
        attention=_attention(module.self_attn, config),
        feedforward_norm=_norm(module.post_attention_layernorm),
        feedforward=_feedforward(module.mlp),
    )


def _sandwiched(module: Any, attention: Attention) -> Layer:
    return Layer(
        norm=_norm(module.input_layernorm),
        attention=attention,
        attention_post=_norm(module.post_attention_layernorm),
        feedforward_norm=_norm(module.pre_feedforward_layernorm),
        feedforward=_feedforward(module.mlp),
        feedforward_post=_norm(module.post_feedforward_layernorm),
    )


def _layer2(module: Any, index: int, config: Any) -> Layer:
    attention = _attention(
        module.self_attn,
        config,
        window=window(config, index),
        softcap=config.attn_logit_softcapping,
    )
    return _sandwiched(module, attention)


def _layer3(module: Any, index: int, config: Any) -> Layer:
    attention = _attention(
        module.self_attn,
        config,
        query_norm=_norm(module.self_attn.q_norm),
        key_norm=_norm(module.self_attn.k_norm),
        rope=config.layer_types[index],
        window=window(config, index),
    )
    return _sandwiched(module, attention)


def _refuse_bidirectional(config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return "attention looks ahead (`use_bidirectional_attention`)"
    return None


def _refuse_uncapped(config: Any) -> str | None:
    if config.attn_logit_softcapping is not None and config._attn_implementation == "sdpa":
        return "attention kernel 'sdpa' does not apply `attn_logit_softcapping`"
    return _refuse_bidirectional(config)


GEMMA = Family(
    ("gemma",),
    "model.layers",
    ("model.norm",),
    native=Native(_layer, refuse=_refuse_bidirectional),
)
GEMMA2 = Family(
    ("gemma2",),
    "model.layers",
    ("model.norm",),
    native=Native(_layer2, refuse=_refuse_uncapped),
    softcap="final_logit_softcapping",
)
GEMMA3 = Family(
    ("gemma3_text",),
    "model.layers",
    ("model.norm",),
    native=Native(_layer3, refuse=_refuse_bidirectional),
    softcap="final_logit_softcapping",
)
