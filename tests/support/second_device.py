"""A second device made of Python, for machines without a GPU: which tensors are where is checked.

Values lie in tensors of the CPU, and operators compute what they compute there, bit for bit. But
tensors say that they are on the device ``second``, as those of a GPU say it, an operator refuses
to mix them with the CPU's, and what makes the host wait is counted: values that it reads, and
numbers that it sends from ordinary memory. Speed, streams and graphs are nothing that it knows.

Importing this registers the device with torch for the whole process, which other tests would
notice: its tests run in a process of their own.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "second"

#: Operators whose result the host waits for.
_READS = frozenset({"_local_scalar_dense", "nonzero", "equal", "is_nonzero"})
#: Operators that take indices from the host to a tensor of the device, which are sent first.
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


class _Backend(_DummyBackendModule):
    """What torch and transformers ask of a device's module."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()  # values are drawn where they lie

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        return


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class Placed(Tensor):
    """A tensor of the device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Placed:
        placed = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        placed.held = held
        return placed

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held}, on {self.device}"

    def tolist(self) -> Any:
        _note("read")
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy: use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class second_device(TorchDispatchMode):
    """In here the device exists; ``waits`` counts what the host has waited for, and where.

    Keys are ``(kind, line of code)``; kinds are ``"read"`` and ``"sent"``.
    """

    _entered: list[second_device] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> second_device:
        # `torch.tensor` then makes a tensor of the CPU first, and moves it in the open
        torch._C._set_only_lift_cpu_tensors(True)
        self._entered.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop()
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = kwargs.get("device")
        meant = named is not None and torch.device(named).type == NAME
        if meant or any(isinstance(value, Placed) for value in _tensors(args, kwargs)):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry an operator out on the values, and say where its result is."""
    name = func._schema.name.removeprefix("aten::")
    tensors = _tensors(args, kwargs)
    here = [value for value in tensors if not isinstance(value, Placed)]
    there = len(tensors) > len(here)
    named = kwargs.get("device")
    target = there if named is None else torch.device(named).type == NAME
    if name in _READS:
        _note("read")
    if name == "_to_copy" and named is not None and there != target:
        _note("read" if there else "sent")
    elif name == "copy_" and there and here:
        _note("sent" if isinstance(args[0], Placed) else "read")
    elif there and any(value.ndim for value in here):
        if name not in _INDEXED or not isinstance(args[0], Placed):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        _note("sent")
    written = [
        value
        for argument, value in [
            *zip(func._schema.arguments, args, strict=False),
            *_named(func, kwargs),
        ]
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    inside = kwargs if named is None else {**kwargs, "device": torch.device("cpu")}
    out = func(*_values(args), **{key: _values(value) for key, value in inside.items()})
    if written and any(out.alias_info is not None for out in func._schema.returns):
        return written[0] if len(written) == 1 else tuple(written)
    if name == "_to_copy" and named is not None:
        out = out.clone()  # moved, so no longer the same memory
    return _placed(out) if target else out


def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(known, kwargs[known.name]) for known in func._schema.arguments if known.name in kwargs]


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among an operator's arguments, in lists too."""
    found: list[Tensor] = []
    waiting = [*args, *kwargs.values()]
    for value in waiting:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return found


def _values(value: Any) -> Any:
    if isinstance(value, Placed):
        return value.held
    return type(value)(map(_values, value)) if isinstance(value, list | tuple) else value


def _placed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_placed, value))
    return Placed(value) if isinstance(value, Tensor) and not isinstance(value, Placed) else value


def _note(kind: str) -> None:
    """Count a wait under the innermost line of the library."""
    place = ""
    frame: Any = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/adaptive/_" in path or "/policies/" in path:
            name = path.rsplit("/", 1)[-1]
            place = f"{name}: {linecache.getline(path, frame.f_lineno).strip()}"
            break
        frame = frame.f_back
    for mode in second_device._entered:
        mode.waits[kind, place] += 1
