"""Llama and its kin: root-mean-square norms, rotary tables, a gated feed-forward part."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Family, Native
from adaptive._families._layer import (
    Attention,
    Gated,
    Layer,
    RootMeanSquare,
    head_width,
    matrix,
    window,
)


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention, feedforward = module.self_attn, module.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (
        None if norm is None else RootMeanSquare(norm.weight, config.rms_norm_eps) for norm in norms
    )
    return Layer(
        norm=RootMeanSquare(module.input_layernorm.weight, config.rms_norm_eps),
        attention=Attention(
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            output=matrix(attention.o_proj),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=head_width(config),
            scale=attention.scaling,
            query_norm=query_norm,
            key_norm=key_norm,
            window=window(config, index),
        ),
        feedforward_norm=RootMeanSquare(
            module.post_attention_layernorm.weight, config.rms_norm_eps
        ),
        feedforward=Gated(
            matrix(feedforward.gate_proj),
            matrix(feedforward.up_proj),
            matrix(feedforward.down_proj),
            feedforward.act_fn.forward,
        ),
    )


LLAMA = Family(
    ("llama", "qwen2", "qwen3", "mistral"), "model.layers", ("model.norm",), native=Native(_layer)
)
