"""Source code of the Python standard library as a corpus: modules, a fixed split, prompts.

The interpreter that runs this code brings the corpus with it: nothing is downloaded. Whole
top-level modules are held out, by a hash of the name, so every Python draws the same line between
what the shipped model was trained on and what calibration, tests and streams may use.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from adaptive.calibration import InvalidArgumentError

HELD_OUT_PERCENT = 40
"""Modules whose name hashes below this many hundredths are held out."""

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "lib-dynload", "encodings", "pydoc_data", "__phello__"}
    | {"data", "__pycache__"}
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Module:
    """A source file of the standard library.

    Parameters
    ----------
    name : str
        Dotted name below the library's root, such as ``"asyncio.base_events"``.
    path : Path
        The file.
    held_out : bool
        Whether the module is kept away from training.
    is_test : bool
        Whether the file belongs to a test suite (``test``, or ``tests`` inside a package).
    """

    name: str
    path: Path
    held_out: bool
    is_test: bool = False

    def source(self) -> str:
        """Text of the file, decoded as the interpreter would, with Unix line ends."""
        with tokenize.open(self.path) as file:
            return file.read()


@dataclass(frozen=True)
class FunctionPrompt:
    """The first part of a function, as it stands in its file.

    Parameters
    ----------
    text : str
        Signature, docstring and about half of the lines, without the last line end.
    module : str
        Dotted name of the module: the cluster this unit belongs to.
    qualname : str
        Name of the function inside the module, with the classes around it.
    """

    text: str
    module: str
    qualname: str


def split_key(name: str) -> str:
    """Name that decides on which side of the split a module lies.

    The top-level name, without the underscores and the ``py`` of private twins, so that
    ``_pydecimal`` goes with ``decimal``.

    Examples
    --------
    >>> split_key("asyncio.base_events"), split_key("_pydecimal"), split_key("_weakrefset")
    ('asyncio', 'decimal', 'weakrefset')
    """
    top = name.partition(".")[0]
    return (top.removeprefix("_py") if top.startswith("_py") else top).lstrip("_") or top


def is_held_out(name: str) -> bool:
    """Whether the module with this dotted name is kept away from training.

    The first eight bytes of the SHA-256 of `split_key`, modulo 100, are compared with
    `HELD_OUT_PERCENT`. In the ``test`` package a file goes with the module it tests:
    ``test.test_json`` with ``json``, ``test.test_http_cookies`` with ``http``.

    Examples
    --------
    >>> is_held_out("test.test_json.test_dump") or not is_held_out("json.decoder")
    True
    """
    parts = name.split(".")
    if parts[0] != "test" or len(parts) == 1:
        return _hashes_low(split_key(name))
    subject = parts[1].removeprefix("test_")
    first = subject.lstrip("_").partition("_")[0]
    keys = {split_key(subject), first, first.rstrip("0123456789")} - {""}
    return any(_hashes_low(key) for key in keys)


def stdlib_modules(root: Path | None = None) -> list[Module]:
    """Source modules of the standard library, sorted by name.

    Third-party packages, generated tables (``encodings``, ``pydoc_data``, the build's own
    configuration) and the deliberately broken files of the test suites are left out.

    Parameters
    ----------
    root : Path, optional
        Folder of the library; the running interpreter's by default.

    Returns
    -------
    list of Module
        Test files are marked `Module.is_test`; some distributions ship none.
    """
    base = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not base.is_dir():
        raise InvalidArgumentError("root", root, "an existing folder with Python sources")
    found = (_module(path, base) for path in _files(base))
    return sorted((m for m in found if m is not None), key=lambda module: module.name)


def training_texts(modules: Sequence[Module], *, tests: bool) -> list[str]:
    """Texts of the modules that training may read, without repeats and without empty files.

    Parameters
    ----------
    modules : sequence of Module
        The corpus, as `stdlib_modules` gives it.
    tests : bool
        Whether files of test suites are read as well.
    """
    chosen = (m for m in modules if not m.held_out and (tests or not m.is_test))
    return list(dict.fromkeys(text for m in chosen if (text := m.source()).strip()))


def held_out_functions(
    n: int | None = None,
    *,
    rng: np.random.Generator,
    minimum_lines: int = 5,
    maximum_lines: int = 120,
    root: Path | None = None,
) -> list[FunctionPrompt]:
    """Prompts from functions of held-out modules, in random order.

    The pool is every function or method of a held-out module outside the test suites that has
    between `minimum_lines` and `maximum_lines` lines; identical prompts are kept once. Slices of
    one draw are disjoint, so calibration units, test units and a stream may be cut from it.

    Parameters
    ----------
    n : int, optional
        Number of prompts; the whole pool by default.
    rng : Generator
        Draws the order.
    minimum_lines, maximum_lines : int
        Size of the functions, in lines of source, signature included.
    root : Path, optional
        Folder of the library; the running interpreter's by default.

    Returns
    -------
    list of FunctionPrompt

    Raises
    ------
    InvalidArgumentError
        If `n` exceeds the pool.

    Notes
    -----
    Functions of one module share an author and a subject. They are independent units only as random
    draws from this named pool; for a promise about new modules, group by `FunctionPrompt.module`.
    """
    return _drawn(n, rng, _pool(root, minimum_lines, maximum_lines, held_out=True))


def training_functions(
    n: int | None = None,
    *,
    rng: np.random.Generator,
    minimum_lines: int = 5,
    maximum_lines: int = 120,
    root: Path | None = None,
) -> list[FunctionPrompt]:
    """Prompts from functions of the modules that training reads; see `held_out_functions`.

    They shaped the shipped model and its exits and are never fit for a test.
    """
    return _drawn(n, rng, _pool(root, minimum_lines, maximum_lines, held_out=False))


def _drawn(
    n: int | None, rng: np.random.Generator, prompts: tuple[FunctionPrompt, ...]
) -> list[FunctionPrompt]:
    if n is not None and not 0 <= n <= len(prompts):
        raise InvalidArgumentError("n", n, f"between 0 and the pool's {len(prompts)} functions")
    return [prompts[i] for i in rng.permutation(len(prompts))[:n]]


def prose_prompts(n: int, *, rng: np.random.Generator, words: int = 60) -> list[str]:
    """English prose: pieces of the language reference that Python carries for ``help()``.

    Traffic of another kind than the source code, for demonstrations of drift.

    Parameters
    ----------
    n : int
        Number of pieces.
    rng : Generator
        Draws the pieces, without repeats.
    words : int
        Least number of words in a piece; it ends with a paragraph.
    """
    from pydoc_data.topics import topics

    pieces = sorted({p for text in topics.values() for p in _paragraphs(text, words)})
    if not 0 <= n <= len(pieces):
        raise InvalidArgumentError("n", n, f"between 0 and the {len(pieces)} pieces there are")
    return [pieces[i] for i in rng.permutation(len(pieces))[:n]]


def _hashes_low(key: str) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def _files(base: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


@lru_cache(maxsize=4)
def _pool(
    root: Path | None, minimum: int, maximum: int, *, held_out: bool
) -> tuple[FunctionPrompt, ...]:
    """Functions of so many lines of one side's modules, identical prompts once."""
    if not 4 <= minimum <= maximum:
        raise InvalidArgumentError("minimum_lines", minimum, f"in 4..{maximum}, `maximum_lines`")
    pool: dict[str, FunctionPrompt] = {}
    for module in stdlib_modules(root):
        if module.held_out == held_out and not module.is_test:
            for prompt in _functions(module, minimum, maximum):
                pool.setdefault(prompt.text, prompt)
    return tuple(pool.values())


