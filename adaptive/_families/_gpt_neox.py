"""GPT-NeoX: each head's query, key and value rows together, part of a head rotated."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Family, Native
from adaptive._families._layer import Attention, Layer, TwoLayers, head_width, layer_norm, matrix


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention, feedforward = module.attention, module.mlp
    return Layer(
        norm=layer_norm(module.input_layernorm),
        attention=Attention(
            projections=(attention.query_key_value,),
            output=matrix(attention.dense),
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_width=head_width(config),
            scale=attention.scaling,
            groups=config.num_attention_heads,
        ),
        feedforward_norm=layer_norm(module.post_attention_layernorm),
        feedforward=TwoLayers(
            matrix(feedforward.dense_h_to_4h),
            matrix(feedforward.dense_4h_to_h),
            feedforward.act.forward,
        ),
        parallel=config.use_parallel_residual,
    )


GPT_NEOX = Family(
    ("gpt_neox",),
    "gpt_neox.layers",
    ("gpt_neox.final_layer_norm",),
    native=Native(_layer, rotary="gpt_neox.rotary_emb"),
)
