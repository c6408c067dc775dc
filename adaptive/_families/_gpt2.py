"""GPT-2: learned positions, layer norms, matrices kept transposed."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Embed, Family, Native
from adaptive._families._layer import Attention, Layer, TwoLayers, layer_norm, matrix


def _embed(model: Any) -> Embed:
    parts = model.transformer
    return lambda tokens, positions: parts.wte(tokens) + parts.wpe(positions)


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention, feedforward = module.attn, module.mlp
    return Layer(
        norm=layer_norm(module.ln_1),
        attention=Attention(
            projections=(attention.c_attn,),
            output=matrix(attention.c_proj),
            heads=attention.num_heads,
            kv_heads=attention.num_heads,
            head_width=attention.head_dim,
            scale=attention.scaling,
        ),
        feedforward_norm=layer_norm(module.ln_2),
        feedforward=TwoLayers(
            matrix(feedforward.c_fc), matrix(feedforward.c_proj), feedforward.act.forward
        ),
    )


GPT2 = Family(
    ("gpt2",),
    "transformer.h",
    ("transformer.ln_f",),
    native=Native(_layer, rotary=None, embed=_embed),
)
