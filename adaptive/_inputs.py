"""Datasets in every form users have them, turned into units: prompts as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adaptive._fingerprint import tokens_hash
from adaptive.calibration import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import label_array

#: Columns in which a prompt is looked for, in this order.
_PROMPT_KEYS = ("prompt", "text", "messages", "input_ids")


@dataclass(frozen=True)
class Units:
    """Prompts as independent units.

    Parameters
    ----------
    prompts : tuple of tuple of int
        Token ids, at least one each.
    ids : tuple of str
        Hash of each prompt's tokens; equal prompts have equal ids.
    references : tuple, optional
        Token ids of the given continuations, ``None`` where there is none.
    groups : ndarray [n_units], optional
        Cluster of each unit.
    """

    prompts: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...]
    references: tuple[tuple[int, ...] | None, ...]
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index: Sequence[int] | NDArray[np.intp]) -> Units:
        """Return the units at these positions, in this order."""
        chosen = [int(i) for i in index]
        return Units(
            prompts=tuple(self.prompts[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            references=tuple(self.references[i] for i in chosen),
            groups=None if self.groups is None else self.groups[chosen],
        )

    def distinct(self) -> Units:
        """Return the units without repetitions of a prompt, the first of each kept."""
        first: dict[str, int] = {}
        for i, name in enumerate(self.ids):
            first.setdefault(name, i)
        return self.select(list(first.values()))


def read_units(
    dataset: Any,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    column: str | None = None,
    groups: Sequence[Any] | str | None = None,
) -> Units:
    """Turn a dataset into units.

    Parameters
    ----------
    dataset : iterable
        Strings; chat conversations (lists of ``{"role", "content"}``, the tokenizer's template is
        applied); a ``datasets.Dataset``; a DataLoader of tokenised batches (``input_ids`` and
        ``attention_mask``); or dicts with one of the keys prompt, text, messages, input_ids, and
        optionally ``continuation``.
    model : PreTrainedModel
        Where a tokenizer is looked for if none is given.
    tokenizer : PreTrainedTokenizerBase, optional
    column : str, optional
        Key or column of the prompt.
    groups : sequence or str, optional
        Cluster of each unit, or the key it is found under.

    Raises
    ------
    InvalidArgumentError
        If the dataset is empty, a prompt is empty, or ``groups`` has another length.
    InvalidTypeError
        If an item is none of the above; the message gives its position and type.
    """
    if isinstance(dataset, str | bytes | Mapping):
        raise InvalidTypeError(
            "dataset", dataset, "a list of prompts (or a dataset), not a single item"
        )
    if not isinstance(dataset, Iterable):
        raise InvalidTypeError("dataset", dataset, "an iterable of prompts")
    reader = _Reader(model, tokenizer, column)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts: list[tuple[int, ...]] = []
    references: list[tuple[int, ...] | None] = []
    labels: list[Any] = []
    for position, item in enumerate(dataset):
        for prompt, reference, label in reader.read(
            item, position, groups if isinstance(groups, str) else None
        ):
            if not prompt:
                raise InvalidArgumentError(
                    "dataset",
                    f"an empty prompt at position {position}",
                    "prompts of at least one token",
                )
            outside = [token for token in prompt if not 0 <= token < vocabulary]
            if outside:
                raise InvalidArgumentError(
                    "dataset",
                    f"token {outside[0]} at position {position}",
                    f"token ids in 0..{vocabulary - 1}, the model's vocabulary",
                )
            prompts.append(prompt)
            references.append(reference)
            labels.append(label)
    if not prompts:
        raise InvalidArgumentError("dataset", "no prompts", "at least one prompt")
    if groups is not None and not isinstance(groups, str):
        labels = list(label_array(groups))
        if len(labels) != len(prompts):
            raise InvalidArgumentError(
                "groups", f"{len(labels)} values", f"one per prompt, {len(prompts)}"
            )
    return Units(
        prompts=tuple(prompts),
        ids=tuple(tokens_hash(prompt) for prompt in prompts),
        references=tuple(references),
        groups=None if groups is None else np.asarray(labels),
    )


class _Reader:
    """Reads one item of a dataset; the tokenizer is looked for when a text first needs it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, column: str | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._column = column

    def read(
        self, item: Any, position: int, group_key: str | None
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None, Any]]:
        """Yield (prompt, reference, group) of every unit in an item; a batch holds several."""
        if isinstance(item, Mapping):
            value = self._value(item, position)
            if group_key is not None and group_key not in item:
                raise _no_group(group_key, position, f"has {sorted(item)}")
            label = item[group_key] if group_key else None
            if _is_batch(value):
                rows = list(_unpadded(value, item.get("attention_mask"), position))
                labels = [None] * len(rows) if group_key is None else _plain_list(label)
                if len(labels) != len(rows):
                    raise InvalidArgumentError(
                        "groups", f"{len(labels)} values", f"one per row of item {position}"
                    )
                for prompt, own in zip(rows, labels, strict=True):
                    yield prompt, None, own
                return
            given = item.get("continuation")
            reference = None if given is None else self._reference(given, position)
            yield self.tokens(value, position), reference, label
        elif group_key is not None:
            raise _no_group(group_key, position, f"is a {type(item).__name__}")
        elif _is_batch(item):
            for prompt in _unpadded(item, None, position):
                yield prompt, None, None
        else:
            yield self.tokens(item, position), None, None

    def tokens(self, value: Any, position: int) -> tuple[int, ...]:
        """Token ids of one prompt."""
        if isinstance(value, str):
            return tuple(self.tokenizer(value)["input_ids"])
        if isinstance(value, Tensor | np.ndarray):
            value = value.tolist()
        if (
            isinstance(value, Sequence)
            and value
            and all(isinstance(turn, Mapping) for turn in value)
        ):
            if not self.tokenizer.chat_template:
                raise InvalidArgumentError(
                    "tokenizer", "one without", "a tokenizer with a chat template"
                )
            ids = self.tokenizer.apply_chat_template(
                list(value), add_generation_prompt=True, return_dict=False
            )
            return tuple(int(token) for token in ids)
        if _are_tokens(value):
            return tuple(int(token) for token in value)
        raise InvalidTypeError(
            "dataset",
            value,
            f"strings, chats or token ids; item {position} is of type {type(value).__name__}",
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The given tokenizer, or the one saved beside the model."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._model)
        return self._tokenizer

    def _reference(self, value: Any, position: int) -> tuple[int, ...]:
        """Token ids of a given continuation, which starts in the middle of a text."""
        if isinstance(value, str):
            return tuple(self.tokenizer(value, add_special_tokens=False)["input_ids"])
        value = _plain_list(value)
        if not _are_tokens(value):
            raise InvalidTypeError(
                "dataset", value, f"a text or token ids as `continuation` of item {position}"
            )
        return tuple(int(token) for token in value)

    def _value(self, item: Mapping[str, Any], position: int) -> Any:
        keys = (self._column,) if self._column is not None else _PROMPT_KEYS
        for key in keys:
            if key in item:
                return item[key]
        raise InvalidArgumentError(
            "dataset",
            f"item {position} with keys {sorted(item)}",
            f"one of the keys {', '.join(map(str, keys))} (or name it: column=...)",
        )


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved where the model was loaded from.

    Raises
    ------
    InvalidArgumentError
        If there is none; pass ``tokenizer=``.
    """
    name = getattr(model.config, "_name_or_path", "")
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            "tokenizer", None, f"the model's tokenizer (none found at {name!r}): pass tokenizer="
        ) from error
    return found


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 2


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(token, int | np.integer) for token in value
    )


def _plain_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def _no_group(key: str, position: int, found: str) -> InvalidArgumentError:
    return InvalidArgumentError("groups", key, f"a key of every item; item {position} {found}")


def _unpadded(ids: Any, mask: Any, position: int) -> Iterator[tuple[int, ...]]:
    rows = torch.as_tensor(ids)
    if rows.is_floating_point():
        raise InvalidTypeError("dataset", ids, f"token ids; item {position} holds {rows.dtype}")
    kept = torch.ones_like(rows) if mask is None else torch.as_tensor(mask)
    if kept.shape != rows.shape:
        raise InvalidArgumentError(
            "dataset",
            f"an attention_mask of shape {tuple(kept.shape)} in item {position}",
            f"as `input_ids`, of shape {tuple(rows.shape)}",
        )
    for row, real in zip(rows, kept, strict=True):
        yield tuple(int(token) for token in row[real.bool()])


def batches(
    units: Units, *, size: int, pad: int, device: torch.device
) -> Iterator[tuple[NDArray[np.intp], Tensor, Tensor]]:
    """Left-padded batches of prompts of similar length.

    Yields
    ------
    index : ndarray [batch]
        Positions of the rows among the units.
    input_ids, attention_mask : Tensor, int64 [batch, longest]
    """
    order = np.argsort([len(prompt) for prompt in units.prompts], kind="stable")
    for start in range(0, len(order), size):
        index = order[start : start + size]
        rows = [units.prompts[i] for i in index]
        longest = max(map(len, rows))
        ids = torch.tensor(
            [[pad] * (longest - len(row)) + list(row) for row in rows], device=device
        )
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
        )
        yield index, ids, mask


def texts_batch(
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Texts without their last token, prompts ending at the same slot; and the prompts' mask."""
    prompt = max(len(p) for p, _ in pairs)
    count = max(len(t) for _, t in pairs) - 1
    ids = torch.zeros(len(pairs), prompt + count, dtype=torch.int64)
    mask = torch.ones(len(pairs), prompt, dtype=torch.int64)
    for row, (p, t) in enumerate(pairs):
        ids[row, prompt - len(p) : prompt + len(t) - 1] = torch.tensor((*p, *t[:-1]))
        mask[row, : prompt - len(p)] = 0
    return ids.to(device), mask.to(device)
