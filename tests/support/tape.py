"""A stand-in for CUDA graphs on a CPU: what is captured is written down, and replayed as it was.

As on a GPU, a replay sees nothing of Python: the operators, the tensors they read and the places
they write to are those of the capture; numbers of the host are those of the capture; a value that
is asked for while capturing is an error. Capturing changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators that hand a value to the host, or a number of the host to the device.
REFUSED = frozenset({"_local_scalar_dense", "nonzero", "equal", "lift_fresh", "is_nonzero"})


class TapeGraph:
    """Has the methods of ``torch.cuda.CUDAGraph`` that the library uses."""

    replays = 0
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.tape: list[Any] = []
        #: Whether an operator was not permitted: as in torch, ending the capture fails as well.
        self.broken = False
        self._open = [self.tape]

    def begin_capture_to_if_node(self, flag: Tensor) -> None:
        assert flag.dtype == torch.bool
        assert flag.ndim == 0
        body: list[Any] = []
        self._open[-1].append((flag, body))
        self._open.append(body)

    def end_capture_to_conditional_node(self) -> None:
        if self.broken:
            raise RuntimeError("capture_end() called before capture_begin().")
        self._open.pop()

    def note(self, work: Callable[[], None]) -> None:
        self._open[-1].append(work)

    def replay(self) -> None:
        assert len(self._open) == 1
        type(self).replays += 1
        _play(self.tape)


def _play(tape: list[Any]) -> None:
    for entry in tape:
        if callable(entry):
            entry()
        elif bool(entry[0]):
            _play(entry[1])


class _Writing(TorchDispatchMode):
    """Writes operators down; what they change is put back at the end."""

    def __init__(self, graph: TapeGraph, stream: Any) -> None:
        super().__init__()
        self.graph, self.stream = graph, stream
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what comes here under `torch.inference_mode` may be made of other operators
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        schema = func._schema
        if schema.name.removeprefix("aten::") in REFUSED:
            self.graph.broken = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {schema.name}")
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for value in written:
            place = value.untyped_storage().data_ptr()
            if value.numel() and place not in self.before:
                whole = value.new_empty(0).set_(value.untyped_storage())
                self.before[place] = (whole, whole.clone())
        out = func(*args, **kwargs)
        for value in (*written, *tree_leaves(out)):
            # what other streams or devices do meanwhile is in no graph
            assert not isinstance(value, Tensor) or value.device == self.stream.device
        fresh = [
            value
            for value, returned in zip(
                out if isinstance(out, tuple) else (out,), schema.returns, strict=False
            )
            if isinstance(value, Tensor) and returned.alias_info is None
        ]
        if written or fresh:
            self.graph.note(lambda: _again(func, args, kwargs, fresh))
        return out


def _again(func: Any, args: Any, kwargs: Any, fresh: list[Tensor]) -> None:
    """Run an operator once more; new values go where the first ones were."""
    out = func(*args, **kwargs)
    if fresh:
        new = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        assert len(new) == len(fresh)
        for place, value in zip(fresh, new, strict=True):
            place.copy_(value)


@contextmanager
def _capture(
    graph: TapeGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    mode = _Writing(graph, stream)
    try:
        with mode:
            yield
    except BaseException as error:
        raise RuntimeError("Capture must end on the same stream it began on.") from error
    finally:
        for whole, old in mode.before.values():
            whole.copy_(old)


def install(monkeypatch: pytest.MonkeyPatch) -> type[TapeGraph]:
    """Put the stand-in where the library looks for CUDA graphs."""

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    for name, value in {
        "CUDAGraph": TapeGraph,
        "graph": _capture,
        "graph_pool_handle": lambda: None,
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(TapeGraph, "replays", 0)
    monkeypatch.setattr(TapeGraph, "made", 0)
    monkeypatch.setattr("adaptive._stacking._needs_cuda", lambda *_: False)
    return TapeGraph
