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

    Python writes and reads floats exactly, so the round trip through JSON is bit by bit.
    """
    arrays = {field.name: getattr(state, field.name) for field in fields(state)}
    return {
        "detector": type(owner).__name__,
        "settings": _settings(owner),
        "state": {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "values": array.tolist()}
            for name, array in arrays.items()
        },
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
        other = [key for key in mine if mine[key] != theirs.get(key)]
        text = ", ".join(f"{key} = {theirs.get(key)!r}" for key in other) or "other settings"
        expected = ", ".join(f"{key} = {mine[key]!r}" for key in other)
        raise InvalidArgumentError("data", text, f"a state of a {name} with {expected}")
    arrays = data["state"]
    missing = {field.name for field in fields(kind)} - set(arrays)  # type: ignore[arg-type]
    if missing:
        raise InvalidArgumentError("data", f"without {sorted(missing)}", "a complete state")
    return kind(**{key: _array(value) for key, value in arrays.items()})


def _settings(owner: Any) -> dict[str, Any]:
    """Return the fields of `owner` as JSON reads them back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(owner)))
    return found


def _array(value: Mapping[str, Any]) -> Any:
    return np.array(value["values"], dtype=value["dtype"]).reshape(value["shape"])
