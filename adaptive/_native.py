"""The native tier: our own forward pass for pre-norm, gated, rotary decoders (Llama and kin)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from adaptive._executor import AbstractExecutor, attention_mask
from adaptive._families import Readout, family_of, layers_of

#: Rotary schemes whose tables do not depend on how long the text has grown.
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
#: Above this many queries the group of a key head is not folded into the query rows.
_FOLD_LIMIT = 64
#: From 2 up to this many rows a product on a CPU is formed transposed, which reads the weights
#: once: all layers on 4 rows then take 0.7 of the time that ``F.linear`` takes, on 8 rows as long.
_THIN = 6
#: Fewer rows than this are filled up: the transposed product takes longer for 2 and 3 than for 4.
_EVEN = 4
#: From this size of a layer's key and value weights on, reading them twice costs more than the
#: few operations per layer that save it.
_LARGE = 2**19


@dataclass(frozen=True)
class _Layer:
    """Parameters of one layer; ``mixed`` aliases the model's own three matrices."""

    attention_norm: Tensor
    mixed: Tensor
    mixed_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    feedforward_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class _Span:
    """Slots that one run covers, and what its layers share.

    Keys and values are written for ``first .. stop - 1``, queries asked for ``start .. stop - 1``;
    ``waiting``, normalised without gain, are the tokens in between that have stopped.
    """

    first: int
    start: int
    stop: int
    cos: Tensor
    sin: Tensor
    waiting: Tensor | None
    mask: Tensor | None
    causal: bool


