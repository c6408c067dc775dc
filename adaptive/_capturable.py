"""Finds out what a CUDA graph cannot hold before anything is captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MASKS = frozenset({torch.bool, torch.uint8})


class NotCapturableError(RuntimeError):
    """An operator makes the host wait for the device, or has an outcome of unknown shape."""


class OnlyCapturable(TorchDispatchMode):
    """In here such an operator is an error, on any device.

    Inside a capture it would be one too, but torch does not get over it: the stream stays in
    the capture, the allocator with its pool, and so does every capture after it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not typed it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # under `torch.inference_mode` operators come here that are made of others
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if _waits(func, args, kwargs):
            raise NotCapturableError(f"operation not permitted in a CUDA graph: {func.name()}")
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name == "index":
        return _by_mask(args[1])
    if name in ("index_put", "index_put_"):  # a number in place of a mask is filled in
        return _by_mask(args[1]) and not (args[2].numel() == 1 and args[2].device.type == "cpu")
    if name in ("_to_copy", "copy_", "lift_fresh"):
        return _moves(name, args, kwargs)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in _MASKS for index in indices)


def _moves(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether values cross between devices; those that are lifted were the host's."""
    if name == "lift_fresh":
        return bool(args[0].device.type != "cpu")
    kinds = {value.device.type for value in tree_leaves(args) if isinstance(value, Tensor)}
    if kwargs.get("device") is not None:
        kinds.add(torch.device(kwargs["device"]).type)
    return len(kinds) > 1
