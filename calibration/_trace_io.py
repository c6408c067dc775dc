"""Traces on disk: one compressed file, or a directory of arrays that can be memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError, UnsupportedError
from adaptive.calibration._trace import Trace

SCHEMA_VERSION = 1
_MANIFEST = "manifest.json"


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace so that a reader never sees half of it.

    Parameters
    ----------
    trace : Trace
    path : str or Path
        A name ending in ``.npz`` gives one file and replaces an older one; any other name gives
        a directory of ``.npy`` files and a manifest, which `load_trace` can memory-map, and must
        not exist yet.

    Raises
    ------
    InvalidArgumentError
        If the directory exists already.
    """
    target = Path(path)
    arrays = dict(trace.arrays())
    manifest = {
        "schema": "adaptive trace",
        "schema_version": SCHEMA_VERSION,
        "cost_quantity": trace.cost_quantity,
        "arrays": {name: f"array_{index}" for index, name in enumerate(arrays)},
    }
    arrays["unit_ids"] = np.frombuffer(json.dumps(trace.unit_ids).encode(), dtype=np.uint8)
    if target.suffix == ".npz":
        _save_file(target, arrays, manifest)
    else:
        _save_directory(target, arrays, manifest)


def load_trace(path: str | Path, *, memory_map: bool = False) -> Trace:
    """Read a trace written by `save_trace`.

    Parameters
    ----------
    path : str or Path
        A ``.npz`` file or a directory.
    memory_map : bool
        Map the arrays of a directory instead of reading them: for traces larger than memory.

    Raises
    ------
    InvalidArgumentError
        If nothing is there, it is not a trace, or a file is to be memory-mapped.
    UnsupportedError
        If it was written under an unknown schema version.
    """
    source = Path(path)
    if source.is_dir():
        return _load_directory(source, memory_map=memory_map)
    if not source.is_file():
        raise InvalidArgumentError("path", str(path), "an existing trace file or directory")
    if memory_map:
        raise InvalidArgumentError("memory_map", memory_map, "False for a file: save a directory")
    return _load_file(source)


def _save_file(
    target: Path, arrays: Mapping[str, NDArray[Any]], manifest: Mapping[str, Any]
) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stored = {_stored_name(name, manifest): array for name, array in arrays.items()}
            stored["manifest"] = np.frombuffer(json.dumps(manifest).encode(), dtype=np.uint8)
            np.savez_compressed(stream, allow_pickle=False, **stored)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _save_directory(
    target: Path, arrays: Mapping[str, NDArray[Any]], manifest: Mapping[str, Any]
) -> None:
    if target.exists():
        raise InvalidArgumentError("path", str(target), "a name that does not exist yet")
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{_stored_name(name, manifest)}.npy", array)
        (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stored_name(name: str, manifest: Mapping[str, Any]) -> str:
    stored: str = manifest["arrays"].get(name, name)
    return stored


def _load_file(source: Path) -> Trace:
    try:
        with np.load(source, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
        manifest = _checked(json.loads(content["manifest"].tobytes()), source)
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, UnsupportedError | InvalidArgumentError):
            raise
        raise InvalidArgumentError("path", str(source), "a trace written by `save`") from error
    return _assembled(content, manifest)


def _load_directory(source: Path, *, memory_map: bool) -> Trace:
    try:
        text = (source / _MANIFEST).read_text(encoding="utf-8")
        manifest = _checked(json.loads(text), source)
        names = [*manifest["arrays"].values(), "unit_ids"]
        mode: Literal["r"] | None = "r" if memory_map else None
        content = {name: np.load(source / f"{name}.npy", mmap_mode=mode) for name in names}
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, UnsupportedError | InvalidArgumentError):
            raise
        raise InvalidArgumentError("path", str(source), "a trace written by `save`") from error
    return _assembled(content, manifest)


def _checked(manifest: Mapping[str, Any], source: Path) -> Mapping[str, Any]:
    version = manifest["schema_version"]
    if version != SCHEMA_VERSION:
        raise UnsupportedError(
            f"{source} is a trace of schema version {version!r}; this release reads version "
            f"{SCHEMA_VERSION}: read it with the release that wrote it, or collect it again"
        )
    return manifest


def _assembled(content: Mapping[str, NDArray[Any]], manifest: Mapping[str, Any]) -> Trace:
    fields: dict[str, Any] = {"losses": {}, "columns": {}}
    for name, stored in manifest["arrays"].items():
        kind, _, inner = name.partition("/")
        if inner:
            fields[kind][inner] = content[stored]
        else:
            fields[name] = content[stored]
    unit_ids = tuple(json.loads(content["unit_ids"].tobytes()))
    return Trace(cost_quantity=manifest["cost_quantity"], unit_ids=unit_ids, **fields)
