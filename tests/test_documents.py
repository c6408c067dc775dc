"""Every Python block of the README and the docs runs, and gives what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)[^)]*\)")


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


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path, monkeypatch) -> None:
    """The blocks of one page share their names, as a reader would type them one after another."""
    monkeypatch.chdir(tmp_path)
    if "my-model" in page.read_text():
        put_what_readers_bring(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "python":
            exec(compile(block, page.name, "exec"), names)
        else:
            examples = doctest.DocTestParser().get_doctest(block, names, page.name, page.name, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            assert runner.run(examples, clear_globs=False).failed == 0
            names = examples.globs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    assert [to for to in LINK.findall(page.read_text()) if not (page.parent / to).exists()] == []


def test_the_table_of_least_units_is_what_the_planner_says() -> None:
    from adaptive.calibration import minimum_units

    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for risk, *counts in rows:
        for delta, n in zip((0.1, 0.05, 0.01), counts, strict=True):
            assert minimum_units(float(risk), delta, loss_type="binary") == int(n)
            assert minimum_units(float(risk), delta) == int(n)
