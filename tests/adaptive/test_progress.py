"""One switch for progress, tqdm's own beside it, and a library that never prints."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive._progress import bar

ROOT = Path(__file__).parents[2]


def shown(progress: bool, environment: str) -> bool:
    code = (
        "from adaptive._progress import bar\n"
        f"for _ in bar(range(3), desc='counting', progress={progress}): pass"
    )
    env = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    if environment:
        env["TQDM_DISABLE"] = environment
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert ran.stdout == ""
    return "counting" in ran.stderr


@pytest.mark.parametrize(
    ("progress", "environment", "expected"),
    [(True, "", True), (True, "1", False), (False, "", False), (False, "1", False)],
)
def test_either_switch_silences_every_bar(progress: bool, environment: str, expected: bool) -> None:
    assert shown(progress, environment) is expected


def test_only_the_first_process_shows_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("adaptive._progress.process", lambda: 1)
    assert bar(range(3), progress=True).disable


def sources() -> list[Path]:
    folders = (ROOT / "adaptive", ROOT / "calibration", ROOT / "policies")
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def called(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def test_the_library_never_prints(tmp_path: Path) -> None:
    """Calls in the code; examples in docstrings may print."""
    assert [path.name for path in sources() if "print" in called(path)] == []
    (tmp_path / "talks.py").write_text("print(1)")
    assert "print" in called(tmp_path / "talks.py")  # the proof can fail


def test_bars_have_one_door() -> None:
    """So that one switch reaches them all."""
    users = {path.name for path in sources() if "import tqdm" in path.read_text()}
    assert users == {"_progress.py"}
