"""What the wheel contains: three folders under one import name, typed, with their data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("adaptive", "calibration", "policies")
BUILT_FROM = (*FOLDERS, "pyproject.toml", "README.md", "LICENSE")


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def mounted(path: Path) -> str:
    """Where a file of the repository lies in the wheel."""
    relative = path.relative_to(ROOT)
    return relative.as_posix() if relative.parts[0] == "adaptive" else f"adaptive/{relative}"


def package_files() -> list[Path]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def test_listed_packages_are_the_folders() -> None:
    on_disk = {path.parent for path in package_files() if path.name == "__init__.py"}
    names = {mounted(folder).replace("/", ".") for folder in on_disk}
    listed = settings()["tool"]["setuptools"]
    assert set(listed["packages"]) == names
    assert {ROOT / folder for folder in listed["package-dir"].values()} == on_disk
    assert set(listed["package-dir"]) == names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that nothing is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_folders_and_no_other(wheel) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {mounted(path) for path in package_files()}


@pytest.mark.slow
def test_the_wheel_claims_one_import_name(wheel) -> None:
    assert {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {
        "adaptive"
    }


@pytest.mark.slow
def test_the_wheel_is_typed_on_every_floor(wheel) -> None:
    typed = {name for name in wheel.namelist() if name.endswith("py.typed")}
    assert typed == {
        "adaptive/py.typed",
        "adaptive/calibration/py.typed",
        "adaptive/policies/py.typed",
    }


@pytest.mark.slow
def test_the_wheel_has_licence_and_command(wheel) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "adaptive = adaptive.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
