"""Phi 3: a Llama whose projections come as one matrix, and so do gate and up."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Family, Native
from adaptive._families._layer import (
    Attention,
    Gated,
    Layer,
    Matrix,
    RootMeanSquare,
    head_width,
    matrix,
    window,
)


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention, feedforward = module.self_attn, module.mlp
    gate, up = matrix(feedforward.gate_up_proj).weight.chunk(2)
    return Layer(
        norm=RootMeanSquare(module.input_layernorm.weight, config.rms_norm_eps),
        attention=Attention(
            projections=(attention.qkv_proj,),
            output=matrix(attention.o_proj),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=head_width(config),
            scale=attention.scaling,
            window=window(config, index),
        ),
        feedforward_norm=RootMeanSquare(
            module.post_attention_layernorm.weight, config.rms_norm_eps
        ),
        feedforward=Gated(
            Matrix(gate, None),
            Matrix(up, None),
            matrix(feedforward.down_proj),
            feedforward.activation_fn.forward,
        ),
    )


PHI3 = Family(("phi3",), "model.layers", ("model.norm",), native=Native(_layer))
