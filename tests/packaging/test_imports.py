"""What importing the package costs, and what the root hands on."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import adaptive

HEAVY = ("torch", "transformers")


def loaded_after(statement: str, cwd: Path) -> set[str]:
    """Heavy packages that are in memory after a statement in a new interpreter."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    command = [sys.executable, "-P", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import adaptive",
        "import adaptive; dir(adaptive); adaptive.__version__",
        "import adaptive.calibration",
        "from adaptive.calibration import *",
        "from adaptive import InvalidArgumentError",
    ],
)
def test_statistics_need_no_torch(statement: str, tmp_path: Path) -> None:
    assert loaded_after(statement, tmp_path) == set()


def test_the_proof_can_fail(tmp_path: Path) -> None:
    assert "torch" in loaded_after("import adaptive.policies", tmp_path)
    assert "torch" in loaded_after("from adaptive import Policy", tmp_path)


def seconds_of(statement: str, cwd: Path) -> float:
    """Processor time of a statement in a new interpreter: other work on the machine counts less."""
    code = (
        f"import time\nstart = time.process_time()\n{statement}\nprint(time.process_time() - start)"
    )
    command = [sys.executable, "-P", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    return float(ran.stdout)


def test_importing_the_root_is_quick(tmp_path: Path) -> None:
    assert seconds_of("import adaptive", tmp_path) < 0.3
    assert seconds_of("import adaptive.policies", tmp_path) > 0.3  # the proof can fail


def test_a_script_in_the_clone_finds_the_floors_beside_the_folder() -> None:
    root = Path(__file__).parents[2]
    code = "import adaptive.policies, adaptive.calibration; print(adaptive.calibration.__file__)"
    command = [sys.executable, "-c", code]  # no -P: the working directory comes first
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert Path(ran.stdout.strip()) == root / "calibration" / "__init__.py"


def test_at_most_thirty_names_and_each_is_there() -> None:
    assert len(adaptive.__all__) <= 30
    assert len(set(adaptive.__all__)) == len(adaptive.__all__)
    for name in adaptive.__all__:
        assert getattr(adaptive, name) is not None
    assert set(adaptive.__all__) <= set(dir(adaptive))


@pytest.mark.parametrize("floor", ["adaptive.calibration", "adaptive.policies"])
def test_every_exported_name_of_a_floor_is_there(floor: str) -> None:
    module = importlib.import_module(floor)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_type_checkers_see_the_same_names() -> None:
    """The imports that only type checkers read name the same homes as the lazy table."""
    tree = ast.parse(Path(adaptive.__file__).read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adaptive")
        for alias in node.names
    }
    floors = dict.fromkeys(adaptive._FLOORS, "adaptive")
    assert seen == adaptive._HOMES | floors


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'adaptive' has no attribute 'calibrated'"):
        _ = adaptive.calibrated
