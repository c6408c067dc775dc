"""Datasets of a classifier in every form users have, turned into units: inputs with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from adaptive._rows import Batch, count_rows, is_frame, join_rows, row_hashes, take_rows
from adaptive._stages import AbstractStages
from adaptive.calibration import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import label_array

#: Columns in which labels and texts are looked for, in this order.
_LABELS = ("label", "labels", "y", "target")
_TEXTS = ("text", "sentence")
_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "pixel_values",
)


@dataclass(frozen=True)
class Examples:
    """Inputs as independent units.

    Parameters
    ----------
    inputs : Batch
        One row per unit.
    ids : tuple of str
        Hash of each row; equal rows have equal ids.
    labels : ndarray of int64 [n_units], optional
    groups : ndarray [n_units], optional
        Cluster of each unit.
    """

    inputs: Batch
    ids: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Sequence[int] | NDArray[np.intp]) -> Examples:
        """Return the units at these positions, in this order."""
        chosen = np.asarray(index, dtype=np.int64)
        return Examples(
            inputs=take_rows(self.inputs, torch.from_numpy(chosen)),
            ids=tuple(self.ids[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
        )

    def distinct(self) -> Examples:
        """Return the units without repetitions of an input, the first of each kept."""
        first: dict[str, int] = {}
        for i, name in enumerate(self.ids):
            first.setdefault(name, i)
        return self if len(first) == len(self) else self.select(list(first.values()))


def read_examples(
    dataset: Any,
    *,
    stages: AbstractStages,
    column: str | None = None,
    groups: Sequence[Any] | str | None = None,
) -> Examples:
    """Turn a dataset into units.

    Parameters
    ----------
    dataset
        ``(inputs, labels)``, or inputs alone: a tensor, an array, a mapping of these, a list of
        rows or texts; a ``datasets.Dataset``, a list of dicts or a pandas DataFrame with a column
        ``label`` or ``labels`` if there are labels; a DataLoader of ``(inputs, labels)``, of dicts,
        or of inputs; a list, or a ``torch.utils.data.Dataset``, of ``(input, label)`` pairs.
    stages : AbstractStages
        What the rows are for.
    column : str, optional
        Column of the inputs.
    groups : sequence or str, optional
        Cluster of each unit, or the column it is found in.

    Raises
    ------
    InvalidArgumentError
        If the dataset is empty, labels are not whole numbers from 0 on, or lengths differ.
    InvalidTypeError
        If it is none of the above.
    """
    key = groups if isinstance(groups, str) else None
    parts = [_named(part, stages, column, key) for part in _parts(dataset)]
    if not parts or all(count_rows(inputs) == 0 for inputs, _, _ in parts):
        raise InvalidArgumentError("dataset", "no rows", "at least one row")
    inputs = join_rows([part[0] for part in parts])
    labels = _joined("labels", [part[1] for part in parts])
    found = Examples(inputs, row_hashes(inputs))
    if labels is not None:
        found = replace(found, labels=_class_indices(labels, len(found)))
    clusters = _joined("groups", [part[2] for part in parts]) if key else groups
    if clusters is not None:
        clusters = label_array(clusters)
        if clusters.shape != (len(found),):
            raise InvalidArgumentError(
                "groups", f"{len(clusters)} values", f"one per row, {len(found)}"
            )
        found = replace(found, groups=clusters)
    return found


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield pieces: mappings of columns, ``(inputs, labels)`` pairs, or inputs."""
    if isinstance(dataset, str | bytes):
        raise InvalidTypeError("dataset", dataset, "a set of inputs, not a single one")
    if isinstance(dataset, DataLoader):
        for item in dataset:  # which makes lists of tuples
            alone = isinstance(item, list) and len(item) == 1 and isinstance(item[0], Tensor)
            pair = isinstance(item, list) and len(item) == 2 and isinstance(item[1], Tensor)
            yield item[0] if alone else tuple(item) if pair else item
        return
    if hasattr(dataset, "column_names") and hasattr(dataset, "features"):  # datasets.Dataset
        yield {name: dataset[name][:] for name in dataset.column_names}
        return
    if isinstance(dataset, tuple | Tensor | np.ndarray | Mapping) or is_frame(dataset):
        yield dataset
        return
    rows = _listed(dataset)
    if rows and all(isinstance(row, Mapping) for row in rows):
        keys = set(rows[0])
        for place, row in enumerate(rows):
            if set(row) != keys:
                raise InvalidArgumentError(
                    "dataset", f"row {place} with columns {sorted(row)}", f"of {sorted(keys)}"
                )
        yield {name: [row[name] for row in rows] for name in rows[0]}
    elif rows and all(isinstance(row, tuple) and len(row) == 2 for row in rows):
        yield _stacked([row[0] for row in rows]), [row[1] for row in rows]
    else:
        yield _stacked(rows)


