"""Rows of batches, whatever holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from adaptive._rows import count_rows, join_rows, row_hashes, take_rows
from adaptive.calibration import InvalidArgumentError, InvalidTypeError

NUMBERS = [[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]]
BATCHES: dict[str, Any] = {
    "tensor": torch.tensor(NUMBERS),
    "array": np.array(NUMBERS),
    "list": [torch.tensor(row) for row in NUMBERS],
    "frame": pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]}, index=[5, 5, 1]),
    "texts": ["one", "two", "three"],
    "mapping": {"a": torch.tensor(NUMBERS), "b": np.array([7, 8, 9]), "c": ["x", "y", "z"]},
}


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: plain(value) for name, value in batch.items()}
    if isinstance(batch, list):
        return [plain(row) for row in batch]
    if isinstance(batch, pd.DataFrame):
        return batch.to_dict("list")
    return batch.tolist() if isinstance(batch, torch.Tensor | np.ndarray) else batch


@pytest.mark.parametrize("name", BATCHES)
def test_rows_are_counted_taken_and_put_together(name: str) -> None:
    batch = BATCHES[name]
    assert count_rows(batch) == 3
    taken = take_rows(batch, torch.tensor([2, 0]))
    assert count_rows(taken) == 2
    assert type(taken) is type(batch)
    back = join_rows([take_rows(taken, torch.tensor([1])), take_rows(batch, torch.tensor([1, 2]))])
    assert plain(back) == plain(batch)
    assert plain(take_rows(batch, torch.tensor([], dtype=torch.int64))) == plain(
        {key: value[:0] for key, value in batch.items()} if isinstance(batch, dict) else batch[:0]
    )


def test_equal_rows_have_equal_names_whatever_holds_them() -> None:
    wanted = row_hashes(torch.tensor(NUMBERS))
    assert len(set(wanted)) == 3
    for batch in (np.array(NUMBERS), NUMBERS, torch.tensor(NUMBERS, dtype=torch.float64)):
        assert row_hashes(batch) == wanted
    whole = torch.tensor([[1, 2], [3, 4]])
    assert row_hashes(whole) == row_hashes(whole.int()) == row_hashes(whole.numpy())


def test_different_rows_have_different_names() -> None:
    rows: list[Any] = [
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2]),  # whole numbers are no fractions
        torch.tensor([[1.0, 2.0]]),  # another shape
        torch.tensor([2.0, 1.0]),
        "1.0 2.0",
        {"a": torch.tensor([1.0, 2.0])},
        {"b": torch.tensor([1.0, 2.0])},
    ]
    names = row_hashes(rows)
    assert len(set(names)) == len(rows)


def test_rows_of_a_frame_are_named_as_those_of_a_mapping() -> None:
    frame = BATCHES["frame"]
    assert row_hashes(frame) == row_hashes(frame.to_dict("list"))
    assert row_hashes(frame.iloc[[2, 0]]) == tuple(row_hashes(frame)[i] for i in (2, 0))


def test_a_mapping_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="a mapping of entries with as many rows"):
        count_rows({"a": torch.zeros(2), "b": torch.zeros(3)})


@pytest.mark.parametrize("batch", ["one text", b"bytes", 3, torch.tensor(1.0), None])
def test_what_has_no_rows_is_refused(batch: Any) -> None:
    with pytest.raises(InvalidTypeError, match="a mapping of these, a pandas DataFrame, or a list"):
        count_rows(batch)


def test_rows_of_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidTypeError, match="rows of numbers or texts"):
        row_hashes([object()])
