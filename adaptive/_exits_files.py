"""Exits on disk: settings as JSON, tensors as safetensors, each file whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adaptive.calibration import CertificateError
from adaptive.policies._hub import located

_SCHEMA = 1
Built = TypeVar("Built", bound=nn.Module)


@dataclass(frozen=True)
class ExitsFiles:
    """Two files beside a model.

    Parameters
    ----------
    config, weights : str
        Their names.
    noun : str
        What they hold, for messages.
    """

    config: str
    weights: str
    noun: str

    def beside(self, home: str) -> bool:
        """Whether the directory that a model was loaded from holds them."""
        return bool(home) and (Path(home) / self.config).is_file()

    def write(self, directory: str | Path, settings: dict[str, Any], exits: nn.Module) -> None:
        """Write settings and tensors; the directory is made if need be."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in exits.state_dict().items()}
        text = (json.dumps({"schema": _SCHEMA} | settings, indent=2) + "\n").encode()
        for name, content in ((self.weights, save(tensors)), (self.config, text)):
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)  # with the user's own file mode
            partial.replace(folder / name)

    def read(
        self,
        directory: str | Path,
        build: Callable[[dict[str, Any], dict[str, Tensor]], Built],
        **download: Any,
    ) -> Built:
        """Build exits from what a directory, or a repository on the hub, holds.

        Parameters
        ----------
        directory : str or Path
        build : callable
            ``build(settings, tensors)``; what it misses or cannot use is damage.
        **download
            ``revision``, ``token`` and more, as for ``huggingface_hub.snapshot_download``.

        Raises
        ------
        CertificateError
            If there are none, or they are damaged or of an unknown schema.
        """
        folder = located(directory, [self.config, self.weights], **download)
        try:
            settings = json.loads((folder / self.config).read_text(encoding="utf-8"))
            tensors = load_file(folder / self.weights)
        except FileNotFoundError as error:
            raise CertificateError(
                f"no {self.noun} in {folder}: {self.config} and {self.weights} are needed"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise CertificateError(f"the exits in {folder} are not readable: {error}") from error
        schema = settings.get("schema") if isinstance(settings, dict) else type(settings).__name__
        if schema != _SCHEMA:
            raise CertificateError(f"exits schema {schema!r} is not readable by this version")
        try:
            return build(settings, tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CertificateError(f"the exits in {folder} are damaged: {reason}") from error
