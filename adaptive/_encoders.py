"""Hugging Face encoders with a classification head, run layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive._stages import refuse_dropout
from adaptive.calibration import InvalidArgumentError, UnsupportedError

#: Endings of the names of classes that classify whole inputs.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class EncoderFamily:
    """Paths into the classification models of one family.

    Parameters
    ----------
    model_types : tuple of str
        ``config.model_type`` values that belong to the family.
    base : str
        Attribute of the encoder without its head.
    layers : tuple of str
        Dotted paths, from the base, where releases keep the list of layers; ALBERT's is of groups
        that repeat.
    read : callable
        ``read(model, hidden)``: the model's own way from the last layer to logits.
    inputs : tuple of str
        Inputs it takes, with one row per unit.
    """

    model_types: tuple[str, ...]
    base: str
    layers: tuple[str, ...]
    read: Callable[[Any, Tensor], Tensor]
    inputs: tuple[str, ...]


def _read_bert(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.bert.pooler(hidden))
    return logits


def _read_albert(model: Any, hidden: Tensor) -> Tensor:
    pooled = model.albert.pooler_activation(model.albert.pooler(hidden[:, 0]))
    logits: Tensor = model.classifier(pooled)
    return logits


def _read_roberta(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.classifier(hidden)
    return logits


def _read_distilbert(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.classifier(torch.relu(model.pre_classifier(hidden[:, 0])))
    return logits


def _read_vit(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.vit.layernorm(hidden)[:, 0])
    return logits


_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_PLAIN = ("input_ids", "attention_mask", "position_ids")

#: A new family is one row here and one row in ``tests/contract/test_encoders.py``.
ENCODERS: tuple[EncoderFamily, ...] = (
    EncoderFamily(("bert",), "bert", ("encoder.layer",), _read_bert, _TEXT),
    EncoderFamily(("roberta", "xlm-roberta"), "roberta", ("encoder.layer",), _read_roberta, _TEXT),
    EncoderFamily(("albert",), "albert", ("encoder.albert_layer_groups",), _read_albert, _TEXT),
    EncoderFamily(("distilbert",), "distilbert", ("transformer.layer",), _read_distilbert, _PLAIN),
    EncoderFamily(("vit",), "vit", ("layers", "encoder.layer"), _read_vit, ("pixel_values",)),
)


def is_classifier(model: object) -> bool:
    """Whether a model is a Hugging Face model that classifies whole inputs."""
    return isinstance(model, PreTrainedModel) and type(model).__name__.endswith(_CLASSIFIERS)


def encoder_family(model: nn.Module) -> EncoderFamily:
    """Return the family of an encoder.

    Raises
    ------
    UnsupportedError
        If the family is unknown, the model is not a classifier, or its attention keeps no mask
        that rows can be taken from.
    InvalidArgumentError
        If the model would drop out units.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    known = ", ".join(name for family in ENCODERS for name in family.model_types)
    if not is_classifier(model):
        raise UnsupportedError(
            f"{type(model).__name__} is not a Hugging Face classification model "
            f"({' or '.join(_CLASSIFIERS)}; known families: {known})"
        )
    found = [family for family in ENCODERS if model_type in family.model_types]
    if not found:
        raise UnsupportedError(
            f"the encoder family {model_type!r} is not known: a row of `ENCODERS` in "
            f"adaptive/_encoders.py is missing. Known: {known}. Or give the model a method "
            "`stages(batch)`"
        )
    problem = getattr(config, "problem_type", None)
    if getattr(config, "num_labels", 0) < 2 or problem not in (None, "single_label_classification"):
        raise UnsupportedError(
            f"{type(model).__name__} with {getattr(config, 'num_labels', 0)} labels and "
            f"problem_type {problem!r} does not choose one of at least two classes"
        )
    if getattr(config, "is_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} is configured as a decoder")
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise UnsupportedError(
            "the masks of flex_attention cannot be cut to the rows that go on: load the model with "
            "attn_implementation='sdpa'"
        )
    refuse_dropout(model)
    return found[0]


