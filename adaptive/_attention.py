"""Attention over kept keys and values, and the rotation of keys and queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptive._families._layer import Attention
from adaptive._reach import Reach

#: Above this many queries the group of a key head is not folded into the query rows.
FOLD_LIMIT = 64
#: Devices whose fast kernels take a mask and key heads that several query heads share.
_SHARED_UNDER_MASK = ("cpu",)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, reach: Reach, attention: Attention
) -> Tensor:
    """From ``query [batch, heads, n, head width]`` to ``[batch, n, heads, head width]``."""
    batch, heads, count, width = query.shape
    key_heads = keys.shape[1]
    groups = heads // key_heads
    mask = reach.mask
    if attention.softcap is None and (reach.causal or count > FOLD_LIMIT):
        shared = groups > 1
        if shared and mask is not None and query.device.type not in _SHARED_UNDER_MASK:
            keys, values = (kept.repeat_interleave(groups, dim=1) for kept in (keys, values))
            shared = False
        attended = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            mask,
            is_causal=reach.causal,
            scale=attention.scale,
            enable_gqa=shared,
        )
    else:
        # queries that share a key head become rows of one product: keys are read once
        folded = query.reshape(batch, key_heads, groups * count, width)
        if mask is not None and 1 < count == mask.shape[-2] and groups > 1:
            mask = mask.repeat(1, 1, groups, 1)
        if attention.softcap is None:
            attended = F.scaled_dot_product_attention(
                folded, keys, values, mask, scale=attention.scale
            )
        else:
            attended = _capped_attention(folded, keys, values, mask, attention)
        attended = attended.view(batch, heads, count, width)
    return attended.transpose(1, 2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first entries of ``states [..., n, head width]``; ``sin`` carries the sign."""
    width = cos.shape[-1]
    if width == 0:
        return states
    if width < states.shape[-1]:
        return torch.cat((rotate(states[..., :width], cos, sin), states[..., width:]), dim=-1)
    return torch.addcmul(states * cos, torch.roll(states, width // 2, dims=-1), sin)


def _capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """Attention whose scaled products are bounded by ``c tanh(s / c)`` before the mask."""
    cap = attention.softcap
    assert cap is not None
    scores = query @ keys.transpose(-1, -2) * (attention.scale / cap)
    scores = scores.tanh() * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
