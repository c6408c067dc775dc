"""Exits of an encoder: one linear classifier and one probe after each of some layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive._device import follow
from adaptive._encoders import encoder_layers
from adaptive._exits import ExitsRecord, layer_counts
from adaptive._exits_files import ExitsFiles
from adaptive._fingerprint import lineage, related, tensors_fingerprint
from adaptive.calibration import InvalidArgumentError
from adaptive.policies._hub import pushed

_FILES = ExitsFiles(
    "classifier_exits.json", "classifier_exits.safetensors", noun="classifier exits"
)
_attached: weakref.WeakKeyDictionary[PreTrainedModel, ClassifierExits] = weakref.WeakKeyDictionary()


class ClassifierExits(nn.Module):
    """Exits after chosen layers of a classification model.

    An exit reads the hidden state of the first position beside the mean over all positions that
    are not padding. A linear classifier gives its answer, a linear probe the logit of that answer
    being the full model's.

    Parameters
    ----------
    layers : sequence of int
        Number of layers below each exit, ascending, each in 1..L-1.
    width : int
        Width of the encoder.
    classes : int
        Number of classes.
    record : ExitsRecord
        Model they belong to, hashes of the units that shaped them, training settings.

    Attributes
    ----------
    weight, bias : Tensor, float32 [n_exits, classes, 2 width] and [n_exits, classes]
    probe_weight, probe_bias : Tensor, float32 [n_exits, 2 width] and [n_exits]
    """

    def __init__(
        self, layers: Sequence[int], width: int, *, classes: int, record: ExitsRecord
    ) -> None:
        super().__init__()
        self.layers = tuple(int(layer) for layer in layers)
        self.record = record
        count = len(self.layers)
        self.weight = nn.Parameter(torch.zeros(count, classes, 2 * width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(count, classes), requires_grad=False)
        self.probe_weight = nn.Parameter(torch.zeros(count, 2 * width), requires_grad=False)
        self.probe_bias = nn.Parameter(torch.zeros(count), requires_grad=False)

    @property
    def width(self) -> int:
        """Width of the encoder."""
        return self.weight.shape[2] // 2

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[1]

    def logits(self, exit: int, summary: Tensor) -> Tensor:
        """Answer of an exit, float32 [rows, classes], from ``summary [rows, 2 width]``."""
        found: Tensor = summary @ self.weight[exit].T + self.bias[exit]
        return found

    def probe(self, exit: int, summary: Tensor) -> Tensor:
        """Logit of agreement with the full model, float32 [rows]."""
        found: Tensor = summary @ self.probe_weight[exit] + self.probe_bias[exit]
        return found

    def fingerprint(self) -> str:
        """Hash places and weights."""
        return f"{'-'.join(map(str, self.layers))}:{tensors_fingerprint(self.named_parameters())}"

    def attach(self, model: PreTrainedModel) -> Self:
        """Give these exits to a model; they are remembered beside it, the model does not change.

        Raises
        ------
        InvalidArgumentError
            If they belong to another model.
        """
        encoder_layers(model)
        if not related(self.record.model, lineage(model)):
            raise InvalidArgumentError(
                "exits",
                f"exits of model {self.record.model}",
                f"exits of this model in any precision, {lineage(model)}",
            )
        _attached[model] = self.to(model.device)
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write JSON and safetensors into ``directory``, beside the model."""
        config = {"layers": list(self.layers), "width": self.width, "classes": self.classes}
        _FILES.write(directory, config | {"record": asdict(self.record)}, self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload exits",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository on the hub, made if need be.

        Parameters
        ----------
        repo_id : str
            ``namespace/name``, such as that of the model.
        private, token, revision, create_pr, commit_message
            As for models in transformers; ``revision`` is the branch that is written to.

        Returns
        -------
        str
            Address of the commit.
        """
        return pushed(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **download: Any,
    ) -> Self:
        """Read exits saved by :meth:`save_pretrained` or uploaded by ``push_to_hub``.

        Parameters
        ----------
        directory : str or Path
            A directory, or ``namespace/name`` of a repository on the hub.
        revision, token, **download
            As for :meth:`adaptive.Exits.from_pretrained`.

        Raises
        ------
        CertificateError
            If there are none, or they are damaged or of an unknown schema.
        """
        return _FILES.read(directory, cls._built, revision=revision, token=token, **download)

    @classmethod
    def _built(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        record = ExitsRecord.from_dict(config["record"])
        exits = cls(config["layers"], config["width"], classes=config["classes"], record=record)
        exits.load_state_dict(weights)
        return exits

    @staticmethod
    def of(model: PreTrainedModel) -> ClassifierExits | None:
        """Return a model's exits: attached ones, or those saved where it was loaded from."""
        if model not in _attached:
            home = getattr(model.config, "_name_or_path", "")
            if not _FILES.beside(home):
                return None
            ClassifierExits.from_pretrained(home).attach(model)
        follow(_attached[model], model.device)
        return _attached[model]


def untrained_exits(model: PreTrainedModel, layers: Sequence[int] | None) -> ClassifierExits:
    """Return exits of zeros after some layers, by default a quarter, a half, three quarters.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a layer is out of range, or no integer.
    """
    total = encoder_layers(model)
    if total < 2:
        raise InvalidArgumentError("model", "one layer", "a model of at least two layers")
    chosen = layer_counts(layers, total)
    config: Any = model.config
    record = ExitsRecord(model=lineage(model))
    return ClassifierExits(chosen, config.hidden_size, classes=config.num_labels, record=record)
