"""The command line: a round trip, and one clear line for everything that goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import adaptive._bench as bench
from adaptive import InvalidArgumentError, Policy
from adaptive.__main__ import main
from adaptive._cli import read_prompts


def _words(prompts: list[list[int]]) -> list[str]:
    return [" ".join(f"w{token}" for token in prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def home(
    saved_planted: Path,
    tools: SimpleNamespace,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model directory with exits and tokenizer, and prompts beside it."""
    import shutil

    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(saved_planted, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(_words(tools.prompts(120, seed=41))) + "\n")
    return folder


@pytest.fixture(scope="module")
def policy(home: Path) -> Path:
    """A policy calibrated through the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "seconds_per_token", lambda m, u, p, **_: 1.0 / (1 + _count(p))[None])
        patch.setattr(sys, "argv", ["adaptive", *_calibrate(home), "--out", str(home / "policy")])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code in (0, None)
    return home / "policy"


def _count(policies: Any) -> Any:
    import numpy as np

    return np.arange(len(policies))


def _calibrate(home: Path, **changes: Any) -> list[str]:
    settings = {
        "model": home / "model",
        "prompts": home / "prompts.txt",
        "risk": 0.15,
        "delta": 0.1,
        "mode": "exact",
        "new-tokens": 6,
        "batch-size": 40,
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    return ["calibrate", "--quiet", *(str(p) for k, v in settings.items() for p in (f"--{k}", v))]


def _call(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Run the command in this process: status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["adaptive", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def _is_one_line(status: int, err: str) -> None:
    assert status == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err


# -- the round trip -------------------------------------------------------------------------------


def test_calibrate_writes_a_certified_policy(policy: Path) -> None:
    assert sorted(path.name for path in policy.iterdir()) == ["policy.json"]
    saved = Policy.from_pretrained(policy)
    assert saved.certificate is not None
    assert saved.certificate.holds
    assert saved.certificate.risk == 0.15
    assert saved.certificate.decoding["max_new_tokens"] == 6
    assert set(saved.certificate.fingerprints) >= {"model", "exits", "data", "tokenizer"}


def test_inspect_says_what_is_promised(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    status, out, _ = _call(monkeypatch, capsys, "inspect", policy)
    assert status == 0
    text = " ".join(out.split())
    assert text.startswith("With probability at least 0.9")
    assert "mode: exact" in text
    status, out, _ = _call(monkeypatch, capsys, "inspect", policy / "policy.json", "--json")
    assert status == 0
    assert json.loads(out) == Policy.from_pretrained(policy).certificate.to_dict()  # type: ignore[union-attr]


def test_generate_under_the_policy(
    home: Path, policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    call = ("generate", "--model", home / "model", "--policy", policy, "--prompt", "w5 w9 w12")
    status, out, err = _call(monkeypatch, capsys, *call, "--new-tokens", 6)
    assert status == 0
    assert out.startswith("w5 w9 w12")
    assert len(out.split()) <= 9
    assert "of 4 layers, certified]" in err
    status, _, err = _call(monkeypatch, capsys, *call, "--new-tokens", 7)
    _is_one_line(status, err)
    assert "longer text" in err
    status, _, err = _call(monkeypatch, capsys, *call, "--new-tokens", 7, "--uncertified")
    assert status == 0
    assert "not certified]" in err


def test_the_module_runs_as_a_program(home: Path, policy: Path) -> None:
    def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adaptive", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=home, check=False)

    good = program("inspect", policy)
    assert good.returncode == 0
    assert "With probability at least 0.9" in " ".join(good.stdout.split())
    bad = program("inspect", home / "nothing")
    assert bad.returncode == 2
    assert bad.stdout == ""
    missing = f"no policy at {home / 'nothing'}: `save_pretrained` of a policy writes one"
    assert bad.stderr == f"error: {missing}\n"


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("no file", {"prompts": "nowhere.txt"}, "`prompts` must be an existing file"),
        ("a directory", {"prompts": "."}, "`prompts` must be an existing file"),
        ("risk of one", {"risk": 1}, "`risk` must be in (0, 1), got 1.0"),
        ("negative risk", {"risk": -0.1}, "`risk` must be in (0, 1), got -0.1"),
        ("risk nan", {"risk": "nan"}, "`risk` must be in (0, 1), got nan"),
        ("delta of zero", {"delta": 0}, "`delta` must be in (0, 1)"),
        ("no model", {"model": "nowhere"}, "`model` must be a causal language model"),
        ("unknown loss", {"loss": "bleu"}, "`loss` must be one of"),
        ("unknown mode", {"mode": "fast"}, "`mode` must be"),
        ("verify", {"mode": "verify"}, "`verify` mode has no risk"),
        ("too few tokens", {"new_tokens": 1}, "`new_tokens` must be at least 2"),
        ("no batch", {"batch_size": 0}, "`batch_size` must be at least 1"),
        ("unknown device", {"device": "warp"}, "`device` must be"),
    ],
    ids=lambda part: part if isinstance(part, str) and "`" not in part else "",
)
def test_bad_calls_of_calibrate(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    call = _calibrate(home, **changes)
    status, _, err = _call(monkeypatch, capsys, *call, "--out", tmp_path / "out")
    _is_one_line(status, err)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b"", "a file with at least one prompt"),
        ("prompts.txt", b"\n  \n", "a file with at least one prompt"),
        ("prompts.txt", b"\xff\xfe\x00w2", "text in UTF-8"),
        ("prompts.jsonl", b'{"prompt": "w2"}\n{broken\n', "line 2 of"),
        ("prompts.jsonl", b'{"question": "w2"}\n', "one of the keys prompt, text"),
        ("prompts.jsonl", b"17\n", "item 0 is of type int"),
        ("prompts.jsonl", b'{"prompt": "w2"}\nnull\n', "item 1 is of type NoneType"),
        ("prompts.jsonl", b'{"prompt": ""}\n', "an empty prompt at position 0"),
        ("prompts.jsonl", b'{"prompt": "w2"}\n', "at least 2"),
    ],
)
def test_bad_prompts(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    call = _calibrate(home, prompts=tmp_path / name)
    status, _, err = _call(monkeypatch, capsys, *call, "--out", tmp_path / "out")
    _is_one_line(status, err)
    assert message in err
    assert not (tmp_path / "out").exists()


def _damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _damaged_exits(folder: Path) -> None:
    (folder / "exits.json").write_text("{}")


@pytest.mark.parametrize(
    "damage", [_damaged_weights, _damaged_config, _no_tokenizer, _damaged_exits]
)
def test_bad_models(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, damage: Any
) -> None:
    import shutil

    shutil.copytree(home / "model", tmp_path / "model")
    damage(tmp_path / "model")
    call = _calibrate(home, model=tmp_path / "model")
    status, _, err = _call(monkeypatch, capsys, *call, "--out", tmp_path / "out")
    _is_one_line(status, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no policy at"),
        ("{", "is not a policy file"),
        ("[]", "policy schema 'list'"),
        ('{"schema": 99}', "policy schema 99"),
        ('{"schema": 1}', "the policy file is damaged"),
        (
            '{"schema": 1, "score": {"type": "Magic"}, "rule": {}, "stages": [0], "mode": "exact", '
            '"certificate": null}',
            "Magic",
        ),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_bad_policies(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    command: str,
    content: str | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "policy.json").write_text(content)
    call = {
        "inspect": ("inspect", tmp_path),
        "generate": (
            *("generate", "--model", home / "model", "--policy", tmp_path, "--prompt", "w2"),
        ),
    }[command]
    status, _, err = _call(monkeypatch, capsys, *call)
    _is_one_line(status, err)
    assert message in err


def test_a_policy_without_a_certificate_cannot_be_inspected(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Policy.from_pretrained(policy).member(0.5).save_pretrained(tmp_path)
    status, _, err = _call(monkeypatch, capsys, "inspect", tmp_path)
    _is_one_line(status, err)
    assert "has no certificate" in err


def test_a_policy_of_another_model_is_refused(
    home: Path,
    policy: Path,
    tools: SimpleNamespace,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    other = tools.model(amplitude=3.0)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    call = ("generate", "--model", tmp_path, "--policy", policy, "--prompt", "w2 w3")
    status, _, err = _call(monkeypatch, capsys, *call)
    _is_one_line(status, err)  # it has no exits of its own
    assert "exits" in err
    from adaptive import ExitTraining, train_exits

    training = ExitTraining(rank=0, new_tokens=4, slots=100)
    train_exits(other, tools.prompts(8, seed=1), training=training, progress=False).save_pretrained(
        tmp_path
    )
    status, _, err = _call(monkeypatch, capsys, *call, "--new-tokens", 4)
    _is_one_line(status, err)
    assert "another model" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "`prompt` must be a text of at least one token"),
        (["--prompt", "w2", "--new-tokens", "0"], "`new_tokens` must be at least 1"),
    ],
)
def test_bad_calls_of_generate(
    home: Path,
    policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    message: str,
) -> None:
    call = ("generate", "--model", home / "model", "--policy", policy, *arguments)
    status, _, err = _call(monkeypatch, capsys, *call)
    _is_one_line(status, err)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--risk", "2"], "`risk`"),
        (["--delta", "0"], "`delta`"),
        (["--units", "1"], "`units`"),
        (["--fresh", "0"], "`fresh`"),
    ],
)
def test_bad_calls_of_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    status, _, err = _call(monkeypatch, capsys, "demo", *arguments)
    _is_one_line(status, err)
    assert message in err


def test_output_is_whole_or_not_at_all(
    home: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A disk that fills up while the policy is written leaves the old one and ends in one line."""
    saved = Policy.from_pretrained(policy)
    saved.save_pretrained(tmp_path)
    before = (tmp_path / "policy.json").read_bytes()
    monkeypatch.setattr("adaptive._calibrate.calibrate", lambda *_, **__: saved.member(0.1))
    plain = Path.write_text

    def half(path: Path, text: str, **settings: Any) -> int:
        plain(path, text[:40], **settings)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    status, _, err = _call(monkeypatch, capsys, *_calibrate(home), "--out", tmp_path)
    _is_one_line(status, err)
    assert "No space left on device" in err
    assert (tmp_path / "policy.json").read_bytes() == before


