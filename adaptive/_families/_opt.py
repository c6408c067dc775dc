"""OPT: learned positions that start at 2, layer norms, embeddings that may be narrower."""

from __future__ import annotations

from typing import Any

from adaptive._families._family import Embed, Family, Native
from adaptive._families._layer import (
    Attention,
    Layer,
    TwoLayers,
    head_width,
    layer_norm,
    matrix,
)


def _embed(model: Any) -> Embed:
    parts = model.model.decoder
    widen = parts.project_in or (lambda embedded: embedded)
    return lambda tokens, positions: (
        widen(parts.embed_tokens(tokens)) + parts.embed_positions(None, position_ids=positions)
    )


def _layer(module: Any, index: int, config: Any) -> Layer:
    attention = module.self_attn
    return Layer(
        norm=layer_norm(module.self_attn_layer_norm),
        attention=Attention(
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            output=matrix(attention.out_proj),
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_width=head_width(config),
            scale=attention.scaling,
        ),
        feedforward_norm=layer_norm(module.final_layer_norm),
        feedforward=TwoLayers(matrix(module.fc1), matrix(module.fc2), module.activation_fn.forward),
    )


def _refuse(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "norms stand behind attention and feed-forward part (`do_layer_norm_before=False`)"
    return None


OPT = Family(
    ("opt",),
    "model.decoder.layers",
    ("model.decoder.final_layer_norm", "model.decoder.project_out"),
    native=Native(_layer, rotary=None, embed=_embed, refuse=_refuse),
)
