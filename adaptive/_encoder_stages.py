"""An encoder with exits, as a classifier that answers in stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._classifier_exits import ClassifierExits
from adaptive._encoders import EncoderRun, check_inputs, encoder_family, encoder_layers
from adaptive._fingerprint import model_fingerprint
from adaptive._inputs import tokenizer_of
from adaptive._rows import Batch
from adaptive._settings import tokenizer_fingerprints
from adaptive._stages import AbstractStages, StageOutput, Steps
from adaptive.calibration import InvalidArgumentError, InvalidTypeError


@dataclass(frozen=True)
class EncoderStages(AbstractStages):
    """Layers of an encoder, with exits after some of them.

    Parameters
    ----------
    model : PreTrainedModel
    exits : ClassifierExits, optional
        Without any, only the full depth answers.
    tokenizer : PreTrainedTokenizerBase, optional
        For inputs that are texts; by default the one saved beside the model.
    """

    model: PreTrainedModel
    exits: ClassifierExits | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def device(self) -> torch.device:
        """The model's."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        """The model's."""
        return str(self.model.dtype).removeprefix("torch.")

    def run(self, batch: Batch, *, asked: Sequence[int]) -> Steps:
        """Run the layers up to the next exit that is asked, and in the end the model's head."""
        run = EncoderRun(self.model, batch)
        done = 0
        for exit, layer in enumerate(() if self.exits is None else self.exits.layers):
            if exit not in asked:
                yield None
                continue
            assert self.exits is not None
            run.forward(done, layer)
            done = layer
            summary = run.summary()
            keep = yield StageOutput(
                self.exits.logits(exit, summary), run.first(), self.exits.probe(exit, summary)
            )
            if keep is not None:
                run.keep(keep)
        run.forward(done, encoder_layers(self.model))
        yield StageOutput(run.logits(), run.first())

    def units(self, inputs: Batch) -> Batch:
        """Texts as unpadded token rows, so that padding does not tell equal texts apart."""
        text = "input_ids" in encoder_family(self.model).inputs
        return unpadded(self._named(inputs)) if text else self._named(inputs)

    def prepared(self, inputs: Batch) -> Batch:
        """Tensors on the model's device, padded on the right."""
        named = self._named(inputs)
        check_inputs(self.model, tuple(named))
        return {key: torch.as_tensor(value).to(self.device) for key, value in named.items()}

    def fingerprints(self) -> dict[str, str]:
        """Of the model, its exits and its tokenizer where one was given."""
        found = {"model": model_fingerprint(self.model)}
        if self.exits is not None:
            found["exits"] = self.exits.fingerprint()
        if self.tokenizer is not None:
            found |= tokenizer_fingerprints(self.tokenizer)
        return found

    @property
    def steps(self) -> str:
        """Layers of the encoder."""
        return "layers"

    def depths(self, stages: NDArray[np.int64]) -> NDArray[np.float64]:
        """Count of layers run."""
        exits = () if self.exits is None else self.exits.layers
        depth = np.array([*exits, encoder_layers(self.model)], dtype=np.float64)
        found: NDArray[np.float64] = depth[stages]
        return found

    def _named(self, inputs: Batch) -> dict[str, Any]:
        """Put inputs under their names, rectangular."""
        main = encoder_family(self.model).inputs[0]
        if isinstance(inputs, Mapping):
            inputs = {key: inputs[key] for key in inputs}
            ragged = main == "input_ids" and not _rectangular(inputs.get(main))
            return self._padded(_rows_of(inputs)) if ragged else inputs
        if isinstance(inputs, Tensor | np.ndarray):
            return {main: inputs}
        rows = list(inputs) if isinstance(inputs, Sequence) and len(inputs) else None
        if rows is None or isinstance(inputs, str):
            raise InvalidTypeError("batch", inputs, "inputs of at least one row")
        if main != "input_ids":
            stacked = [row[main] if isinstance(row, Mapping) else row for row in rows]
            return {main: torch.stack([torch.as_tensor(row) for row in stacked])}
        if all(isinstance(row, str) for row in rows):
            tokenizer = tokenizer_of(self.model) if self.tokenizer is None else self.tokenizer
            return self._padded(_rows_of(dict(tokenizer(rows))))
        if all(isinstance(row, Mapping) for row in rows):
            return self._padded([dict(row) for row in rows])
        return self._padded([{main: row} for row in rows])

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        config: Any = self.model.config
        lengths = [len(row["input_ids"]) for row in rows]
        longest, limit = max(lengths), longest_text(self.model)
        if longest > limit:
            raise InvalidArgumentError(
                "batch",
                f"{longest} tokens in row {lengths.index(longest)}",
                f"texts of at most {limit} tokens, the model's positions (cut them beforehand)",
            )
        found: dict[str, Any] = {}
        for key in rows[0]:
            fill = (config.pad_token_id or 0) if key == "input_ids" else 0
            padded = [[*map(int, row[key]), *[fill] * (longest - len(row[key]))] for row in rows]
            found[key] = torch.tensor(padded)
        if "attention_mask" not in found:
            places = torch.arange(longest)
            found["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
        return found


def unpadded(named: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Rows of a padded text batch without their padding and without the mask."""
    ids = torch.as_tensor(named["input_ids"])
    mask = torch.as_tensor(named.get("attention_mask", torch.ones_like(ids))).bool()
    others = [key for key in named if key != "attention_mask"]
    rows = []
    for place in range(ids.shape[0]):
        real = mask[place]
        row = {key: torch.as_tensor(named[key])[place][real].tolist() for key in others}
        if not row["input_ids"]:
            raise InvalidArgumentError(
                "dataset", f"an empty text at position {place}", "texts of at least one token"
            )
        rows.append({key: tuple(value) for key, value in row.items()})
    return rows


def longest_text(model: PreTrainedModel) -> int:
    """Return the number of positions a text may have."""
    config: Any = model.config
    # RoBERTa counts positions from behind its padding token
    shift = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return int(config.max_position_embeddings) - shift


def _rectangular(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 2
    return False


def _rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = len(next(iter(columns.values())))
    return [{key: columns[key][i] for key in columns} for i in range(count)]