@dataclass(frozen=True)
class _Call:
    """How a model calls its layers: hidden states, and everything beside them."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stopped(Exception):
    """The first layer was about to run; carries its arguments."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class EncoderRun:
    """One batch on its way through an encoder: hidden states, and what its layers are told.

    The model itself prepares embeddings and masks, in the way of its release and its attention
    kernel: its forward pass is stopped in front of the first layer. Nothing stays on the model.

    Parameters
    ----------
    model : PreTrainedModel
    batch : mapping
        Model inputs, one row per unit.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.family = encoder_family(model)
        self.model: Any = model
        base = getattr(model, self.family.base)
        self._layers = _layers(base, self.family)
        call = _first_call(base, self._layers[0], batch)
        self.hidden = call.hidden
        self._args, self._kwargs = call.args, call.kwargs
        #: Which positions of each row are inputs, float [rows, length]; None for all of them.
        self.real = _real(batch, self.hidden)

    def forward(self, low: int, high: int) -> None:
        """Run layers ``low`` to ``high - 1``."""
        total = self.model.config.num_hidden_layers
        share = total / len(self._layers)  # ALBERT repeats each group; elsewhere it is 1
        for index in range(low, high):
            found = self._layers[int(index / share)](self.hidden, *self._args, **self._kwargs)
            self.hidden = found[0] if isinstance(found, tuple) else found

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        before = self.hidden.shape[0]
        self._args = tuple(_cut(value, rows, before) for value in self._args)
        self._kwargs = {key: _cut(value, rows, before) for key, value in self._kwargs.items()}
        self.hidden = self.hidden[rows]
        self.real = None if self.real is None else self.real[rows]

    def first(self) -> Tensor:
        """Hidden state of the first position, which the model's own head reads [rows, width]."""
        return self.hidden[:, 0]

    def summary(self) -> Tensor:
        """First position beside the mean over all, float32 [rows, 2 width]: what exits read."""
        hidden = self.hidden.float()
        if self.real is None:
            mean = hidden.mean(dim=1)
        else:
            mean = torch.einsum("blw,bl->bw", hidden, self.real) / self.real.sum(1, keepdim=True)
        return torch.cat([hidden[:, 0], mean], dim=-1)

    def logits(self) -> Tensor:
        """Answer of the model's own head, from the last layer."""
        return self.family.read(self.model, self.hidden)


def encoder_layers(model: nn.Module) -> int:
    """Return the number of layers that run."""
    encoder_family(model)
    config: Any = model.config
    return int(config.num_hidden_layers)


def check_inputs(model: nn.Module, inputs: Sequence[str]) -> None:
    """Refuse inputs that the family does not take.

    Raises
    ------
    InvalidArgumentError
        Naming them.
    """
    taken = encoder_family(model).inputs
    foreign = sorted(set(inputs) - set(taken))
    if foreign or taken[0] not in inputs:
        raise InvalidArgumentError(
            "batch", f"inputs {sorted(inputs)}", f"`{taken[0]}` and, if needed, {taken[1:]}"
        )


def _layers(base: nn.Module, family: EncoderFamily) -> list[Any]:
    for path in family.layers:
        try:
            return list(attrgetter(path)(base))
        except AttributeError:
            continue
    raise UnsupportedError(f"{type(base).__name__} has none of {', '.join(family.layers)}")


def _first_call(base: nn.Module, layer: nn.Module, batch: Mapping[str, Tensor]) -> _Call:
    owner = threading.get_ident()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:  # another thread may be using the model as it is
            raise _Stopped(_Call(args[0], tuple(args[1:]), dict(kwargs)))

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        base(**batch)
    except _Stopped as stopped:
        return stopped.call
    finally:
        hook.remove()
    raise UnsupportedError(f"{type(base).__name__} does not call its layers in its forward pass")


def _cut(value: Any, rows: Tensor, before: int) -> Any:
    """Rows of a tensor that has one row per unit; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == before and before > 1:
        return value[rows]
    return value


def _real(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.to(hidden.device, torch.float32)
