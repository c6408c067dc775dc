"""The native tier: our own forward pass for pre-norm decoders, from a family's description."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from adaptive._attention import FOLD_LIMIT, attend, rotate
from adaptive._executor import AbstractExecutor, TokenExecutor
from adaptive._families import Readout, family_of, layers_of
from adaptive._families._layer import (
    Matrix,
    NotNativeError,
    matrix,
)
from adaptive._families._rope import check_length, longest_text, rotary_of, unknown_scheme
from adaptive._keys_values import KeyValues
from adaptive._packing import by_group, contents, hooked, part, stack_norms, stack_projections
from adaptive._product import filled_up, product
from adaptive._reach import Reach, Sight
from adaptive._span import Apart, Span, Window
from adaptive._tokens import Tokens

#: From this size of a layer's key and value weights on, reading them twice costs more than the
#: few operations per layer that save it.
_LARGE = 2**19


class NativeExecutor(TokenExecutor):
    """Preallocated keys and values, fused projections, one stacked product for skipped layers.

    What the layers compute is written down by the family (:class:`adaptive._families.Native`).

    Attention of single tokens of some rows (:meth:`run_tokens`) reads the keys of all rows if these
    are a third of the batch or more, and copies those of the rows it needs if they are fewer.

    The query, key and value matrices of all layers live in one tensor, and so do the norms'
    parameters; the model's own parameters become views of them, same values, no second copy. So
    training or loading in place is seen here, and memory stays the model's own. (Gate and up
    projection stay apart: on a CPU one product of twice the width takes longer for several rows.)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_not_native(model)
        if reason is not None:
            raise ValueError(f"no native tier for this model: {reason}")
        native = family_of(model).native
        assert native is not None
        modules = layers_of(model)
        self.layers = len(modules)
        self.readout = Readout(model)
        self._layers = [
            native.layer(module, index, model.config) for index, module in enumerate(modules)
        ]
        attention = self._layers[0].attention
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_width, self.groups = attention.head_width, attention.groups
        self._embed = native.embed(model)
        self._rotary, self._longest = rotary_of(model), longest_text(model)
        self._ropes = sorted({layer.attention.rope for layer in self._layers}, key=str)
        self._rope_of = [self._ropes.index(layer.attention.rope) for layer in self._layers]
        self._windows = {layer.attention.window for layer in self._layers}
        self._capped = any(layer.attention.softcap is not None for layer in self._layers)
        mixed = stack_projections(self._layers)
        self._mixed = [
            Matrix(weight, None if mixed.bias is None else mixed.bias[index])
            for index, weight in enumerate(mixed.weight)
        ]
        queries = self.heads * self.head_width // self.groups
        self._kv = by_group(mixed.weight, self.groups)[:, :, queries:]
        self._kv_bias = (
            None if mixed.bias is None else by_group(mixed.bias, self.groups)[:, :, queries:]
        )
        self._norms = stack_norms([layer.norm for layer in self._layers])
        key_norms = [layer.attention.key_norm for layer in self._layers]
        self._key_norms = stack_norms([norm for norm in key_norms if norm is not None])
        on_cpu = self._kv.device.type == "cpu"
        self._thin = on_cpu and self._kv.dtype == torch.float32
        self._together = on_cpu and self._kv[0].nbytes >= _LARGE
        self._modules = modules
        self._contents = contents(model)

    def stale(self, model: PreTrainedModel) -> bool:
        """Whether anything of ``model`` was replaced since it was read, or a layer hooked into.

        Hooks elsewhere are called: the other modules are run as they are.
        """
        return (
            contents(model) != self._contents
            or layers_of(model) != self._modules
            or any(map(hooked, self._modules))
        )

    def begin(
        self,
        *,
        batch_size: int,
        max_length: int,
        padding: Tensor | None,
        positions: Tensor,
        ahead: int | None = None,
    ) -> None:
        """See :class:`TokenExecutor`."""
        check_length(self._longest, max_length)
        self.readout.begin()
        self.void = max_length
        self._memory = KeyValues(
            [layer.attention.window for layer in self._layers],
            batch=batch_size,
            heads=self.kv_heads,
            length=max_length,
            width=self.head_width,
            ahead=ahead,
            like=self._kv,
        )
        self._sight = Sight(self._memory, padding, masked=self._capped)
        self._length = [0] * self.layers
        self._padding = padding
        self._positions = positions
        self._cos, self._sin = self._tables(positions)
        self._reach_key: tuple[int, int, int] | None = None

    def begin_again(self, *, padding: Tensor | None, positions: Tensor) -> bool:
        """Begin another run, of as many rows and slots, where everything of the last one lies.

        Returns whether it fits there; nothing has changed if it does not. Not after :meth:`end`.
        """
        cos, sin = self._tables(positions)
        if cos.shape != self._cos.shape or (padding is None) != (self._padding is None):
            return False
        for place, value in (
            (self._cos, cos),
            (self._sin, sin),
            (self._positions, positions),
            *(((self._padding, padding),) if self._padding is not None else ()),
        ):
            place.copy_(value)
        self._memory.clear()
        self._length = [0] * self.layers
        self._reach_key = None
        return True

    def packed_as(self, other: AbstractExecutor) -> bool:
        """Whether another executor has the same weights at the same place."""
        same = isinstance(other, NativeExecutor) and self._layers is other._layers
        return same and self.readout is other.readout

    @property
    def longest(self) -> int | None:
        """Most slots of a text, if the rotary tables say so."""
        return self._longest

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, signed sines ``[types, rows, 1, 1, slots, rotated]``; one row if all agree."""
        rows = positions[:1] if bool((positions == positions[:1]).all()) else positions
        tables = [self._table(rope, rows) for rope in self._ropes]
        cos, sin = (torch.stack(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def _table(self, rope: str | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines ``[rows, 1, 1, slots, rotated]`` of one type of layers."""
        like = torch.empty(1, dtype=self._kv.dtype, device=self._kv.device)
        if self._rotary is None:
            cos = sin = like.new_empty(*rows.shape, 0)
        elif rope is None:
            cos, sin = self._rotary(like, rows)
        else:
            cos, sin = self._rotary(like, rows, rope)
        half = cos.shape[-1] // 2
        # rotate_half(x) * sin == roll(x) * signed sin: one operation less per layer and token
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[:, None, None], signed[:, None, None]

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See :class:`TokenExecutor`."""
        return self._embed(tokens, self._positions[:, start : start + tokens.shape[1]])

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
        """See :class:`TokenExecutor`."""
        first, stop = start, start + hidden.shape[1]
        if waiting is not None:
            first -= waiting.shape[1]
            if self._together and hidden.shape[1] == 1:
                waiting = self._layers[low].norm.bare(waiting)
            else:
                self.fill(low, high, waiting, first)
                first, waiting = start, None
        tables = {
            rope: (cos[:, :, :, first:stop], sin[:, :, :, first:stop])
            for rope, cos, sin in zip(self._ropes, self._cos, self._sin, strict=True)
        }
        span = Span(start - first, tables, self._reaches(first, start, stop), waiting)
        kept = None if frozen is None else frozen[:, None, None]
        for index in range(low, high):
            output = self._run_layer(index, hidden, span)
            hidden = output if kept is None else torch.where(kept, hidden, output)
            self._length[index] = stop
        return hidden

    def embed_tokens(self, ids: Tensor, tokens: Tokens) -> Tensor:
        """See :class:`TokenExecutor`."""
        positions = self._positions[tokens.rows, tokens.slots]
        return self._embed(ids[:, None], positions[:, None])[:, 0]

    def run_tokens(
        self,
        low: int,
        high: int,
        hidden: Tensor,
        tokens: Tokens,
        *,
        waiting: tuple[Tensor, Tokens] | None = None,
    ) -> Tensor:
        """See :class:`TokenExecutor`."""
        written, bare, late = tokens, None, 0
        if waiting is not None:
            states, before = waiting
            if self._together:
                bare = self._layers[low].norm.bare(states[None])
                written, late = before + tokens, before.count
            else:
                self.fill_tokens(low, high, states, before)
        tables = {
            rope: (self._at(cos, written), self._at(sin, written))
            for rope, cos, sin in zip(self._ropes, self._cos, self._sin, strict=True)
        }
        layout = tokens.layout(self._memory.batch)
        reach = {
            window: self._sight.apart(tokens, layout, window, written=written.slots)
            for window in self._windows
        }
        span = Span(late, tables, reach, bare, Apart(written.rows, layout))
        hidden = hidden[None]
        for index in range(low, high):
            hidden = self._run_layer(index, hidden, span)
        self._reached(low, high, tokens.reach[1] + 1)
        return hidden[0]

    def window(self, slots: Tensor, *, queries: int, stop: int) -> Window:
        """Prepare runs over ``slots``, int64 ``[n]``, of which the last ``queries`` look around.

        ``stop`` is above every slot; keys from there on are not read.
        """
        real = slots.clamp(min=0)
        tables = {
            rope: (cos.index_select(3, real), sin.index_select(3, real))
            for rope, cos, sin in zip(self._ropes, self._cos, self._sin, strict=True)
        }
        reach = {}
        for width in self._windows:
            own = self._sight.around(real[-queries:], stop, width)
            if 1 < queries <= FOLD_LIMIT and own.mask is not None:  # once for all layers
                groups = self.heads // self.kv_heads
                own = own._replace(mask=own.mask.repeat(1, 1, groups, 1))
            reach[width] = own
        return Window(slots, tables, reach)

    def embed_window(self, ids: Tensor, window: Window) -> Tensor:
        """Input of layer 0, ``[batch, n, width]``, for tokens ``ids [batch, n]`` of a window."""
        return self._embed(ids, self._positions.index_select(1, window.slots))

    def run_window(
        self,
        low: int,
        high: int,
        hidden: Tensor,
        window: Window,
        into: Tensor,
        *,
        frozen: Tensor | None = None,
        waiting: Tensor | None = None,
    ) -> Tensor:
        """Like :meth:`run` over a window; keys and values are written to slots ``into [n]``.

        With ``waiting``, ``hidden`` are the tokens of the window after these.
        """
        late, bare = 0, None
        if waiting is not None:
            late, bare = waiting.shape[1], self._layers[low].norm.bare(waiting)
        reach = {
            width: own._replace(into=self._memory.where(width, into))
            for width, own in window.reach.items()
        }
        span = Span(late, window.tables, reach, bare)
        kept = None if frozen is None else frozen[:, None, None]
        for index in range(low, high):
            output = self._run_layer(index, hidden, span)
            hidden = output if kept is None else torch.where(kept, hidden, output)
        return hidden

    def fill_window(
        self, low: int, high: int, hidden: Tensor, window: Window, into: Tensor
    ) -> None:
        """Like :meth:`fill` over a window; keys and values are written to slots ``into``."""
        ropes = [self._ropes[index] for index in self._ropes_of(low, high)]
        cos, sin = (torch.stack([window.tables[rope][kind] for rope in ropes]) for kind in (0, 1))
        keys, values = self._filled(low, high, hidden, cos, sin)
        places = {width: self._memory.where(width, into) for width in self._windows}
        for index in range(low, high):
            own = places[self._layers[index].attention.window]
            self._memory.write(index, keys[index - low], values[index - low], own)

    def reached(self, low: int, high: int, stop: int) -> None:
        """Say that runs over windows have written these layers up to ``stop``."""
        self._length[low:high] = [stop] * (high - low)

    def fill(self, low: int, high: int, hidden: Tensor, start: int) -> None:
        """See :class:`TokenExecutor`: all skipped layers in one product over stacked weights.

        Every skipped layer sees the same hidden state, so its norm differs by its own parameters
        alone and all projections are one batched product.
        """
        stop = start + hidden.shape[1]
        ropes = self._ropes_of(low, high)
        cos, sin = (
            torch.stack([table[rope, ..., start:stop, :] for rope in ropes])
            for table in (self._cos, self._sin)
        )
        keys, values = self._filled(low, high, hidden, cos, sin)
        self._memory.fill(low, high, keys, values, start)
        self._reached(low, high, stop)

    def fill_tokens(self, low: int, high: int, hidden: Tensor, tokens: Tokens) -> None:
        """See :class:`TokenExecutor`."""
        ropes = self._ropes_of(low, high)
        cos, sin = (
            torch.stack([self._at(table[rope], tokens) for rope in ropes])
            for table in (self._cos, self._sin)
        )
        keys, values = self._filled(low, high, hidden[None], cos, sin)
        self._memory.fill_tokens(low, high, keys[:, 0], values[:, 0], tokens)
        self._reached(low, high, tokens.reach[1] + 1)

    def _filled(
        self, low: int, high: int, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[layers, batch, heads, n, head width]`` of states."""
        batch, count, width = hidden.shape
        span = high - low
        assert self._norms is not None
        bare = self._norms.bare(hidden).reshape(1, batch * count, width)
        normed = part(self._norms, low, high, axes=1).finish(bare)[:, None]
        weights = self._kv[low:high]
        if filled_up(batch * count, weights) == batch * count:
            both = torch.matmul(weights, normed.transpose(2, 3)).transpose(2, 3)
        else:
            both = torch.matmul(normed, weights.transpose(2, 3))
        if self._kv_bias is not None:
            both = both + self._kv_bias[low:high, :, None]
        both = both.reshape(span, self.groups, batch, count, 2, -1, self.head_width)
        keys, values = both.permute(4, 0, 2, 1, 5, 3, 6)
        if self._key_norms is not None:
            norm = part(self._key_norms, low, high, axes=4)
            keys = norm.finish(norm.bare(keys))
        shape = (span, batch, self.kv_heads, count, self.head_width)
        return rotate(keys, cos, sin).reshape(shape), values.reshape(shape)

    def _ropes_of(self, low: int, high: int) -> list[int]:
        """Which table each layer's keys are rotated by; one if all share it."""
        return self._rope_of[low:high] if len(self._ropes) > 1 else [0]

    def _at(self, table: Tensor, tokens: Tokens) -> Tensor:
        """Entries ``[1, 1, 1, n, rotated]`` of a table ``[rows, 1, 1, slots, rotated]``."""
        rows = tokens.rows if table.shape[0] > 1 else torch.zeros_like(tokens.rows)
        return table[rows, 0, 0, tokens.slots][None, None, None]

    def _reached(self, low: int, high: int, stop: int) -> None:
        """Say that some row of these layers has keys and values below ``stop``."""
        self._length[low:high] = [max(stop, own) for own in self._length[low:high]]

    def truncate(self, length: int) -> None:
        """See :class:`TokenExecutor`: later slots are overwritten before they are read."""
        self._length = [min(length, own) for own in self._length]

    def kept_window(self, layer: int) -> int | None:
        """See :class:`TokenExecutor`."""
        return self._memory.window_of(layer)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """See :class:`TokenExecutor`."""
        return self._memory.last(layer, self._length[layer])

    def end(self) -> None:
        """See :class:`TokenExecutor`."""
        del self._memory, self._sight, self._cos, self._sin
        self._padding = None

    def _reaches(self, first: int, start: int, stop: int) -> dict[int | None, Reach]:
        """Say what queries ``start .. stop - 1`` may see; the runs of one token share it.

        Slots ``first .. stop - 1`` are written.
        """
        if self._reach_key != (first, start, stop):
            self._reach_key = (first, start, stop)
            self._reach = {
                window: self._sight.along(first, start, stop, window) for window in self._windows
            }
        return self._reach

    def _run_layer(self, index: int, hidden: Tensor, span: Span) -> Tensor:
        """One decoder layer over ``hidden [batch, n, width]``."""
        layer = self._layers[index]
        normed = layer.norm(hidden)
        if span.waiting is None:
            query, keys, values = self._project(index, normed, span)
        else:
            query, keys, values = self._project_waiting(index, normed, span, span.waiting)
        keys, values = self._keep(index, keys, values, span)
        attended = self._attend(index, query, keys, values, span)
        added = self._product(attended, layer.attention.output)
        del query, keys, values, attended  # not kept through the feed-forward part
        if layer.attention_post is not None:
            added = layer.attention_post(added)
        after = hidden + added
        if layer.feedforward_norm is not None:
            normed = layer.feedforward_norm(hidden if layer.parallel else after)
        added = layer.feedforward(self._product, normed)
        if layer.feedforward_post is not None:
            added = layer.feedforward_post(added)
        return after + added

    def _project(self, index: int, normed: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys as rotated and values, ``[batch, heads, n, head width]``."""
        attention = self._layers[index].attention
        mixed = self._heads(self._product(normed, self._mixed[index]))
        queries = self.heads // self.groups
        rotated = queries + self.kv_heads // self.groups
        turned = mixed[:, :, :, :rotated]
        if attention.query_norm is not None and attention.key_norm is not None:
            query = attention.query_norm(turned[:, :, :, :queries])
            turned = torch.cat((query, attention.key_norm(turned[:, :, :, queries:])), dim=3)
        turned = rotate(turned.permute(0, 2, 3, 1, 4), *span.tables[attention.rope])
        keys, values = self._merged(turned[:, :, queries:]), mixed[:, :, :, rotated:]
        return self._merged(turned[:, :, :queries]), keys, values.flatten(2, 3).transpose(1, 2)

    def _project_waiting(
        self, index: int, normed: Tensor, span: Span, waiting: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like ``_project``; waiting tokens get keys and values from the same read of the weights.

        Only the newest tokens have queries.
        """
        layer, attention = self._layers[index], self._layers[index].attention
        query, both = self._queries_apart(index, layer.norm.finish(waiting), normed)
        own = self.kv_heads // self.groups
        keys = both[:, :, :, :own]
        if attention.query_norm is not None and attention.key_norm is not None:
            query, keys = attention.query_norm(query), attention.key_norm(keys)
        cos, sin = span.tables[attention.rope]
        turned = rotate(keys.permute(0, 2, 3, 1, 4), cos, sin)
        query = query.permute(0, 2, 3, 1, 4)
        query = rotate(query, cos[:, :, :, span.late :], sin[:, :, :, span.late :])
        values = both[:, :, :, own:].flatten(2, 3).transpose(1, 2)
        return self._merged(query), self._merged(turned), values

    def _queries_apart(self, index: int, waiting: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Query heads of ``normed``, and key and value heads of ``waiting`` and ``normed``."""
        weight, bias = self._mixed[index]
        every = torch.cat((waiting, normed), dim=1)
        if self.groups > 1:  # rows of queries are not next to each other
            mixed = self._heads(self._product(every, self._mixed[index]))
            queries = self.heads // self.groups
            return mixed[:, waiting.shape[1] :, :, :queries], mixed[:, :, :, queries:]
        rows = self.heads * self.head_width
        query_bias, kv_bias = (None, None) if bias is None else (bias[:rows], bias[rows:])
        query = self._product(normed, Matrix(weight[:rows], query_bias))
        both = self._product(every, Matrix(weight[rows:], kv_bias))
        return self._heads(query), self._heads(both)

    def _heads(self, states: Tensor) -> Tensor:
        """``[batch, n, rows]`` to ``[batch, n, groups, heads of a group, head width]``."""
        return states.view(*states.shape[:2], self.groups, -1, self.head_width)

    def _merged(self, states: Tensor) -> Tensor:
        """``[batch, groups, heads of a group, n, head width]`` to ``[batch, heads, n, ...]``."""
        batch, _, _, count, width = states.shape
        return states.reshape(batch, -1, count, width)

    def _keep(self, index: int, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Keep keys and values; return those that queries read, of all rows of the batch."""
        reach, memory = span.reach[self._layers[index].attention.window], self._memory
        kept = memory.keys[index], memory.values[index]
        if span.apart is not None:
            memory.write_tokens(index, keys[0], values[0], reach.into, span.apart.rows)
        elif reach.before is not None:  # read before they are overwritten
            old = [own[:, :, reach.before] for own in kept]
            memory.write(index, keys, values, reach.into)
            return torch.cat((old[0], keys), dim=2), torch.cat((old[1], values), dim=2)
        else:
            memory.write(index, keys, values, reach.into)
        return kept[0][:, :, reach.low : reach.stop], kept[1][:, :, reach.low : reach.stop]

    def _product(self, states: Tensor, by: Matrix) -> Tensor:
        # the commonest cases, one row or a GPU, are spared the question
        if not self._thin or states.shape[0] * states.shape[1] == 1:
            return F.linear(states, by.weight, by.bias)
        return product(states, by.weight, by.bias)

    def _attend(
        self, index: int, query: Tensor, keys: Tensor, values: Tensor, span: Span
    ) -> Tensor:
        """Attention of ``query [batch, heads, n, head width]``; ``[batch, n, width]``."""
        attention = self._layers[index].attention
        reach = span.reach[attention.window]
        if span.apart is None:
            return attend(query, keys, values, reach, attention).flatten(2)
        layout = span.apart.layout
        laid = layout.lay(query[0].transpose(0, 1)).transpose(1, 2)
        attended = attend(laid, layout.of(keys), layout.of(values), reach, attention)
        return layout.pick(attended).flatten(1)[None]


def why_not_native(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run on the native tier, or ``None`` if it can."""
    native = family_of(model).native
    if native is None:
        return f"family {model.config.model_type!r} runs on the generic tier"
    reason = native.refuse(model.config)
    if reason is not None:
        return reason
    scheme = unknown_scheme(model)
    if scheme is not None:
        return f"rotary scheme {scheme!r} is not known"
    if getattr(model, "hf_device_map", None):
        return "the model is sharded over devices"
    parameters = list(model.parameters())
    if len({(parameter.device, parameter.dtype) for parameter in parameters}) != 1:
        return "parameters are on several devices or of several dtypes"
    for index, module in enumerate(layers_of(model)):
        if hooked(module):
            return f"layer {index} carries hooks"
        if any(parameter.is_inference() for parameter in module.parameters()):
            return f"layer {index} was made under `torch.inference_mode()`: it cannot be packed"
        try:
            layer = native.layer(module, index, model.config)
            for projection in layer.attention.projections:
                matrix(projection)
        except NotNativeError as error:
            return f"layer {index} has {error}"
        except AttributeError as error:
            return f"layer {index} is not built as its family's layers are: {error}"
    return None
