"""A tiny model whose exits are right for a known reason, prompts for it, and a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import helpers as tiny_models
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adaptive import Exits, ExitTraining, attach_exits, train_exits

EXITS = (1, 2, 3)
TRAINING = ExitTraining(rank=4, steps=40, new_tokens=12, slots=3000, batch_size=32)


@torch.no_grad()
def planted_model(*, amplitude: float = 8.0, **changes: Any) -> PreTrainedModel:
    """A Llama of 4 layers: the first computes, the second and last change some tokens' answers.

    How much a token's answer is changed is written in two directions of its embedding, which
    nothing else reads or writes: the probes can learn it, and exits 1 and 2 are as good as each
    other while exit 0 is worse.
    """
    settings = {"num_hidden_layers": 4, "intermediate_size": 32, "initializer_range": 0.5}
    model: PreTrainedModel = tiny_models.tiny("llama", exits=False, **settings | changes)
    generator = torch.Generator().manual_seed(5)
    flags = 2
    decoder: Any = model.model
    decoder.embed_tokens.weight[:, :flags] = (
        torch.rand(decoder.embed_tokens.weight.shape[0], flags, generator=generator).pow(3).mul(4.0)
    )
    model.get_output_embeddings().weight[:, :flags] = 0.0
    for index, layer in enumerate(decoder.layers):
        if index == 0:
            layer.self_attn.o_proj.weight[:flags] = 0.0
            layer.mlp.down_proj.weight[:flags] = 0.0
            continue
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if index in (1, 3):
            width = model.config.hidden_size
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
            turn[:flags] = 0.0
            turn[:, :flags] = 0.0
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.gate_proj.weight[:, index // 2] = 4.0
            layer.mlp.up_proj.weight.copy_(torch.eye(width))
            layer.mlp.down_proj.weight.copy_(amplitude * turn)
    return model


def random_prompts(count: int, *, seed: int, longest: int = 8) -> list[list[int]]:
    """Prompts of 3 to ``longest`` random tokens."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(2, 97, size=int(rng.integers(3, longest + 1))).tolist() for _ in range(count)
    ]


def reread(model: PreTrainedModel, saved: Path) -> PreTrainedModel:
    """The model again, with the saved exits: nothing is shared with other tests."""
    attach_exits(model, saved)
    return model


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What tests outside this file need of it."""
    return SimpleNamespace(
        EXITS=EXITS, TRAINING=TRAINING, model=planted_model, prompts=random_prompts, reread=reread
    )


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    return tiny_models


@pytest.fixture(scope="session")
def saved_planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the planted model with trained exits."""
    folder = tmp_path_factory.mktemp("planted")
    model = planted_model()
    exits = train_exits(
        model, random_prompts(96, seed=1), layers=EXITS, training=TRAINING, progress=False
    )
    model.save_pretrained(folder)
    exits.save_pretrained(folder)
    return folder


@pytest.fixture
def planted(saved_planted: Path) -> PreTrainedModel:
    """The planted model with its trained exits, fresh."""
    return reread(planted_model(), saved_planted)


@pytest.fixture
def planted_exits(planted: PreTrainedModel) -> Exits:
    from adaptive._exits import require_exits

    return require_exits(planted)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 .. w96 are the tokens 2 .. 96; a chat turn is its role and its words."""
    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, 97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")
    made.chat_template = (
        "{% for m in messages %}{{ 'w5 ' if m['role'] == 'user' else 'w6 ' }}{{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    return made
