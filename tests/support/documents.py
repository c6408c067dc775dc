"""Pages of the README and the docs: their blocks of code, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Fences that are not code: pictures in letters, and Sphinx's directives.
NOT_CODE = frozenset({"text", "{toctree}", "{eval-rst}", "{figure}", "{image}", "{note}", "{math}"})
#: Fences that are run.
RUN = frozenset({"python", "pycon", "console"})

_REASON = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
_UNSAID = re.compile(r"[^\w\- ]")


@dataclass(frozen=True)
class Block:
    """One fence: its language, its text, its line, and why it is not run (``None``: it is)."""

    kind: str
    text: str
    line: int
    reason: str | None


def page_name(page: Path) -> str:
    """Name of a page, from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Fences of a page in order; a comment directly before one may say why it is not run."""
    before: Token | None = None
    for token in _tokens(page):
        if token.type == "fence":
            said = (
                _REASON.search(before.content) if before and before.type == "html_block" else None
            )
            kind = token.info.split()[0] if token.info else ""
            line = (token.map or [0])[0] + 1
            yield Block(kind, token.content, line, said[1] if said else None)
        before = token


def indented(page: Path) -> list[int]:
    """Lines at which a block of code is made by indentation: nothing says what it is."""
    return [(t.map or [0])[0] + 1 for t in _tokens(page) if t.type == "code_block"]


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead."""
    found = []
    for token in _inner(page):
        target = token.attrGet("href") or token.attrGet("src")
        if token.type in ("link_open", "image") and target is not None:
            found.append(str(target))
    return found


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    found: list[str] = []
    tokens = _tokens(page)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(child.content for child in inline.children or ())
            slug = _UNSAID.sub("", words.lower()).replace(" ", "-")
            again = found.count(slug)
            found.append(f"{slug}-{again}" if again else slug)
    return frozenset(found)


def put_what_readers_bring(folder: Path) -> None:
    """Write the model and the prompts that the pages speak of: a tiny model, 100 lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=letters[0])
    tokenizer.save_pretrained(folder / "my-model")
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    lines = [f"def function_{i}(argument):" for i in range(100)]
    (folder / "prompts.txt").write_text("\n".join(lines))


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _inner(page: Path) -> Iterator[Token]:
    for token in _tokens(page):
        yield from token.children or ()
