"""The standard library as a corpus: the split holds, prompts come from the held-out side."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adaptive._stdlib import (
    Module,
    held_out_functions,
    is_held_out,
    prose_prompts,
    split_key,
    stdlib_modules,
    training_texts,
)

LONG = "def {name}(x):\n    '''Doc.'''\n" + "".join(f"    x += {i}\n" for i in range(8))


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return stdlib_modules()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A library of six files: one to learn from, three held out, two that are no part of it."""
    files = {
        "argparse.py": LONG.format(name="parse"),
        "json/__init__.py": LONG.format(name="load"),
        "json/decoder.py": "class A:\n    @staticmethod\n    "
        + LONG.format(name="go").replace("\n", "\n    ")
        + "\n",
        "test/test_json.py": LONG.format(name="check"),
        "site-packages/other.py": LONG.format(name="foreign"),
        "encodings/cp037.py": "table = 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_split_is_fixed_by_names_alone() -> None:
    held = {"json", "asyncio", "collections", "datetime", "logging", "pathlib", "tkinter", "xml"}
    learnt = {"argparse", "ast", "inspect", "unittest", "decimal", "typing", "http", "subprocess"}
    assert all(is_held_out(name) for name in held)
    assert not any(is_held_out(name) for name in learnt)


def test_a_package_lies_on_one_side() -> None:
    assert is_held_out("asyncio.base_events") == is_held_out("asyncio")
    assert is_held_out("http.client") == is_held_out("http")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("_pydecimal", "decimal"),
        ("_pyio", "io"),
        ("py_compile", "py_compile"),
        ("_weakrefset", "weakrefset"),
    ],
)
def test_private_twins_go_with_the_public_module(name: str, key: str) -> None:
    assert split_key(name) == key


@pytest.mark.parametrize(
    "name", ["test.test_json.test_dump", "test.test_xml_etree", "test.test_uuid"]
)
def test_tests_of_held_out_modules_are_held_out(name: str) -> None:
    assert is_held_out(name)


def test_files_outside_the_library_are_no_part_of_it(root: Path) -> None:
    found = stdlib_modules(root)
    assert [m.name for m in found] == ["argparse", "json", "json.decoder", "test.test_json"]
    assert [m.held_out for m in found] == [False, True, True, True]
    assert [m.is_test for m in found] == [False, False, False, True]


def test_training_reads_no_held_out_text(root: Path) -> None:
    for tests in (False, True):
        assert training_texts(stdlib_modules(root), tests=tests) == [LONG.format(name="parse")]


def test_the_sides_share_no_package(modules: list[Module]) -> None:
    sources = [m for m in modules if not m.is_test]
    held = {split_key(m.name) for m in sources if m.held_out}
    assert held.isdisjoint(split_key(m.name) for m in sources if not m.held_out)
    assert 0.3 < len(held) / len({split_key(m.name) for m in sources}) < 0.5
    assert [m.name for m in modules] == sorted({m.name for m in modules})


def test_a_prompt_is_the_first_part_of_a_function(root: Path) -> None:
    prompts = held_out_functions(rng=np.random.default_rng(0), root=root)
    by_name = {p.qualname: p for p in prompts}
    assert by_name.keys() == {"load", "A.go"}
    full = LONG.format(name="load")
    assert by_name["load"].module == "json"
    assert by_name["load"].text == "\n".join(full.split("\n")[:6])
    assert by_name["A.go"].text.startswith("    def go(x):\n        '''Doc.'''\n")


def test_draws_are_reproducible_and_their_slices_disjoint(root: Path) -> None:
    def draw(seed: int, n: int | None = None) -> list[str]:
        rng = np.random.default_rng(seed)
        return [p.qualname for p in held_out_functions(n, rng=rng, root=root)]

    assert draw(1) == draw(1)
    assert draw(1, 1) == draw(1)[:1]
    assert len(set(draw(3))) == len(draw(3)) == 2


def test_asking_for_more_than_the_pool_says_how_many_there_are(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`n` must be between 0 and the pool's 2 functions, got 3"
    ):
        held_out_functions(3, rng=np.random.default_rng(0), root=root)
    with pytest.raises(ValueError, match="root"):
        stdlib_modules(root / "nowhere")
    with pytest.raises(ValueError, match="minimum_lines"):
        held_out_functions(rng=np.random.default_rng(0), root=root, minimum_lines=2)


def test_the_pool_serves_calibration_test_and_a_stream_ten_times_that_size() -> None:
    prompts = held_out_functions(rng=np.random.default_rng(0))
    assert len(prompts) >= 12 * 350
    assert len({p.text for p in prompts}) == len(prompts)
    assert all(is_held_out(p.module) for p in prompts)
    assert len({p.module for p in prompts}) > 100
    assert not any(p.text.endswith("\n") for p in prompts)


def test_prose_is_not_code() -> None:
    pieces = prose_prompts(20, rng=np.random.default_rng(0))
    assert len(set(pieces)) == 20
    assert all(len(piece.split()) >= 60 for piece in pieces)
    with pytest.raises(ValueError, match="pieces"):
        prose_prompts(10**6, rng=np.random.default_rng(0))


def test_reading_the_corpus_needs_no_torch() -> None:
    code = "import sys, adaptive._stdlib; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
