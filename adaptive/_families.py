"""What the library must know of a model family: its layers, and how it reads them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive.calibration import UnsupportedError


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
    softcap : str, optional
        Name of the config field with the cap on the final logits.
    native : bool
        Whether the pre-norm executor of :mod:`adaptive._native` knows the layer's inside.
    """

    model_types: tuple[str, ...]
    layers: str
    norms: tuple[str, ...]
    softcap: str | None = None
    native: bool = False


#: A new family is one row here and one row in ``tests/contract/test_families.py``.
FAMILIES: tuple[Family, ...] = (
    Family(("llama", "qwen2", "qwen3", "mistral"), "model.layers", ("model.norm",), native=True),
    Family(("phi",), "model.layers", ("model.final_layernorm",)),
    Family(("phi3",), "model.layers", ("model.norm",)),
    Family(("gemma",), "model.layers", ("model.norm",)),
    Family(
        ("gemma2", "gemma3_text"),
        "model.layers",
        ("model.norm",),
        softcap="final_logit_softcapping",
    ),
    Family(("gpt2",), "transformer.h", ("transformer.ln_f",)),
    Family(
        ("opt",),
        "model.decoder.layers",
        ("model.decoder.final_layer_norm", "model.decoder.project_out"),
    ),
    Family(("gpt_neox",), "gpt_neox.layers", ("gpt_neox.final_layer_norm",)),
)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises
    ------
    UnsupportedError
        If the model is an encoder-decoder or of a family without a row in ``FAMILIES``; the
        message names what is missing.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no `config.model_type`: exits need a Hugging Face "
            "causal language model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{model_type!r} is an encoder-decoder: only decoder-only models are supported"
        )
    for family in FAMILIES:
        if model_type in family.model_types:
            for path in (family.layers, *family.norms):
                _require(model, path, model_type)
            if model.get_output_embeddings() is None:  # type: ignore[operator]
                raise UnsupportedError(
                    f"{type(model).__name__} has no output head: load it as a causal language model"
                )
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedError(
        f"model family {model_type!r} is not known: missing are the path of its layers and of "
        "the modules between "
        f"them and the head (a `Family` row in adaptive/_families.py). Known: {known}"
    )


def layers_of(model: nn.Module) -> list[Any]:
    """Return the decoder layers that run, in order: modules whose parts differ by family."""
    layers = attrgetter(family_of(model).layers)(model)
    config: Any = model.config
    return list(layers)[: config.num_hidden_layers]


class Readout:
    """A model's own way from the last layer's output to logits: norms, head, soft-cap."""

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model)
        found = (attrgetter(path)(model) for path in family.norms)
        self._norms = [module for module in found if module is not None]
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        self._cap = getattr(model.config, family.softcap) if family.softcap else None

    @property
    def device(self) -> torch.device:
        """Where the head's weights are."""
        found: torch.device = self._head.weight.device
        return found

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of hidden states ``[..., width]``."""
        return self._capped(self._head(self._normed(hidden)))

    def over(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a readout over the ``kept`` rows of the head, gathered once."""
        weight = self._head.weight[kept]
        bias = None if self._head.bias is None else self._head.bias[kept]
        return lambda hidden: self._capped(F.linear(self._normed(hidden), weight, bias))

    def at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits ``[batch, n]`` of tokens ``ids [batch, n]`` for ``hidden [batch, width]``.

        Only those rows of the head are read.
        """
        rows = self._head.weight[ids]
        logits = (rows @ self._normed(hidden)[..., None])[..., 0]
        if self._head.bias is not None:
            logits = logits + self._head.bias[ids]
        return self._capped(logits)

    def _normed(self, hidden: Tensor) -> Tensor:
        for norm in self._norms:
            hidden = norm(hidden)
        return hidden

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap


def _require(model: nn.Module, path: str, model_type: str) -> None:
    try:
        attrgetter(path)(model)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(model).__name__} is of family {model_type!r} but has no `{path}` ({error}): "
            "it may be wrapped (unwrap it) or built differently (add a `Family` row)"
        ) from error
