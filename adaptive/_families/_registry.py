"""The families that are known."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from adaptive._families import _gemma, _gpt2, _gpt_neox, _llama, _opt, _phi, _phi3
from adaptive._families._family import Family
from adaptive._families._replayed import REPLAYED
from adaptive.calibration import UnsupportedError

#: A new family is one file beside this one and one row in ``tests/contract/test_families.py``, or
#: one row of ``REPLAYED``.
FAMILIES: tuple[Family, ...] = (
    _llama.LLAMA,
    _phi.PHI,
    _phi3.PHI3,
    _gemma.GEMMA,
    _gemma.GEMMA2,
    _gemma.GEMMA3,
    _gpt2.GPT2,
    _opt.OPT,
    _gpt_neox.GPT_NEOX,
    *REPLAYED,
)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises
    ------
    UnsupportedError
        If the model is an encoder-decoder, of a family without a row in ``FAMILIES`` or built
        otherwise; the message names what is missing.
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
            _require_head(model)
            _refuse_stray_window(model, config)
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedError(
        f"model family {model_type!r} is not known: missing are the path of its layers and of "
        "the modules between "
        f"them and the head (a `Family` in a file under adaptive/_families/). Known: {known}"
    )


def layers_of(model: nn.Module) -> list[Any]:
    """Return the decoder layers that run, in order: modules whose parts differ by family."""
    layers = attrgetter(family_of(model).layers)(model)
    config: Any = model.config
    return list(layers)[: config.num_hidden_layers]


def _require_head(model: Any) -> None:
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no output head: load it as a causal language model"
        )
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedError(
            f"the output head of {type(model).__name__} is a {type(head).__name__} without a "
            "tensor `weight`: exits read the head's rows. Leave the head as it was loaded "
            "(quantise the layers only)"
        )


def _refuse_stray_window(model: nn.Module, config: Any) -> None:
    """Refuse a window that transformers' cache reads off the config, and the layers do not know."""
    kind = type(config)
    for name in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, name, None)
        if width is None or hasattr(kind, name):
            continue
        if name not in inspect.signature(kind).parameters:  # of a configuration of another make
            raise UnsupportedError(
                f"the config of {type(model).__name__} says `{name}={width}`, which its layers "
                f"({config.model_type!r}) do not know: they see the whole prompt, and "
                "`model.generate` then drops keys from its cache all the same. Set "
                f"`model.config.{name} = None`"
            )


def _require(model: nn.Module, path: str, model_type: str) -> None:
    try:
        attrgetter(path)(model)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(model).__name__} is of family {model_type!r} but has no `{path}` ({error}): "
            "it may be wrapped (unwrap it) or built differently (add a `Family`)"
        ) from error
