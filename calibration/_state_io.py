"""Detector states as plain data: exact, and readable only by the detector that wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from adaptive.calibration._errors import InvalidArgumentError

State = TypeVar("State")


def pack_state(owner: Any, state: Any) -> dict[str, Any]:
    """Return `state` (a dataclass of arrays) as JSON-ready data that names its owner.

    Python writes and reads floats exactly, so the round trip through JSON is bit by bit. NaN, for
    which JSON has no word, is written as null.
    """
    arrays = {field.name: getattr(state, field.name) for field in fields(state)}
    return {
        "detector": type(owner).__name__,
        "settings": _settings(owner),
        "state": {name: _plain(array) for name, array in arrays.items()},
    }


def unpack_state(owner: Any, data: Mapping[str, Any], kind: type[State]) -> State:
    """Return the state in `data`; raise if another detector, or other settings, wrote it."""
    if not isinstance(data, Mapping) or {"detector", "settings", "state"} - set(data):
        raise InvalidArgumentError("data", type(data).__name__, "what `to_dict` returned")
    name = type(owner).__name__
    if data["detector"] != name:
        raise InvalidArgumentError("data", f"a state of {data['detector']}", f"a state of {name}")
    mine, theirs = _settings(owner), data["settings"]
    if mine != theirs:
        theirs = theirs if isinstance(theirs, Mapping) else {}
        other = [key for key in mine if mine[key] != theirs.get(key)]
        text = ", ".join(f"{key} = {theirs.get(key)!r}" for key in other) or "other settings"
        expected = ", ".join(f"{key} = {mine[key]!r}" for key in other)
        raise InvalidArgumentError("data", text, f"a state of a {name} with {expected}")
    return _read(data["state"], owner.init(), kind)


def read_settings(kind: type, data: Any, *, tuples: tuple[str, ...]) -> dict[str, Any]:
    """Return the constructor's arguments in `data`, lists as tuples; raise if they are not its."""
    names = {field.name for field in fields(kind)}
    if not isinstance(data, Mapping) or set(data) != names:
        found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise InvalidArgumentError("data", str(found), f"{sorted(names)}, as written")
    values = dict(data)
    for name in tuples:
        if not isinstance(values[name], list | tuple):
            raise InvalidArgumentError("data", f"{name} = {values[name]!r}", "a list of numbers")
        values[name] = tuple(values[name])
    return values


def _read(arrays: Any, like: State, kind: type[State]) -> State:
    """Return the state in `arrays`, in the types and shapes of `like` but for its streams."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(arrays, Mapping) or set(arrays) != set(names):
        wrong = sorted(arrays) if isinstance(arrays, Mapping) else type(arrays).__name__
        raise InvalidArgumentError("data", f"a state of {wrong}", f"a state of {sorted(names)}")
    found = {name: _array(name, arrays[name], getattr(like, name)) for name in names}
    if len({array.shape[0] for array in found.values()}) != 1:
        sizes = {name: array.shape[0] for name, array in found.items()}
        raise InvalidArgumentError("data", str(sizes), "a state with the same streams throughout")
    return kind(**found)


def _settings(owner: Any) -> dict[str, Any]:
    """Return the fields of `owner` as JSON reads them back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(owner), default=float))
    return found


def _plain(array: Any) -> dict[str, Any]:
    values = array
    if array.dtype.kind == "f" and np.isnan(array).any():
        values = np.where(np.isnan(array), None, array.astype(object))
    return {"dtype": str(array.dtype), "shape": list(array.shape), "values": values.tolist()}


def _array(name: str, value: Any, like: Any) -> Any:
    """Return one array, of the type and, streams apart, the shape of `like`; counts from 0."""
    allowed = f"`{name}` as `to_dict` wrote it"
    try:
        array = np.array(value["values"], dtype=like.dtype).reshape(value["shape"])
        written = str(value["dtype"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError("data", f"`{name}` damaged ({error})", allowed) from error
    damaged = {
        "of another type": written != str(like.dtype),
        "of another shape": array.size == 0 or array.shape[1:] != like.shape[1:],
        "infinite": array.dtype.kind == "f" and bool(np.isinf(array).any()),
        "NaN": not np.isnan(like).any() and bool(np.isnan(array).any()),
        "negative": array.dtype.kind == "i" and bool((array < 0).any()),
    }
    if any(damaged.values()):
        reason = next(key for key, wrong in damaged.items() if wrong)
        raise InvalidArgumentError("data", f"`{name}` {reason}", allowed)
    return array
