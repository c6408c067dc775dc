"""Batches in the containers users have: their rows counted, taken, put together, named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, InvalidTypeError

#: A tensor, array or pandas frame with one row per unit, a mapping of such, or a list of anything.
Batch = Any


def is_frame(batch: Batch) -> bool:
    """Whether a batch is a pandas DataFrame; pandas is not imported to find out."""
    return hasattr(batch, "iloc") and hasattr(batch, "columns")


def count_rows(batch: Batch) -> int:
    """Return the number of rows of a batch.

    Raises
    ------
    InvalidTypeError
        If it is none of the containers that have rows.
    InvalidArgumentError
        If the entries of a mapping have different numbers of rows.
    """
    if isinstance(batch, Mapping):
        counts = {key: count_rows(value) for key, value in batch.items()}
        if len(set(counts.values())) != 1:
            raise InvalidArgumentError("batch", counts, "a mapping of entries with as many rows")
        return next(iter(counts.values()))
    if isinstance(batch, Tensor | np.ndarray) and batch.ndim > 0:
        return int(batch.shape[0])
    if is_frame(batch) or (isinstance(batch, Sequence) and not isinstance(batch, str | bytes)):
        return len(batch)
    raise InvalidTypeError(
        "batch", batch, "a tensor, an array, a mapping of these, a pandas DataFrame, or a list"
    )


def take_rows(batch: Batch, index: Tensor) -> Batch:
    """Return the rows of a batch at ``index``, int64 [n], in that order."""
    if isinstance(batch, Mapping):
        return {key: take_rows(value, index) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)]
    if isinstance(batch, np.ndarray):
        return batch[index.cpu().numpy()]
    if is_frame(batch):
        return batch.iloc[index.cpu().numpy()]
    return [batch[i] for i in index.tolist()]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose tensors are on a device; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping) and any(
        isinstance(value, Tensor) and value.device != device for value in batch.values()
    ):
        return {key: on_device(value, device) for key, value in batch.items()}
    return batch


def join_rows(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the rows of several of the same kind."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: join_rows([batch[key] for batch in batches]) for key in first}
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, np.ndarray):
        return np.concatenate(batches)
    if is_frame(first):
        import pandas as pd

        return pd.concat(list(batches))
    return [row for batch in batches for row in batch]


def row_integers(name: str, value: object, *, rows: int) -> Tensor:
    """Return one integer per row, int64 [rows], from a tensor, an array or a list.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        If it holds anything but integers of 64 bits, or not one per row.
    """
    expected = f"one integer per row, {rows} of them"
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidTypeError(name, value, expected) from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InvalidTypeError(name, value, expected)
    if found.shape != (rows,):
        raise InvalidArgumentError(name, f"shape {tuple(found.shape)}", expected)
    return found.to(torch.int64)


def row_hashes(batch: Batch) -> tuple[str, ...]:
    """Hash of every row's content, so that equal rows meet again whatever array holds them.

    Floating-point values are compared in float32, integers in int64.
    """
    if is_frame(batch):
        names = [str(name) for name in batch.columns]
        batch = [
            dict(zip(names, row, strict=True)) for row in batch.itertuples(index=False, name=None)
        ]
    pieces = [_row_bytes(batch, row) for row in range(count_rows(batch))]
    return tuple(hashlib.sha256(piece).hexdigest()[:24] for piece in pieces)


def _row_bytes(batch: Batch, row: int) -> bytes:
    return _plain(
        {key: value[row] for key, value in batch.items()}
        if isinstance(batch, Mapping)
        else batch[row]
    )


def _plain(value: Any) -> bytes:
    """Bytes of one row; a tensor, an array and a list of the same numbers have the same."""
    if isinstance(value, Mapping):
        return b"".join(key.encode() + b"=" + _plain(value[key]) + b";" for key in sorted(value))
    if isinstance(value, str):
        return b"text:" + value.encode()
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        value = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise InvalidTypeError("dataset", value, "rows of numbers or texts")
    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
    return f"{array.shape}{array.dtype.kind}:".encode() + array.tobytes()