class NativeExecutor(AbstractExecutor):
    """Preallocated keys and values, fused projections, one stacked product for skipped layers.

    The query, key and value matrices of all layers live in one tensor, and so do the norms'
    gains; the model's own parameters become views of them, same values, no second copy. So
    training or loading in place is seen here, and memory stays the model's own. (Gate and up
    projection stay apart: on a CPU one product of twice the width takes longer for several rows.)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_not_native(model)
        if reason is not None:
            raise ValueError(f"no native tier for this model: {reason}")
        config = model.config
        modules = layers_of(model)
        self.layers = len(modules)
        self.readout = Readout(model)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.scale = modules[0].self_attn.scaling
        self.window = _window(model)
        self._embedding = model.get_input_embeddings()
        self._rotary = model.model.rotary_emb
        mixed, mixed_bias = _stack_projections(modules)
        queries = self.heads * self.head_width
        self._kv = mixed[:, queries:]
        self._thin = mixed.device.type == "cpu" and mixed.dtype == torch.float32
        self._together = mixed.device.type == "cpu" and self._kv[0].nbytes >= _LARGE
        self._kv_bias = None if mixed_bias is None else mixed_bias[:, queries:]
        self._gains = _stack([[module.input_layernorm.weight] for module in modules])
        norms: list[Any] = [getattr(module.self_attn, "k_norm", None) for module in modules]
        self._key_gains = None if norms[0] is None else _stack([[norm.weight] for norm in norms])
        self._blocks = [
            _block(module, mixed[index], None if mixed_bias is None else mixed_bias[index])
            for index, module in enumerate(modules)
        ]
        self._addresses = _addresses(modules)
        self._modules = modules

    def stale(self) -> bool:
        """Whether parameters were replaced since they were packed, or a layer was hooked into."""
        return _addresses(self._modules) != self._addresses or any(map(_hooked, self._modules))

    def begin(
        self, *, batch_size: int, max_length: int, padding: Tensor | None, positions: Tensor
    ) -> None:
        """See :class:`AbstractExecutor`."""
        like = self._kv
        shape = (self.layers, batch_size, self.kv_heads, max_length, self.head_width)
        self._keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._length = [0] * self.layers
        self._padding = padding
        rows = positions if padding is not None else positions[:1]
        cos, sin = self._rotary(torch.empty(1, dtype=like.dtype, device=like.device), rows)
        half = cos.shape[-1] // 2
        # rotate_half(x) * sin == roll(x) * signed sin: one operation less per layer and token
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._cos, self._sin = cos[:, None], signed[:, None]
        self._mask_key: tuple[int, int] | None = None

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See :class:`AbstractExecutor`."""
        hidden: Tensor = self._embedding(tokens)
        return hidden

    def run(
        self,
        low: int,
        high: int,
        hidden: Tensor,
        start: int,
        *,
        frozen: Tensor | None = None,
        waiting: Tensor | None = None,
    ) -> Tensor:
        """See :class:`AbstractExecutor`."""
        first, stop = start, start + hidden.shape[1]
        if waiting is not None:
            first -= waiting.shape[1]
            if self._together:
                waiting = F.rms_norm(waiting, waiting.shape[-1:], None, self.eps)
            else:
                self.fill(low, high, waiting, first)
                first, waiting = start, None
        span = _Span(
            first,
            start,
            stop,
            self._cos[:, :, first:stop],
            self._sin[:, :, first:stop],
            waiting,
            *self._attention(start, stop - start),
        )
        kept = None if frozen is None else frozen[:, None, None]
        for index in range(low, high):
            output = self._layer(index, hidden, span)
            hidden = output if kept is None else torch.where(kept, hidden, output)
            self._length[index] = stop
        return hidden

    def fill(self, low: int, high: int, hidden: Tensor, start: int) -> None:
        """See :class:`AbstractExecutor`: all skipped layers in one product over stacked weights.

        Every skipped layer sees the same hidden state, so its norm differs by the gain alone and
        all projections are one batched product.
        """
        batch, count, width = hidden.shape
        stop = start + count
        normed = F.rms_norm(hidden, (width,), None, self.eps).reshape(1, batch * count, width)
        normed = normed * self._gains[low:high, None]
        weights = self._kv[low:high]
        if self._thin and batch * count <= _THIN:
            both = torch.bmm(weights, normed.transpose(1, 2)).transpose(1, 2)
        else:
            both = torch.bmm(normed, weights.transpose(1, 2))
        if self._kv_bias is not None:
            both = both + self._kv_bias[low:high, None]
        both = both.reshape(high - low, batch, count, 2, self.kv_heads, self.head_width)
        keys = both[:, :, :, 0]
        if self._key_gains is not None:
            keys = F.rms_norm(keys, (self.head_width,), None, self.eps)
            keys = keys * self._key_gains[low:high, None, None, None]
        keys = _rotate(
            keys.transpose(2, 3), self._cos[:, :, start:stop], self._sin[:, :, start:stop]
        )
        self._keys[low:high, :, :, start:stop] = keys
        self._values[low:high, :, :, start:stop] = both[:, :, :, 1].transpose(2, 3)
        self._length[low:high] = [stop] * (high - low)

    def truncate(self, length: int) -> None:
        """See :class:`AbstractExecutor`: later slots are overwritten before they are read."""
        self._length = [min(length, own) for own in self._length]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """See :class:`AbstractExecutor`."""
        length = self._length[layer]
        return self._keys[layer, :, :, :length], self._values[layer, :, :, :length]

    def end(self) -> None:
        """See :class:`AbstractExecutor`."""
        del self._keys, self._values, self._cos, self._sin
        self._padding = None

    def _attention(self, start: int, count: int) -> tuple[Tensor | None, bool]:
        """Mask and causal flag for a range of queries, shared by the layers of a run."""
        if self._mask_key != (start, count):
            self._mask_key = (start, count)
            plain = self._padding is None and (self.window is None or start + count <= self.window)
            self._causal = plain and start == 0 and count > 1
            self._mask = (
                None
                if self._causal
                else attention_mask(
                    self._padding,
                    start=start,
                    count=count,
                    window=self.window,
                    device=self._keys.device,
                )
            )
        return self._mask, self._causal

    def _layer(self, index: int, hidden: Tensor, span: _Span) -> Tensor:
        """One decoder layer over ``hidden [batch, n, width]``."""
        block = self._blocks[index]
        shape = hidden.shape[-1:]
        normed = F.rms_norm(hidden, shape, block.attention_norm, self.eps)
        if span.waiting is None:
            query = self._project(index, normed, span)
        else:
            query = self._project_waiting(index, normed, span, span.waiting)
        attended = self._attend(index, query, span)
        hidden = hidden + self._product(attended, block.output, block.output_bias)
        normed = F.rms_norm(hidden, shape, block.feedforward_norm, self.eps)
        gated = F.silu(self._product(normed, block.gate)) * self._product(normed, block.up)
        return hidden + F.linear(gated, block.down)

    def _project(self, index: int, normed: Tensor, span: _Span) -> Tensor:
        """Write keys and values; return queries ``[batch, heads, n, head width]``."""
        block = self._blocks[index]
        mixed = self._heads(self._product(normed, block.mixed, block.mixed_bias))
        heads, rotated = self.heads, self.heads + self.kv_heads
        turned = mixed[:, :, :rotated]
        if block.query_norm is not None:
            query = F.rms_norm(mixed[:, :, :heads], (self.head_width,), block.query_norm, self.eps)
            key = F.rms_norm(turned[:, :, heads:], (self.head_width,), block.key_norm, self.eps)
            turned = torch.cat((query, key), dim=2)
        turned = _rotate(turned.transpose(1, 2), span.cos, span.sin)
        self._keys[index, :, :, span.start : span.stop] = turned[:, heads:]
        self._values[index, :, :, span.start : span.stop] = mixed[:, :, rotated:].transpose(1, 2)
        return turned[:, :heads]

    def _project_waiting(self, index: int, normed: Tensor, span: _Span, waiting: Tensor) -> Tensor:
        """Like ``_project``; waiting tokens get keys and values from the same read of the weights.

        Only the newest tokens have queries.
        """
        block = self._blocks[index]
        queries = self.heads * self.head_width
        weight, bias = block.mixed, block.mixed_bias
        query_bias, kv_bias = (None, None) if bias is None else (bias[:queries], bias[queries:])
        query = self._heads(self._product(normed, weight[:queries], query_bias))
        normed = torch.cat((waiting * block.attention_norm, normed), dim=1)
        both = self._heads(self._product(normed, weight[queries:], kv_bias))
        keys, values = both[:, :, : self.kv_heads], both[:, :, self.kv_heads :]
        if block.query_norm is not None:
            query = F.rms_norm(query, (self.head_width,), block.query_norm, self.eps)
            keys = F.rms_norm(keys, (self.head_width,), block.key_norm, self.eps)
        self._keys[index, :, :, span.first : span.stop] = _rotate(
            keys.transpose(1, 2), span.cos, span.sin
        )
        self._values[index, :, :, span.first : span.stop] = values.transpose(1, 2)
        late = span.start - span.first
        return _rotate(query.transpose(1, 2), span.cos[:, :, late:], span.sin[:, :, late:])

    def _heads(self, states: Tensor) -> Tensor:
        """``[batch, n, heads * head width]`` to ``[batch, n, heads, head width]``."""
        return states.view(*states.shape[:2], -1, self.head_width)

    def _product(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``, in the form that reads the weights once for a few rows on a CPU."""
        batch, count, width = states.shape
        if not self._thin or not 1 < batch * count <= _THIN:
            return F.linear(states, weight, bias)
        rows = states.reshape(batch * count, width).contiguous()
        if batch * count < _EVEN:
            rows = F.pad(rows, (0, 0, 0, _EVEN - batch * count))
        turned = torch.mm(weight, rows.T).T[: batch * count]
        turned = turned if bias is None else turned + bias
        return turned.reshape(batch, count, -1)

    def _attend(self, index: int, query: Tensor, span: _Span) -> Tensor:
        """Attention of ``query [batch, heads, n, head width]`` over all slots up to the newest."""
        batch, heads, count, width = query.shape
        keys = self._keys[index, :, :, : span.stop]
        values = self._values[index, :, :, : span.stop]
        mask, causal = span.mask, span.causal
        groups = heads // self.kv_heads
        if causal or count > _FOLD_LIMIT:
            attended = F.scaled_dot_product_attention(
                query, keys, values, mask, is_causal=causal, scale=self.scale, enable_gqa=groups > 1
            )
        else:
            # queries that share a key head become rows of one product: keys are read once
            folded = query.reshape(batch, self.kv_heads, groups * count, width)
            if mask is not None and count > 1 and groups > 1:
                mask = mask.repeat(1, 1, groups, 1)
            attended = F.scaled_dot_product_attention(folded, keys, values, mask, scale=self.scale)
            attended = attended.view(batch, heads, count, width)
        return attended.transpose(1, 2).reshape(batch, count, heads * width)


def why_not_native(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run on the native tier, or ``None`` if it can."""
    family = family_of(model)
    if not family.native:
        return f"family {model.config.model_type!r} runs on the generic tier"
    if getattr(model.config, "hidden_act", "silu") != "silu":
        return f"activation {model.config.hidden_act!r} is not silu"
    if getattr(model.model.rotary_emb, "rope_type", "default") not in _FIXED_ROPE:
        return (
            f"rotary scheme {model.model.rotary_emb.rope_type!r} depends on the length of the text"
        )
    if getattr(model, "hf_device_map", None):
        return "the model is sharded over devices"
    parameters = list(model.parameters())
    if len({(parameter.device, parameter.dtype) for parameter in parameters}) != 1:
        return "parameters are on several devices or of several dtypes"
    for index, module in enumerate(layers_of(model)):
        linears = [
            getattr(module.self_attn, name, None)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]
        linears += [
            getattr(module.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")
        ]
        if any(type(linear) is not nn.Linear for linear in linears):
            return f"layer {index} has projections that are quantised or wrapped"
        if any(getattr(linear, "bias", None) is not None for linear in linears[4:]):
            return f"layer {index} has biases in its feed-forward part"
        if _hooked(module):
            return f"layer {index} carries hooks"
    if len(set(getattr(model.config, "layer_types", None) or ["full_attention"])) > 1:
        return "layers mix full and sliding attention"
    return None


def _window(model: PreTrainedModel) -> int | None:
    """Width of the sliding window, if the layers have one."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds == {"full_attention"} or (
        not kinds and not getattr(config, "use_sliding_window", True)
    ):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``states [..., heads, n, head width]``; the sign is folded into ``sin``."""
    return torch.addcmul(states * cos, torch.roll(states, states.shape[-1] // 2, dims=-1), sin)


def _stack(layers: list[list[nn.Parameter]]) -> Tensor:
    """Pack the parameters of every layer into one tensor ``[layers, rows, ...]``.

    The parameters become views of it, values unchanged.
    """
    first = layers[0][0]
    shape = (len(layers), sum(parameter.shape[0] for parameter in layers[0]), *first.shape[1:])
    stacked = torch.empty(shape, dtype=first.dtype, device=first.device)
    for packed, parameters in zip(stacked, layers, strict=True):
        torch.cat([parameter.data for parameter in parameters], out=packed)
        row = 0
        for parameter in parameters:
            rows = parameter.shape[0]
            parameter.data = packed[row : row + rows]
            row += rows
    return stacked


def _stack_projections(modules: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Query, key and value weights of all layers, ``[layers, rows, width]``, and their biases."""
    linears = [
        (attention.q_proj, attention.k_proj, attention.v_proj)
        for attention in (module.self_attn for module in modules)
    ]
    weights = _stack([[linear.weight for linear in three] for three in linears])
    if linears[0][0].bias is None:
        return weights, None
    return weights, _stack([[linear.bias for linear in three] for three in linears])


def _block(module: Any, mixed: Tensor, mixed_bias: Tensor | None) -> _Layer:
    attention, feedforward = module.self_attn, module.mlp
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return _Layer(
        attention_norm=module.input_layernorm.weight,
        mixed=mixed,
        mixed_bias=mixed_bias,
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        feedforward_norm=module.post_attention_layernorm.weight,
        gate=feedforward.gate_proj.weight,
        up=feedforward.up_proj.weight,
        down=feedforward.down_proj.weight,
    )


def _addresses(modules: list[nn.Module]) -> tuple[int, ...]:
    """Where every parameter lives."""
    return tuple(parameter.data_ptr() for module in modules for parameter in module.parameters())


def _hooked(layer: nn.Module) -> bool:
    """Whether anything of a layer does more than its class says.

    The hooks that transformers leaves behind after ``output_hidden_states=True`` only look.
    """
    return any(
        "forward" in module.__dict__
        or any(
            getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        for module in layer.modules()
    )


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two logit tensors agree to the rounding of their dtype."""
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2}.get(
        theirs.dtype, 8e-2
    )
    difference = (ours.float() - theirs.float()).abs().max().item()
    return math.isfinite(difference) and difference <= tolerance * (
        1 + theirs.float().abs().max().item()
    )