def _listed(dataset: Any) -> list[Any]:
    if isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        return list(dataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return [dataset[i] for i in range(len(dataset))]
    raise InvalidTypeError(
        "dataset", dataset, "inputs, (inputs, labels), a dataset or a DataLoader"
    )


def _stacked(rows: list[Any]) -> Batch:
    """Rows of the same shape as one tensor or array; anything else as a list."""
    if rows and all(isinstance(row, Tensor) for row in rows) and len({r.shape for r in rows}) == 1:
        return torch.stack(rows)
    if rows and all(isinstance(row, np.ndarray) for row in rows):
        if len({row.shape for row in rows}) == 1:
            return np.stack(rows)
    return rows


def _named(
    part: Any, stages: AbstractStages, column: str | None, group_key: str | None
) -> tuple[Batch, Any, Any]:
    """Take a piece apart: inputs in the form of the model's units, labels, clusters."""
    labels = clusters = None
    inputs = part
    if isinstance(part, tuple) and len(part) == 2 and not isinstance(part[1], str):
        inputs, labels = part
    if isinstance(inputs, Mapping) or is_frame(inputs):
        columns = dict(inputs.items())
        if group_key is not None:
            if group_key not in columns:
                raise InvalidArgumentError("groups", group_key, f"one of {sorted(columns)}")
            clusters = _plain(columns.pop(group_key))
        for name in _LABELS:
            if labels is None and name in columns and name != column:
                labels = columns.pop(name)
        inputs = (
            _of_frame(inputs, columns, column) if is_frame(inputs) else _chosen(columns, column)
        )
    elif group_key is not None:
        raise InvalidArgumentError("groups", group_key, "values: these inputs have no columns")
    if labels is not None and len(labels) != count_rows(inputs):
        raise InvalidArgumentError(
            "dataset", f"{len(labels)} labels", f"one per row, {count_rows(inputs)}"
        )
    return stages.units(inputs), labels, clusters


def _of_frame(frame: Any, columns: dict[str, Any], column: str | None) -> Batch:
    """Return a table as the frame it is; a column of texts or of inputs as from any dataset."""
    if column is None and not set(columns) & {*_TEXTS, *_INPUTS}:
        return frame[list(columns)]
    return _chosen({name: values.tolist() for name, values in columns.items()}, column)


def _chosen(columns: dict[str, Any], column: str | None) -> Batch:
    """Return the column of inputs, or all columns that are inputs of a model."""
    if column is not None:
        if column not in columns:
            raise InvalidArgumentError("column", column, f"one of {sorted(columns)}")
        return _tensor(columns[column])
    named = {name: _tensor(value) for name, value in columns.items() if name in _INPUTS}
    if named:
        return named
    for name in _TEXTS:
        if name in columns:
            return columns[name]
    if len(columns) == 1:
        return _tensor(next(iter(columns.values())))
    return {name: _tensor(value) for name, value in columns.items()}


def _tensor(value: Any) -> Any:
    """Make lists of numbers tensors, where their shape is regular."""
    if isinstance(value, list) and value and not isinstance(value[0], str | Mapping):
        if isinstance(value[0], Tensor | np.ndarray):
            return _stacked(value)
        try:
            return torch.tensor(value)
        except (ValueError, TypeError):
            return value
    return value


def _joined(name: str, parts: list[Any]) -> NDArray[Any] | None:
    given = [part is not None for part in parts]
    if not any(given):
        return None
    if not all(given):
        raise InvalidArgumentError("dataset", f"{name} in some parts only", f"{name} for all rows")
    return np.concatenate([np.asarray(_plain(part)) for part in parts])


def _plain(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _class_indices(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Check labels: one class index per row."""
    if labels.shape != (count,):
        raise InvalidArgumentError("dataset", f"labels of shape {labels.shape}", f"({count},)")
    if labels.dtype.kind not in "iub":
        raise InvalidTypeError("dataset", labels[:3], "labels that are whole class numbers")
    if (labels.astype(np.int64) < 0).any():
        raise InvalidArgumentError("dataset", int(labels.min()), "labels of 0, 1, 2, ...")
    return labels.astype(np.int64)
