"""Traces as Arrow tables and Parquet files, for other tools; needs pyarrow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError, UnsupportedError
from adaptive.calibration._extras import optional
from adaptive.calibration._trace import Trace

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

ARROW_SCHEMA_VERSION = 1
_KEY = b"adaptive trace"


def trace_to_arrow(trace: Trace) -> pa.Table:
    """Return one row per token, with everything needed to get the trace back.

    Parameters
    ----------
    trace : Trace

    Returns
    -------
    pyarrow.Table
        Columns ``unit_id`` (dictionary), ``group`` and ``weight`` where the trace has them,
        ``scores`` and ``losses/...`` as fixed-size lists over exits, ``columns/...`` as they are.
        Costs and the schema version travel in the metadata.

    Raises
    ------
    UnsupportedError
        If pyarrow is missing, or a column has more than two axes.
    """
    pa = _pyarrow()
    unit = trace.unit_of_token
    names = pa.array(trace.unit_ids, type=pa.string())
    table: dict[str, Any] = {"unit_id": pa.DictionaryArray.from_arrays(pa.array(unit), names)}
    for name, per_unit in (("group", trace.groups), ("weight", trace.weights)):
        if per_unit is not None:
            table[name] = pa.array(per_unit[unit])
    for name, array in trace.arrays():
        if name == "scores" or "/" in name:
            table[name] = _to_arrow(name, array)
    facts = {
        "schema_version": ARROW_SCHEMA_VERSION,
        "cost_quantity": trace.cost_quantity,
        "costs": trace.costs.tolist(),
        "n_units": trace.n_units,
    }
    return pa.table(table).replace_schema_metadata({_KEY: json.dumps(facts)})


def trace_from_arrow(table: pa.Table) -> Trace:
    """Return the trace that `trace_to_arrow` wrote.

    Raises
    ------
    InvalidArgumentError
        If the table is not a trace, or lost rows on the way.
    UnsupportedError
        If it was written under an unknown schema version, or pyarrow is missing.
    """
    _pyarrow()
    facts = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    if "schema_version" not in facts:
        raise InvalidArgumentError("table", "a table without trace metadata", "a stored trace")
    if facts["schema_version"] != ARROW_SCHEMA_VERSION:
        raise UnsupportedError(
            f"the table is a trace of schema version {facts['schema_version']!r}; this release "
            f"reads version {ARROW_SCHEMA_VERSION}"
        )
    ids = np.asarray(table.column("unit_id").to_pandas(), dtype=object)
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    if first.size != facts["n_units"]:
        raise InvalidArgumentError(
            "table",
            f"{first.size} runs of unit ids",
            f"{facts['n_units']} units, one after another",
        )
    fields: dict[str, Any] = {"losses": {}, "columns": {}}
    for name in table.column_names:
        if name in ("group", "weight"):
            fields[f"{name}s"] = _from_arrow(table.column(name))[first]
        elif name == "scores":
            fields[name] = _from_arrow(table.column(name))
        elif name != "unit_id":
            kind, _, inner = name.partition("/")
            fields[kind][inner] = _from_arrow(table.column(name))
    return Trace(
        costs=facts["costs"],
        cost_quantity=facts["cost_quantity"],
        lengths=np.diff(np.append(first, ids.size)),
        unit_ids=tuple(ids[first]),
        **fields,
    )


def write_trace_parquet(trace: Trace, path: str | Path) -> None:
    """Write a trace as one Parquet file; see `trace_to_arrow`. An older file is replaced."""
    _pyarrow()
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    target = Path(path)
    temporary = target.with_name(f".{target.name}.part")
    try:
        pq.write_table(trace_to_arrow(trace), temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_trace_parquet(path: str | Path) -> Trace:
    """Read a trace written by `write_trace_parquet`; errors as `trace_from_arrow`."""
    _pyarrow()
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise InvalidArgumentError("path", str(path), "an existing Parquet file")
    return trace_from_arrow(pq.read_table(path))


def _to_arrow(name: str, array: NDArray[Any]) -> Any:
    pa = _pyarrow()
    if array.ndim > 2:
        raise UnsupportedError(f"`{name}` has {array.ndim} axes; Arrow tables hold at most two")
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(np.ascontiguousarray(array).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _from_arrow(column: Any) -> NDArray[Any]:
    pa = _pyarrow()
    merged = column.combine_chunks()
    if isinstance(merged, pa.ChunkedArray):
        merged = merged.chunk(0)
    if pa.types.is_fixed_size_list(merged.type):
        found: NDArray[Any] = merged.flatten().to_numpy(zero_copy_only=False)
        return found.reshape(-1, merged.type.list_size)
    plain: NDArray[Any] = merged.to_numpy(zero_copy_only=False)
    return plain


def _pyarrow() -> Any:
    return optional("pyarrow")
