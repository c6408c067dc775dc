"""What the library must know of a model family: where its layers are, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adaptive._families._layer import Layer

#: Input of layer 0, ``[batch, n, width]``, from tokens and positions, int64 ``[batch, n]`` each.
Embed = Callable[[Tensor, Tensor], Tensor]


def _plain_embedding(model: Any) -> Embed:
    """Embed tokens, and nothing else."""
    embedding: nn.Module = model.get_input_embeddings()
    return lambda tokens, positions: embedding(tokens)


def _refuse_nothing(config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Native:
    """The inside of a family's layers, for the native tier.

    Parameters
    ----------
    layer : callable
        ``layer(module, index, config)`` describes the decoder layer ``module``.
    rotary : str, optional
        Dotted path of the module with the rotary tables; ``None`` where there are none.
    embed : callable
        ``embed(model)`` returns how tokens and positions become layer 0's input.
    refuse : callable
        ``refuse(config)`` says why a model of the family must stay on the generic tier, or
        returns ``None``.
    """

    layer: Callable[[Any, int, Any], Layer]
    rotary: str | None = "model.rotary_emb"
    embed: Callable[[Any], Embed] = _plain_embedding
    refuse: Callable[[Any], str | None] = _refuse_nothing


@dataclass(frozen=True)
class Family:
    """Paths into a causal language model of one family.

    Parameters
    ----------
    model_types : tuple of str
        ``config.model_type`` values that belong to the family.
    layers : str
        Dotted path to the list of decoder layers.
    norms : tuple of str
        Dotted paths of the modules between the last layer and the head, in order; one that is
        ``None`` on the model (OPT's optional ones) is passed over.
    native : Native, optional
        What the native tier must know; ``None`` leaves the family to the generic tier.
    softcap : str, optional
        Name of the config field with the cap on the final logits.
    factor, divisor : str, optional
        Name of the config field that the head's products are multiplied with, or divided by.
    """

    model_types: tuple[str, ...]
    layers: str
    norms: tuple[str, ...]
    native: Native | None = None
    softcap: str | None = None
    factor: str | None = None
    divisor: str | None = None
