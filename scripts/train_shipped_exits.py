"""Train the shipped model's exits on functions of training modules, and write them beside it.

Reproduce with ``python scripts/train_shipped_exits.py``: the interpreter's own standard library is
the data, the seed is fixed, and no held-out module is read.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive import ExitTraining, train_exits
from adaptive._stdlib import training_functions

_SHIPPED = Path(__file__).parent.parent / "adaptive" / "shipped"


def main(
    model: Annotated[
        Path, typer.Option(help="Directory of the model; exits are written there.")
    ] = _SHIPPED,
    prompts: Annotated[int, typer.Option(help="Functions of training modules.")] = 600,
    layers: Annotated[str, typer.Option(help="Layer counts below the exits.")] = "2,4,7",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Train translators and probes, seeded, resumable, and save them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = np.random.default_rng(seed)
    texts = [item.text for item in training_functions(prompts, rng=generator, maximum_lines=40)]
    progress = Path(tempfile.gettempdir()) / "adaptive-shipped-exits"
    exits = train_exits(
        loaded,
        texts,
        layers=[int(layer) for layer in layers.split(",")],
        training=ExitTraining(rank=32, new_tokens=48, batch_size=16, kept_vocabulary=512),
        tokenizer=tokenizer,
        checkpoint=progress,
        rng=seed,
    )
    exits.save_pretrained(model)
    shutil.rmtree(progress, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
