"""The model and the prompts to try things on."""

from __future__ import annotations

import pytest

from adaptive import get_exits
from adaptive.calibration import InvalidArgumentError
from adaptive.examples import SHIPPED, load_model, load_prompts


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHIPPED / "exits.safetensors").is_file(), reason="installed without the shipped model"
)
def test_the_model_has_trained_exits_and_a_tokenizer_that_gives_text_back() -> None:
    model, tokenizer = load_model()
    exits = get_exits(model)
    assert exits is not None
    assert exits.trained
    text = load_prompts(1)[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_missing_model_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("adaptive.examples.SHIPPED", tmp_path)
    with pytest.raises(InvalidArgumentError, match="shipped model"):
        load_model()


def test_slices_of_one_draw_are_disjoint() -> None:
    prompts = load_prompts(60, rng=3)
    assert len(set(prompts)) == 60
    assert prompts[:20] == load_prompts(20, rng=3)
    assert prompts != load_prompts(60, rng=4)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"the pool's \d+ functions, got 10000000"):
        load_prompts(10**7)
