"""Traces through Arrow and Parquet come back as they were."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from adaptive.calibration import (
    InvalidArgumentError,
    Trace,
    UnsupportedError,
    read_trace_parquet,
    trace_from_arrow,
    trace_to_arrow,
    write_trace_parquet,
)

pytest.importorskip("pyarrow")


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "scores": rng.random((5, 2)),
        "losses": {"disagreement": rng.random((5, 2)) < 0.5, "gap": rng.random((5, 2))},
        "costs": [1.0, 2.0, 3.0],
        "cost_quantity": "seconds",
        "lengths": [2, 1, 2],
        "unit_ids": ["a", "b", "c"],
        "groups": ["x", "y", "x"],
        "weights": [1.0, 2.0, 3.0],
        "columns": {"answers": rng.integers(0, 9, (5, 2)), "entropy": rng.random(5)},
    }
    return Trace(**{**fields, **changes})


@pytest.mark.parametrize("changes", [{}, {"groups": None, "weights": None, "columns": {}}])
def test_a_round_trip_changes_nothing(tmp_path, changes):
    trace = make(**changes)
    table = trace_to_arrow(trace)
    assert table.num_rows == 5
    assert trace_from_arrow(table).fingerprint() == trace.fingerprint()
    write_trace_parquet(trace, tmp_path / "trace.parquet")
    write_trace_parquet(trace, tmp_path / "trace.parquet")
    assert read_trace_parquet(tmp_path / "trace.parquet").fingerprint() == trace.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["trace.parquet"]


def test_strangers_unknown_versions_and_reordered_rows_are_refused(tmp_path):
    import pyarrow as pa

    table = trace_to_arrow(make())
    with pytest.raises(InvalidArgumentError, match="without trace metadata"):
        trace_from_arrow(pa.table({"a": [1]}))
    facts = json.loads(table.schema.metadata[b"adaptive trace"])
    newer = table.replace_schema_metadata(
        {b"adaptive trace": json.dumps({**facts, "schema_version": 9})}
    )
    with pytest.raises(UnsupportedError, match="version 9"):
        trace_from_arrow(newer)
    with pytest.raises(InvalidArgumentError, match="one after another"):
        trace_from_arrow(table.take([0, 2, 1, 3, 4]))
    with pytest.raises(InvalidArgumentError, match="existing Parquet file"):
        read_trace_parquet(tmp_path / "none.parquet")


def test_what_does_not_fit_is_named(monkeypatch):
    with pytest.raises(UnsupportedError, match="3 axes"):
        trace_to_arrow(make(columns={"states": np.zeros((5, 2, 2))}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'adaptive-control\[arrow\]'"):
        trace_to_arrow(make())
