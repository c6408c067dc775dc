"""Progress of a training of exits on disk: a run that was stopped goes on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive._fingerprint import tokens_hash
from adaptive.calibration import InvalidArgumentError


class TrainingCheckpoint:
    """Progress of a training run in a directory, each file written whole or not at all.

    Parameters
    ----------
    directory : str or Path, optional
        Made if need be; without one nothing is kept.
    key : str
        What tells the run from others.

    Raises
    ------
    InvalidArgumentError
        If the directory holds the progress of another run.
    """

    def __init__(self, directory: str | Path | None, *, key: str) -> None:
        self._folder = None if directory is None else Path(directory)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = self._folder / "run.json"
        name = tokens_hash(map(ord, key))
        if owner.exists() and json.loads(owner.read_text(encoding="utf-8"))["run"] != name:
            raise InvalidArgumentError(
                "checkpoint",
                str(directory),
                "an empty directory, or that of a run with the same model, prompts and settings",
            )
        self._write("run.json", {"run": name})

    def texts(self) -> list[tuple[int, ...]] | None:
        """Return generated texts, if they were finished."""
        if self._folder is None or not (self._folder / "texts.json").exists():
            return None
        found = json.loads((self._folder / "texts.json").read_text(encoding="utf-8"))
        return [tuple(text) for text in found]

    def keep_texts(self, texts: Sequence[tuple[int, ...]]) -> None:
        """Remember generated texts."""
        if self._folder is not None:
            self._write("texts.json", [list(text) for text in texts])

    def tensors(self) -> dict[str, Tensor] | None:
        """Return translators and optimiser state, if any were kept."""
        path = None if self._folder is None else self._folder / "translators.safetensors"
        return None if path is None or not path.exists() else load_file(path)

    def keep_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Remember translators and optimiser state."""
        if self._folder is not None:
            partial = self._folder / ".translators.partial"
            save_file(
                {name: value.detach().contiguous().clone() for name, value in tensors.items()},
                partial,
            )
            partial.replace(self._folder / "translators.safetensors")

    def clear(self) -> None:
        """Remove what is kept: the run is finished."""
        if self._folder is not None:
            for name in ("texts.json", "translators.safetensors", "run.json"):
                (self._folder / name).unlink(missing_ok=True)

    def _write(self, name: str, value: Any) -> None:
        assert self._folder is not None
        partial = self._folder / f".{name}.partial"
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(self._folder / name)
