"""The generic tier: a model's own layers, called with the arguments the model itself would pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from adaptive._executor import AbstractExecutor
from adaptive._families import Readout, layers_of
from adaptive._families._rope import check_length, longest_text
from adaptive._locks import lock_of
from adaptive.calibration import UnsupportedError


class _Stop(Exception):
    """Ends a forward pass of the model once its layers' arguments are known."""


class _Written(Exception):
    """Ends a layer's forward pass once its keys and values are written."""


class _Call(NamedTuple):
    """Arguments of one layer, the hidden state replaced by a placeholder."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Phantom(DynamicCache):
    """A cache that only reports a length: what the model asks for while it prepares its masks."""

    def __init__(self, layers: int, length: int, device: torch.device) -> None:
        super().__init__()
        self._reported = length
        if length:
            empty = torch.empty(1, device=device).expand(1, 1, length, 1)
            for layer in range(layers):
                super().update(empty, empty, layer)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "the model writes keys and values outside its decoder layers: its layers cannot "
            "be replayed"
        )


class _Writer(DynamicCache):
    """A cache that takes one layer's keys and values and ends the layer's forward pass."""

    def __init__(self, target: DynamicCache) -> None:
        super().__init__()
        self._target = target

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> NoReturn:
        self._target.update(key_states, value_states, layer_idx)
        raise _Written


class GenericExecutor(AbstractExecutor):
    """Dynamic depth for any family whose layers are called one after the other.

    For every range of positions the model's own forward pass is started once with its layers
    replaced by recorders: it prepares masks, rotary tables and embeddings and never computes a
    layer. The layers are then called directly with what was recorded. The recorders are instance
    attributes that exist only during that call and are removed in ``finally``. Threads record one
    after the other; calls from other threads meanwhile pass on to the layers themselves.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._modules: list[nn.Module] = layers_of(model)
        self.layers = len(self._modules)
        self.readout = Readout(model)

    def begin(
        self,
        *,
        batch_size: int,
        max_length: int,
        padding: Tensor | None,
        positions: Tensor,
        ahead: int | None = None,
    ) -> None:
        """See :class:`AbstractExecutor`."""
        check_length(longest_text(self.model), max_length)
        self.readout.begin()
        self._batch = batch_size
        self._padding = padding
        self._positions = positions
        # Without a config every layer keeps all slots; the model's masks still apply its windows.
        self._cache = DynamicCache()
        self._writer = _Writer(self._cache)
        self._calls: dict[tuple[int, int], list[_Call]] = {}

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See :class:`AbstractExecutor`."""
        hidden, calls = self._record(tokens, start)
        self._calls = {(start, tokens.shape[1]): calls}
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
        if waiting is not None:
            self.fill(low, high, waiting, start - waiting.shape[1])
        calls = self._prepared(hidden, start)
        kept = None if frozen is None else frozen[:, None, None]
        for layer in range(low, high):
            output = self._call(layer, calls[layer], hidden, self._cache)
            hidden = output if kept is None else torch.where(kept, hidden, output)
        return hidden

    def fill(self, low: int, high: int, hidden: Tensor, start: int) -> None:
        """See :class:`AbstractExecutor`: each layer runs up to its cache write."""
        calls = self._prepared(hidden, start)
        for layer in range(low, high):
            try:
                self._call(layer, calls[layer], hidden, self._writer)
            except _Written:
                continue
            raise UnsupportedError(
                f"layer {layer} writes no keys and values: `propagate` cannot skip it"
            )

    def truncate(self, length: int) -> None:
        """See :class:`AbstractExecutor`."""
        self._calls = {}
        for layer in self._cache.layers:
            if layer.is_initialized and layer.keys.shape[-2] > length:
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """See :class:`AbstractExecutor`."""
        stored = self._cache.layers[layer]
        return stored.keys, stored.values

    def end(self) -> None:
        """See :class:`AbstractExecutor`."""
        self._cache = DynamicCache()
        self._calls = {}

    def _prepared(self, hidden: Tensor, start: int) -> list[_Call]:
        key = (start, hidden.shape[1])
        if key not in self._calls:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            self._calls[key] = self._record(tokens, start)[1]
        return self._calls[key]

    def _record(self, tokens: Tensor, start: int) -> tuple[Tensor, list[_Call]]:
        """Start the model's forward pass on ``tokens`` and note what each layer is called with."""
        length = start + tokens.shape[1]
        phantom = _Phantom(self.layers, start, tokens.device)
        found: list[_Call] = []
        first: list[Tensor] = []
        mask = None
        if self._padding is not None:
            mask = torch.ones(self._batch, length, dtype=torch.int64, device=tokens.device)
            seen = min(length, self._padding.shape[1])
            mask[:, :seen] = (~self._padding[:, :seen]).to(torch.int64)
        with lock_of(self.model), _recorders(self._modules, phantom, found, first):
            try:
                self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=self._positions[:, start:length],
                    past_key_values=phantom,
                    use_cache=True,
                )
            except _Stop:
                pass
        return first[0], found

    def _call(self, layer: int, call: _Call, hidden: Tensor, cache: DynamicCache) -> Tensor:
        args = tuple(_placed(value, hidden, cache) for value in call.args)
        kwargs = {name: _placed(value, hidden, cache) for name, value in call.kwargs.items()}
        output = self._modules[layer](*args, **kwargs)
        state: Tensor = output[0] if isinstance(output, tuple) else output
        return state


class _Hidden:
    """Marks where the hidden state goes in a recorded call."""


class _CachePlace:
    """Marks where the cache goes in a recorded call."""


def _placed(value: Any, hidden: Tensor, cache: DynamicCache) -> Any:
    if value is _Hidden:
        return hidden
    if value is _CachePlace:
        return cache
    return value


@contextmanager
def _recorders(
    modules: list[nn.Module], phantom: DynamicCache, found: list[_Call], first: list[Tensor]
) -> Iterator[None]:
    """Replace every layer's forward by a recorder, and put the originals back whatever happens."""
    last = len(modules) - 1
    owner = threading.get_ident()
    originals = [module.forward for module in modules]

    # a compiled model's graph cannot ask for the thread
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != owner:  # which uses the model as it is
            return originals[index](*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            first.append(hidden)

        def marked(value: Any) -> Any:
            if value is hidden:
                return _Hidden
            return _CachePlace if value is phantom else value

        found.append(
            _Call(
                tuple(map(marked, args)),
                {name: marked(value) for name, value in kwargs.items()},
            )
        )
        if index == last:
            raise _Stop
        return hidden

    def recorder(index: int) -> Any:
        return lambda *args, **kwargs: record(index, args, kwargs)

    # A layer may carry an instance-level forward of its own (accelerate's hooks on sharded models).
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = recorder(index)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
