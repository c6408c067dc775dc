"""Every example in a docstring runs, and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import tomllib
from pathlib import Path

import pytest

from adaptive.calibration import MissingExtraError

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    """Names of all modules of the installed packages, found without importing them."""
    names = set()
    for package in tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["packages"]:
        spec = importlib.util.find_spec(package)
        path = spec.submodule_search_locations if spec else None
        names |= {package, *(info.name for info in pkgutil.iter_modules(path, f"{package}."))}
    return sorted(name for name in names if not name.endswith(".__main__"))


@pytest.mark.parametrize("name", modules())
def test_examples(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example that writes a file leaves nothing behind
    try:
        module = importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    outcome = doctest.testmod(module, optionflags=FLAGS)
    assert outcome.failed == 0
