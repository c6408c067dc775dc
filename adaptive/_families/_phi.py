"""Phi: attention and feed-forward part side by side behind one norm, part of a head rotated."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Family, Native
from adaptive._families._layer import Attention, Layer, TwoLayers, head_width, layer_norm, matrix


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention, feedforward = module.self_attn, module.mlp
    return Layer(
        norm=layer_norm(module.input_layernorm),
        attention=Attention(
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            output=matrix(attention.dense),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=head_width(config),
            scale=attention.scaling,
            query_norm=layer_norm(attention.q_layernorm) if config.qk_layernorm else None,
            key_norm=layer_norm(attention.k_layernorm) if config.qk_layernorm else None,
        ),
        feedforward_norm=None,
        feedforward=TwoLayers(
            matrix(feedforward.fc1), matrix(feedforward.fc2), feedforward.activation_fn.forward
        ),
        parallel=True,
    )


PHI = Family(("phi",), "model.layers", ("model.final_layernorm",), native=Native(_layer))
