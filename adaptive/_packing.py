"""Parameters of all layers in one tensor each; the model's own become views of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive._families._layer import AbstractNorm, Layer, Matrix


def _stack(layers: list[list[Tensor]]) -> Tensor:
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


def stack_projections(layers: list[Layer]) -> Matrix:
    """Query, key and value weights of all layers, ``[layers, rows, width]``, and their biases."""
    modules: list[tuple[Any, ...]] = [layer.attention.projections for layer in layers]
    first = modules[0][0]
    weights = _stack([[module.weight for module in own] for own in modules])
    if type(first) is not nn.Linear:  # kept transposed
        weights = weights.transpose(1, 2)
    if first.bias is None:
        return Matrix(weights, None)
    return Matrix(weights, _stack([[module.bias for module in own] for own in modules]))


def by_group(stacked: Tensor, groups: int) -> Tensor:
    """``[layers, rows, ...]`` to ``[layers, groups, rows of a group, ...]``."""
    return stacked.unflatten(1, (groups, -1))


def stack_norms(norms: list[AbstractNorm]) -> AbstractNorm | None:
    """One norm with the parameters of all layers, ``[layers, width]``, if there are any."""
    if not norms:
        return None
    columns = zip(*(norm.parameters for norm in norms), strict=True)
    return norms[0].holding(tuple(_stack([[value] for value in column]) for column in columns))


def part(norms: AbstractNorm, low: int, high: int, *, axes: int) -> AbstractNorm:
    """Layers ``low .. high - 1`` of stacked norms, for states with ``axes`` axes in between."""
    return norms.holding(
        tuple(value[low:high].view(high - low, *(1,) * axes, -1) for value in norms.parameters)
    )


class Contents(NamedTuple):
    """What a model is made of: another one if anything of it was replaced.

    The modules are held, so that none is taken for one that came after it; the model is not.
    """

    modules: tuple[nn.Module, ...]
    addresses: tuple[int, ...]


def contents(model: nn.Module) -> Contents:
    """Every module below a model, and where every parameter lives."""
    found = list(model.modules())
    return Contents(
        tuple(found[1:]),
        tuple(
            0 if parameter is None else parameter.data_ptr()
            for module in found
            for parameter in module._parameters.values()
        ),
    )


def hooked(layer: nn.Module) -> bool:
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
