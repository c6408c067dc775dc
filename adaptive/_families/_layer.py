"""Parts that a pre-norm decoder layer is made of: a family names which ones its layers have."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adaptive._fingerprint import is_packed


class NotNativeError(Exception):
    """A layer is built of something that the native tier does not know."""


class Matrix(NamedTuple):
    """Weight ``[rows, columns]`` and bias ``[rows]`` of a linear map."""

    weight: Tensor
    bias: Tensor | None


#: The executor's way to apply a :class:`Matrix` to ``[batch, n, columns]``.
Product = Callable[[Tensor, Matrix], Tensor]


def matrix(module: Any) -> Matrix:
    """Return the matrix of a linear module, as a view.

    Raises
    ------
    NotNativeError
        If the module is anything else: it may be quantised, or carry an adapter.
    """
    if plain_linear(module):
        return Matrix(module.weight.detach(), _detached(module.bias))
    if type(module) is Conv1D:  # kept transposed, as the first GPTs do
        return Matrix(module.weight.detach().T, _detached(module.bias))
    raise NotNativeError("projections that are quantised or wrapped")


def plain_linear(module: Any) -> bool:
    """Whether a module is a linear map with numbers for weights, no packed or quantised ones."""
    return type(module) is nn.Linear and not is_packed(module.weight)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


class AbstractNorm(abc.ABC):
    """A norm over the last axis, in two halves: layers that see the same state share the first."""

    @abc.abstractmethod
    def __call__(self, hidden: Tensor) -> Tensor:
        """Both halves."""

    @abc.abstractmethod
    def bare(self, hidden: Tensor) -> Tensor:
        """Normalise, without the norm's own parameters."""

    @abc.abstractmethod
    def finish(self, bare: Tensor) -> Tensor:
        """Apply the norm's own parameters to what ``bare`` returned."""

    @property
    @abc.abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """The norm's own parameters."""

    @abc.abstractmethod
    def holding(self, parameters: tuple[Tensor, ...]) -> AbstractNorm:
        """Return the same norm with other parameters, in the order of ``parameters``."""


