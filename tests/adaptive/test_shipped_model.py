"""The shipped model: an ordinary model directory, with the figures its card states."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive._stdlib import HELD_OUT_PERCENT, held_out_functions, stdlib_modules

SHIPPED = Path(__file__).parents[2] / "adaptive" / "shipped"
BLOCK = 512


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((SHIPPED / "training.json").read_text())


@pytest.fixture(scope="module")
def sample(model: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy, [blocks, layers], on the first block of 24 held-out files."""
    sources = [m for m in stdlib_modules() if m.held_out and not m.is_test]
    loss, accuracy = [], []
    for i in np.random.default_rng(0).permutation(len(sources)):
        ids = tokenizer(sources[i].source(), truncation=True, max_length=BLOCK - 1).input_ids
        if len(ids) < BLOCK - 1:
            continue
        row = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            out = model.model(row[:, :-1], output_hidden_states=True, use_cache=False)
            states = [model.model.norm(h) for h in out.hidden_states[1:-1]]
            logits = [model.lm_head(h)[0] for h in (*states, out.last_hidden_state)]
        loss.append([float(cross_entropy(x, row[0, 1:])) for x in logits])
        accuracy.append([float((x.argmax(-1) == row[0, 1:]).float().mean()) for x in logits])
        if len(loss) == 24:
            break
    return np.array(loss), np.array(accuracy)


def test_it_is_a_plain_llama_directory() -> None:
    names = {path.name for path in SHIPPED.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 24e6


def test_it_is_stored_in_bfloat16_and_computed_in_float32(model: Any) -> None:
    with safe_open(SHIPPED / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 10 <= model.config.num_hidden_layers <= 16
    assert model.config.model_type == "llama"


def test_the_tokenizer_gives_text_back(tokenizer: Any) -> None:
    text = "def f(x):\n\tif x:\n        return 'é→', 3.14  # done\n\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_held_out_loss_is_what_the_card_says(
    sample: tuple[np.ndarray, np.ndarray], record: dict[str, Any]
) -> None:
    loss = sample[0][:, -1]
    stated, error = record["held_out"]["loss"][-1], record["held_out"]["loss_se"][-1]
    spread = np.hypot(error, loss.std(ddof=1) / np.sqrt(len(loss)))
    # Four standard errors, and room for another Python's standard library.
    assert abs(loss.mean() - stated) < 4 * spread + 0.1
    assert loss.mean() < 0.6 * np.log(4096)


def test_later_exits_read_better(
    sample: tuple[np.ndarray, np.ndarray], record: dict[str, Any]
) -> None:
    for losses, accuracies in (
        (sample[0].mean(axis=0), sample[1].mean(axis=0)),
        (record["held_out"]["loss"], record["held_out"]["accuracy"]),
    ):
        assert np.all(np.diff(losses) < 0.02)
        assert losses[-1] < losses[0] - 0.1
        assert accuracies[-1] > accuracies[0]
    assert record["held_out"]["agreement"][-1] == 1.0
    assert np.all(np.array(record["held_out"]["agreement"][5:]) > 0.5)


def test_the_card_states_the_recorded_figures(record: dict[str, Any]) -> None:
    card = (SHIPPED / "README.md").read_text()
    for side in ("held_out", "training"):
        for name in ("loss", "accuracy"):
            for value, error in zip(record[side][name], record[side][f"{name}_se"], strict=True):
                assert f"{value:.3f} ({error:.3f})" in card
    assert f"falls below {HELD_OUT_PERCENT} of 100" in card
    assert f"--steps {record['recipe']['steps']}" in card


def test_it_generates_indented_text(model: Any, tokenizer: Any) -> None:
    prompts = [p.text for p in held_out_functions(8, rng=np.random.default_rng(0))]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=256)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert sum("\n    " in text for text in texts) >= 4