# -- files of prompts -----------------------------------------------------------------------------


def test_prompts_from_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("w2 w3\n\n  w4\n")
    assert read_prompts(text) == ["w2 w3", "  w4"]
    lines = tmp_path / "prompts.jsonl"
    values = ["w2", {"prompt": "w3"}, {"messages": [{"role": "user", "content": "w4"}]}]
    lines.write_text("\n".join(map(json.dumps, values)))
    assert read_prompts(lines) == values


def test_separators_inside_a_line_are_no_new_line(tmp_path: Path) -> None:
    """JSON may hold U+2028 and the like unescaped; only a newline ends a record."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "w2\u2028w3"}\n{"prompt": "w4\x85"}\n', encoding="utf-8")
    assert [item["prompt"] for item in read_prompts(lines)] == ["w2\u2028w3", "w4\x85"]


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"w2"\n\n\n{broken\n')
    with pytest.raises(InvalidArgumentError, match="line 4 of"):
        read_prompts(lines)


def test_jsonl_and_chats_calibrate(
    home: Path, tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    items = [
        {"messages": [{"role": "user", "content": text}]}
        for text in _words(tools.prompts(12, seed=43))
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, items)))
    call = _calibrate(home, prompts=tmp_path / "chats.jsonl")
    status, out, _ = _call(monkeypatch, capsys, *call, "--out", tmp_path / "out")
    assert status == 0
    assert "Too few units" in " ".join(out.split())
    saved = Policy.from_pretrained(tmp_path / "out")
    assert saved.certificate is not None
    assert not saved.certificate.holds
    assert "chat_template" in saved.certificate.fingerprints
