"""Trace collection beside what it cannot avoid: one plain forward pass and the exits' heads.

    python tests/benchmarks/bench_trace.py --layers 24 --width 768

Both are measured in this run, in turns, on the same texts: the model's own forward pass without a
cache, plus one product with the head per exit and for the final states (reduced to the largest
logit, in the same chunks). The trace also reads probes and keeps scores and answers.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive import attach_exits
from adaptive._choose import Chooser
from adaptive._collect import _read
from adaptive._exits import ExitsRecord
from adaptive._full_depth import full_states
from adaptive.policies import ProbeScore

_CHUNK = 128
_RESULTS = Path(__file__).parent / "results"


def main(
    layers: Annotated[int, typer.Option()] = 24,
    width: Annotated[int, typer.Option()] = 640,
    vocabulary: Annotated[int, typer.Option()] = 32_000,
    batch: Annotated[int, typer.Option()] = 4,
    prompt: Annotated[int, typer.Option()] = 64,
    tokens: Annotated[int, typer.Option()] = 64,
    repeats: Annotated[int, typer.Option()] = 7,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Measure and print the ratio, median of repetitions taken in turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    model = LlamaForCausalLM(config).eval()
    exits = attach_exits(model, (layers // 4, layers // 2, 3 * layers // 4))
    exits.record = ExitsRecord(model=exits.record.model, settings={"random": True})
    ids = torch.randint(3, vocabulary, (batch, prompt + tokens))
    mask = torch.ones(batch, prompt, dtype=torch.int64)
    chooser = Chooser(transformers.LogitsProcessorList(), None)

    @torch.no_grad()
    def unavoidable() -> None:
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, prompt:]
        for _ in range(len(exits.layers) + 1):
            for start in range(0, tokens, _CHUNK):
                model.lm_head(hidden[:, start : start + _CHUNK]).argmax(dim=-1)

    def trace() -> None:
        states, readout = full_states(model, ids, mask, exits.layers)
        _read(exits, states, readout, ids, prompt, chooser, ProbeScore(), (0, 1, 2))

    spent: dict[str, list[float]] = {"unavoidable": [], "trace": []}
    for turn in range(repeats + 1):
        for name, work in (("unavoidable", unavoidable), ("trace", trace)):
            start = time.perf_counter()
            work()
            if turn:
                spent[name].append(time.perf_counter() - start)
    ratios = np.array(spent["trace"]) / np.array(spent["unavoidable"])
    record = {
        "ratio_median": float(np.median(ratios)),
        "ratio_quartiles": [float(value) for value in np.quantile(ratios, [0.25, 0.75])],
        "seconds": {name: float(np.median(values)) for name, values in spent.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": f"{platform.machine()}, {threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(record, indent=2))
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / "trace.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