@dataclass(frozen=True)
class RootMeanSquare(AbstractNorm):
    """``x / rms(x) * gain``; in low precision rounded before the gain, as Llama does it."""

    gain: Tensor
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        if hidden.dtype != torch.float32:
            return self.finish(self.bare(hidden))
        return F.rms_norm(hidden, hidden.shape[-1:], self.gain, self.eps)

    def bare(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return F.rms_norm(hidden, hidden.shape[-1:], None, self.eps)

    def finish(self, bare: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return bare * self.gain

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See :class:`AbstractNorm`."""
        return (self.gain,)

    def holding(self, parameters: tuple[Tensor, ...]) -> RootMeanSquare:
        """See :class:`AbstractNorm`."""
        return replace(self, gain=parameters[0])


@dataclass(frozen=True)
class OffsetRootMeanSquare(AbstractNorm):
    """``x / rms(x) * (1 + gain)`` in float32, rounded once at the end, as Gemma has it."""

    gain: Tensor
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return self.finish(self.bare(hidden))

    def bare(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`: stays in float32."""
        return F.rms_norm(hidden.float(), hidden.shape[-1:], None, self.eps)

    def finish(self, bare: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return torch.addcmul(bare, bare, self.gain.float()).to(self.gain.dtype)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See :class:`AbstractNorm`."""
        return (self.gain,)

    def holding(self, parameters: tuple[Tensor, ...]) -> OffsetRootMeanSquare:
        """See :class:`AbstractNorm`."""
        return replace(self, gain=parameters[0])


@dataclass(frozen=True)
class Centred(AbstractNorm):
    """A layer norm: ``(x - mean) / deviation * gain + shift``; both may be missing."""

    gain: Tensor | None
    shift: Tensor | None
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return F.layer_norm(hidden, hidden.shape[-1:], self.gain, self.shift, self.eps)

    def bare(self, hidden: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        return F.layer_norm(hidden, hidden.shape[-1:], None, None, self.eps)

    def finish(self, bare: Tensor) -> Tensor:
        """See :class:`AbstractNorm`."""
        scaled = bare if self.gain is None else bare * self.gain
        return scaled if self.shift is None else scaled + self.shift

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See :class:`AbstractNorm`."""
        return tuple(value for value in (self.gain, self.shift) if value is not None)

    def holding(self, parameters: tuple[Tensor, ...]) -> Centred:
        """See :class:`AbstractNorm`."""
        given = iter(parameters)
        gain = None if self.gain is None else next(given)
        shift = None if self.shift is None else next(given)
        return replace(self, gain=gain, shift=shift)


def layer_norm(module: Any) -> Centred:
    """Describe a ``torch.nn.LayerNorm``."""
    return Centred(module.weight, module.bias, module.eps)


@dataclass(frozen=True)
class Attention:
    """How queries, keys and values come about, and what queries may see.

    Parameters
    ----------
    projections : tuple of module
        Linear modules whose rows, one below the other, are those of queries, keys and values.
    output : Matrix
    heads, kv_heads, head_width : int
    scale : float
        Factor on the products of queries and keys.
    groups : int
        1 where the rows are all queries, then all keys, then all values; ``heads`` where every
        head has its query, key and value rows together.
    query_norm, key_norm : AbstractNorm, optional
        Over the width of a head, before the rotation.
    rope : str, optional
        Type under which the rotary module keeps the layer's tables, where it keeps several.
    window : int, optional
        Number of slots that a query sees, its own included; ``None`` for all.
    softcap : float, optional
        Bound ``c`` of ``c tanh(s / c)`` on scaled products ``s``.
    """

    projections: tuple[nn.Module, ...]
    output: Matrix
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    groups: int = 1
    query_norm: AbstractNorm | None = None
    key_norm: AbstractNorm | None = None
    rope: str | None = None
    window: int | None = None
    softcap: float | None = None


class AbstractFeedForward(abc.ABC):
    """What a layer does to each token on its own."""

    @abc.abstractmethod
    def __call__(self, product: Product, states: Tensor) -> Tensor:
        """Map ``states [batch, n, width]`` to what is added to the residual stream."""


@dataclass(frozen=True)
class Gated(AbstractFeedForward):
    """``down(activation(gate(x)) * up(x))``."""

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: Callable[[Tensor], Tensor]

    def __call__(self, product: Product, states: Tensor) -> Tensor:
        """See :class:`AbstractFeedForward`."""
        gated = self.activation(product(states, self.gate)) * product(states, self.up)
        return product(gated, self.down)


@dataclass(frozen=True)
class TwoLayers(AbstractFeedForward):
    """``outer(activation(inner(x)))``."""

    inner: Matrix
    outer: Matrix
    activation: Callable[[Tensor], Tensor]

    def __call__(self, product: Product, states: Tensor) -> Tensor:
        """See :class:`AbstractFeedForward`."""
        return product(self.activation(product(states, self.inner)), self.outer)


@dataclass(frozen=True)
class Layer:
    """A pre-norm decoder layer.

    Parameters
    ----------
    norm : AbstractNorm
        In front of attention.
    attention : Attention
    feedforward_norm : AbstractNorm, optional
        In front of the feed-forward part; ``None`` where that shares ``norm``'s output.
    feedforward : AbstractFeedForward
    parallel : bool
        The feed-forward part reads the layer's input, not what attention made of it.
    attention_post, feedforward_post : AbstractNorm, optional
        On what each part adds to the residual stream.
    """

    norm: AbstractNorm
    attention: Attention
    feedforward_norm: AbstractNorm | None
    feedforward: AbstractFeedForward
    parallel: bool = False
    attention_post: AbstractNorm | None = None
    feedforward_post: AbstractNorm | None = None


def window(config: Any, index: int) -> int | None:
    """Return the width of a layer's sliding window, if it has one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "use_sliding_window", True)
    else:
        slides = kinds[index] == "sliding_attention"
    width: int | None = getattr(config, "sliding_window", None)
    return width if slides else None


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width
