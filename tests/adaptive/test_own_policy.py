"""A rule of the user's own, as docs/extending.md shows it, works everywhere that ours do."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from transformers import PreTrainedTokenizerFast

import adaptive._bench as bench
from adaptive import AdaptiveOutput, InvalidArgumentError, Policy, calibrate, generate
from adaptive.__main__ import main
from adaptive._cli import _import
from adaptive.displays import ExitDepthDisplay, RiskPathDisplay, TokenDepthDisplay
from adaptive.policies import AbstractRule, AbstractScore, ProbeScore
from adaptive.policies._base import State

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
NEW = 6


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's rule in a file of its own."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"## A rule.*?```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    file = tmp_path_factory.mktemp("own") / "my_rules.py"
    file.write_text(block[1], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def own(documented: Path) -> AbstractRule:
    """The rule, imported as a user would; it is ten lines, more or less, by statements."""
    _import(documented)
    rule: AbstractRule = AbstractRule._classes["TwiceInARow"]()
    return rule


@pytest.fixture(scope="module")
def model(tools: SimpleNamespace, saved_planted: Path) -> Any:
    return tools.reread(tools.model(), saved_planted)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured seconds that fall along the path, so that no test depends on the clock."""
    monkeypatch.setattr(
        bench, "seconds_per_token", lambda m, u, p, **_: 1.0 - 0.01 * np.arange(len(p))[None]
    )


@pytest.fixture(scope="module")
def certified(model: Any, own: AbstractRule, tools: SimpleNamespace) -> Policy:
    family = Policy(ProbeScore(), own, stages=(0, 1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench,
            "seconds_per_token",
            lambda m, u, p, **_: 1.0 - 0.01 * np.arange(len(p))[None],
        )
        return calibrate(
            model,
            tools.prompts(140, seed=43),
            0.15,
            0.1,
            policy=family,
            new_tokens=NEW,
            batch_size=64,
            progress=False,
        )


def _generated(model: Any, policy: Policy) -> AdaptiveOutput:
    ids = torch.tensor([[5, 9, 14, 20], [7, 8, 9, 11]])
    output = generate(
        model,
        ids,
        policy=policy,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AdaptiveOutput)
    return output


def test_it_is_certified_and_stops_early(model: Any, certified: Policy) -> None:
    certificate = certified.certificate
    assert certificate is not None
    assert certificate.holds
    assert type(certified.rule).__name__ == "TwiceInARow"
    assert math.isfinite(certified.rule.threshold)  # type: ignore[attr-defined]
    output = _generated(model, certified)
    assert output.certified
    stages = output.exit_stages
    assert stages is not None
    assert (stages < 3).any()
    assert (stages != 0).all()  # twice in a row: never at the first exit


def test_it_is_saved_and_comes_back_equal(model: Any, certified: Policy, tmp_path: Path) -> None:
    certified.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again == certified
    assert torch.equal(_generated(model, again).sequences, _generated(model, certified).sequences)


def test_a_class_that_was_not_imported_is_named(certified: Policy, tmp_path: Path) -> None:
    certified.save_pretrained(tmp_path)
    code = f"from adaptive.policies import Policy; Policy.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'TwiceInARow'" in done.stderr
    assert "import your own class first" in done.stderr


def test_displays_show_it(
    model: Any, certified: Policy, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert certified.certificate is not None
    output = _generated(model, certified)
    for display in (
        RiskPathDisplay.from_certificate(certified.certificate),
        ExitDepthDisplay.from_certificate(certified.certificate),
        ExitDepthDisplay.from_output(output, model),
    ):
        assert isinstance(display.plot().ax_, Axes)
    page = TokenDepthDisplay.from_output(output, model, tokenizer=tokenizer)._repr_html_()
    assert tokenizer.decode(output.sequences[0, -1:]) in page


def test_the_command_line_takes_it(
    saved_planted: Path,
    documented: Path,
    own: AbstractRule,
    tools: SimpleNamespace,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Calibrate, generate, inspect and report, with the file named by `--import`."""
    home = tmp_path / "model"
    shutil.copytree(saved_planted, home)
    tokenizer.save_pretrained(home)
    lines = [" ".join(f"w{token}" for token in prompt) for prompt in tools.prompts(140, seed=43)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    Policy(ProbeScore(), own, stages=(0, 1, 2)).save_pretrained(tmp_path / "family")

    def call(*arguments: Any) -> str:
        # a fresh process knows nothing of the class before the file is imported
        AbstractRule._classes.pop("TwiceInARow", None)
        monkeypatch.setattr(sys, "argv", ["adaptive", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert end.value.code in (0, None), captured.err
        return str(captured.out)

    shared = ("--model", home)
    settings = ("--risk", 0.15, "--delta", 0.1, "--new-tokens", NEW, "--batch-size", 64)
    own_file = ("--import", documented)
    files = ("--prompts", tmp_path / "prompts.txt", "--policy", tmp_path / "family")
    out = tmp_path / "policy"
    call(*own_file, "calibrate", *shared, *files, *settings, "--out", out, "--quiet")
    assert "TwiceInARow" in call(*own_file, "inspect", out)
    assert call(
        *own_file, "generate", *shared, "--policy", out, "--prompt", "w5 w9", "--new-tokens", NEW
    )
    call(*own_file, "report", out, "--out", tmp_path / "report.html")
    assert "TwiceInARow" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="`import`"):
        _import(tmp_path / "nothing.py")


def test_names_of_the_package_are_taken() -> None:
    """Saved policies mean ours: a class of the same name elsewhere is refused when defined."""
    with pytest.raises(InvalidArgumentError, match=r"saved policies mean .*_threshold\.Threshold"):

        @dataclass(frozen=True)
        class Threshold(AbstractRule):
            def init(self, batch_size: int, *, device: torch.device) -> State:
                return {}

            def decide(self, features: Any, score: Any, state: State) -> Any:
                return score > 0, state

            def with_knob(self, knob: float) -> Threshold:
                return self

            def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
                return (math.inf,)

    with pytest.raises(InvalidArgumentError, match=r"saved policies mean .*_scores\.Margin"):
        type("Margin", (AbstractScore,), {})
    from adaptive.policies import Margin, Threshold

    assert AbstractRule._classes["Threshold"] is Threshold
    assert AbstractScore._classes["Margin"] is Margin


def test_a_class_of_the_users_own_may_be_defined_again(documented: Path, own: AbstractRule) -> None:
    """In a notebook a cell is run twice; the newest definition is the one that counts."""
    before = AbstractRule._classes["TwiceInARow"]
    _import(documented)
    assert AbstractRule._classes["TwiceInARow"] is not before
    AbstractRule._classes["TwiceInARow"] = type(own)
