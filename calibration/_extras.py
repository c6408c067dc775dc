"""Optional dependencies: imported when first needed; a missing one says how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from adaptive.calibration._errors import UnsupportedError

#: Import name of every optional dependency -> the extra of this package that brings it.
EXTRAS = {
    "accelerate": "distributed",
    "datasets": "data",
    "lm_eval": "lm-eval",
    "matplotlib": "plots",
    "prometheus_client": "prometheus",
    "pyarrow": "arrow",
    "ray": "ray",
    "river": "river",
}


class MissingExtraError(UnsupportedError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


def optional(module: str) -> ModuleType:
    """Import an optional dependency, or a module of one (``"matplotlib.pyplot"``).

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"{name} is needed here and cannot be imported ({error}): "
            f"pip install 'adaptive-control[{EXTRAS[name]}]'"
        ) from error