def _module(path: Path, base: Path) -> Module | None:
    parts = list(path.relative_to(base).with_suffix("").parts)
    if parts[0].startswith(("config-", "_sysconfigdata")) or parts[-1].startswith("bad"):
        return None
    is_test = not _TEST_FOLDERS.isdisjoint(parts[:-1])
    if parts[-1] == "__init__":
        parts.pop()
    name = ".".join(parts)
    module = Module(name=name, path=path, held_out=is_held_out(name), is_test=is_test)
    return module if all(part.isidentifier() for part in parts) else None


def _parse(module: Module) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(module.source())
    except (SyntaxError, ValueError, UnicodeDecodeError, RecursionError, MemoryError):
        return None


def _functions(module: Module, minimum: int, maximum: int) -> Iterator[FunctionPrompt]:
    tree = _parse(module)
    lines = module.source().split("\n")
    stack: list[tuple[ast.AST, str]] = [(tree, "")] if tree else []
    while stack:
        node, prefix = stack.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            qualname = f"{prefix}{child.name}"
            stack.append((child, f"{qualname}."))
            if isinstance(child, ast.ClassDef):
                continue
            first, last = child.lineno, child.end_lineno or child.lineno
            if minimum <= last - first + 1 <= maximum:
                text = "\n".join(lines[first - 1 : _cut(child, last)]).rstrip()
                yield FunctionPrompt(text=text, module=module.name, qualname=qualname)


def _cut(function: ast.FunctionDef | ast.AsyncFunctionDef, last: int) -> int:
    """Line after which the prompt ends: past the docstring, halfway through what remains."""
    body = function.body
    has_docstring = ast.get_docstring(function, clean=False) is not None
    start = (body[0].end_lineno or body[0].lineno) if has_docstring else body[0].lineno - 1
    return start + (last - start) // 2


def _paragraphs(text: str, words: int) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(len(part.split()) for part in piece) >= words:
            yield "\n\n".join(piece) + "\n\n"
            piece = []
