"""Checks of what goes into a trace: each returns the read-only array, or names what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    from adaptive.calibration._trace import Trace

_CHUNK = 1 << 22


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view


def token_rows(name: str, value: ArrayLike, n_rows: int | None, dtype: Any) -> NDArray[Any]:
    """Return an array with one row per token."""
    try:
        array = np.asanyarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(name, value, "an array of numbers") from error
    if array.dtype == object:
        raise InvalidTypeError(name, "dtype object", "an array of numbers or strings")
    if n_rows is not None and (array.ndim == 0 or array.shape[0] != n_rows):
        raise InvalidArgumentError(name, f"shape {array.shape}", f"one row per token ({n_rows})")
    return frozen(array)


def token_loss(name: str, value: ArrayLike, shape: tuple[int, int]) -> NDArray[Any]:
    """Return a loss of the shape of the scores, finite."""
    label = f"losses[{name!r}]"
    array = token_rows(label, value, None, None)
    if array.shape != shape:
        raise InvalidArgumentError(label, f"shape {array.shape}", f"of shape {shape}, as `scores`")
    if array.dtype.kind not in "biuf":
        raise InvalidTypeError(label, f"dtype {array.dtype}", "numbers")
    if array.dtype.kind == "f":
        if array.dtype.itemsize not in (4, 8):
            array = frozen(array.astype(np.float32))
        require_no_nan(label, array)
    return array


def rows_per_chunk(array: NDArray[Any]) -> int:
    """Return how many rows make a piece of bounded size."""
    return max(1, _CHUNK // max(1, array[:1].size))


def require_no_nan(name: str, array: NDArray[Any], *, lowest: bool = False) -> None:
    """Raise unless finite (or ``-inf`` where `lowest`), naming the place; memory maps pass."""
    if isinstance(array, np.memmap):
        return
    step = rows_per_chunk(array)
    for start in range(0, array.shape[0], step):
        piece = array[start : start + step]
        wrong = ~(piece < np.inf) if lowest else ~np.isfinite(piece)
        if wrong.any():
            row, exit_ = np.argwhere(wrong)[0]
            place = f"{piece[row, exit_]} at token {row + start}, exit {exit_}"
            raise InvalidArgumentError(name, place, "finite or -inf" if lowest else "finite")


def unit_lengths(value: ArrayLike | None, n_tokens: int) -> NDArray[np.int64]:
    """Return tokens per unit, summing to the rows."""
    if value is None:
        return np.ones(n_tokens, dtype=np.int64)
    raw = np.asarray(value)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise InvalidTypeError("lengths", value, "a vector of integers, one per unit")
    lengths = raw.astype(np.int64)
    if lengths.size == 0 or lengths.min() < 1:
        raise InvalidArgumentError("lengths", value, "at least 1 for every unit")
    if int(lengths.sum()) != n_tokens:
        raise InvalidArgumentError(
            "lengths", f"sum {int(lengths.sum())}", f"summing to the {n_tokens} rows of `scores`"
        )
    return lengths


def stage_costs(value: ArrayLike, n_exits: int) -> NDArray[np.float64]:
    """Return cumulative costs, one per stage."""
    costs = np.array(value, dtype=np.float64)
    if costs.shape != (n_exits + 1,):
        raise InvalidArgumentError(
            "costs", f"shape {costs.shape}", f"of shape ({n_exits + 1},): one per stage"
        )
    if not np.isfinite(costs).all() or costs[0] <= 0.0 or (np.diff(costs) <= 0.0).any():
        raise InvalidArgumentError("costs", costs, "cumulative: positive, finite and increasing")
    return frozen(costs)


def unit_names(value: Sequence[str] | None, n_units: int) -> tuple[str, ...]:
    """Return distinct names, one per unit."""
    if value is None:
        return tuple(map(str, range(n_units)))
    names = tuple(str(name) for name in value)
    if len(names) != n_units:
        raise InvalidArgumentError("unit_ids", f"{len(names)} ids", f"one per unit ({n_units})")
    if len(set(names)) != n_units:
        twice = Counter(names).most_common(1)[0][0]
        raise InvalidArgumentError("unit_ids", f"{twice!r} twice", "distinct")
    return names


def unit_groups(value: ArrayLike | None, n_units: int) -> NDArray[Any] | None:
    """Return the group of each unit, or None."""
    if value is None:
        return None
    groups = np.array(value)
    if groups.dtype == object:
        groups = groups.astype(str)
    if groups.shape != (n_units,):
        raise InvalidArgumentError("groups", f"shape {groups.shape}", f"of shape ({n_units},)")
    return frozen(groups)


def unit_weights(value: ArrayLike | None, n_units: int) -> NDArray[np.float64] | None:
    """Return the weight of each unit, or None."""
    if value is None:
        return None
    weights = np.array(value, dtype=np.float64)
    if weights.shape != (n_units,):
        raise InvalidArgumentError("weights", f"shape {weights.shape}", f"of shape ({n_units},)")
    if not np.isfinite(weights).all() or weights.min() < 0.0 or weights.sum() == 0.0:
        raise InvalidArgumentError("weights", weights, "finite, non-negative and not all zero")
    return frozen(weights)


def unit_indices(units: ArrayLike, n_units: int) -> NDArray[np.intp]:
    """Return indices of units from indices or a mask."""
    chosen = np.asarray(units)
    if chosen.dtype == bool:
        if chosen.shape != (n_units,):
            raise InvalidArgumentError("units", f"mask {chosen.shape}", f"of shape ({n_units},)")
        chosen = np.flatnonzero(chosen)
    if chosen.size == 0:
        raise InvalidArgumentError("units", "nothing selected", "at least one unit")
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise InvalidTypeError("units", units, "a vector of indices or a mask")
    if chosen.min() < 0 or chosen.max() >= n_units:
        raise InvalidArgumentError("units", units, f"in 0..{n_units - 1}")
    if np.unique(chosen).size != chosen.size:
        raise InvalidArgumentError("units", units, "without repeats")
    return chosen.astype(np.intp)


def joined_arrays(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Return the parts one after another, or None if there are none."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def require_compatible(first: Trace, other: Trace, index: int) -> None:
    """Raise if two traces cannot be joined, naming what differs."""
    facts: dict[str, Callable[[Trace], object]] = {
        "number of exits": lambda trace: trace.n_exits,
        "cost quantity": lambda trace: trace.cost_quantity,
        "costs": lambda trace: tuple(trace.costs),
        "names of losses": lambda trace: tuple(sorted(trace.losses)),
        "types of losses": lambda trace: tuple(
            trace.losses[name].dtype.str for name in sorted(trace.losses)
        ),
        "columns": lambda trace: tuple(
            (name, trace.columns[name].shape[1:], trace.columns[name].dtype.kind)
            for name in sorted(trace.columns)
        ),
        "presence of groups": lambda trace: trace.groups is None,
        "presence of weights": lambda trace: trace.weights is None,
    }
    for fact, read in facts.items():
        if read(first) != read(other):
            raise InvalidArgumentError(
                "traces", f"another {fact} in trace {index}", f"alike in {fact}"
            )
