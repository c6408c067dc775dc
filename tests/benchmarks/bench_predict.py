"""Speed of `predict` when rows leave the batch: realised beside ideal, at several exit shares.

    python tests/benchmarks/bench_predict.py                # BERT- and ViT-like, batch 32
    python tests/benchmarks/bench_predict.py --rounds 3     # a quick look

Random weights, float32; exits after a quarter, a half and three quarters of the layers; which row
stops where is prescribed. Every round times every variant once, in an order that turns from round
to round, in the process's own CPU time. Reported are the median of the paired ratios to full
computation in the same round and a 95 percent bootstrap interval.

With L layers, mean depth d, and everything that is no layer (embeddings, head) as much as h layers,
ideal is (L + h) / (d + h): the exits' own reading, the rule, and taking rows out of the batch count
as nothing. Realised is full computation through `predict` over `predict` under the policy.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import adaptive
from adaptive import predict
from adaptive._classifier_exits import untrained_exits
from adaptive._encoders import EncoderRun
from adaptive.policies import AbstractRule, Features, MaxProbability, Policy, State

OUT = Path(__file__).parent / "results" / "predict.json"
LAYERS = 12
#: Share of the rows that stop at each exit; the rest goes to full depth.
SHARES = {
    "asked, none stops": (0.0, 0.0, 0.0),
    "a quarter at each exit": (0.25, 0.25, 0.25),
    "half at a half": (0.0, 0.5, 0.0),
    "half at a quarter": (0.5, 0.0, 0.0),
    "nine in ten at a quarter": (0.9, 0.0, 0.0),
    "all at a quarter": (1.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Prescribed(AbstractRule):
    """Rows of a batch stop where a table says, whatever the score."""

    exits: tuple[int, ...]
    nested: ClassVar[bool] = False

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"exits": torch.tensor(self.exits[:batch_size], device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return state["exits"] <= features.stage, state

    def with_knob(self, knob: float) -> Self:
        return self

    def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
        return (float("inf"),)


def prescribed(shares: tuple[float, ...], rows: int) -> Policy:
    """Stop these shares of the rows, in an order without a pattern."""
    counts = [round(share * rows) for share in shares]
    exits = [exit for exit, count in enumerate(counts) for _ in range(count)]
    exits += [len(shares)] * (rows - len(exits))
    order = np.random.default_rng(0).permutation(exits)
    rule = Prescribed(tuple(int(exit) for exit in order))
    return Policy(MaxProbability(), rule, stages=tuple(range(len(shares))))


def bert(rows: int, tokens: int = 64) -> tuple[Any, dict[str, Tensor]]:
    """A BERT of 12 layers, width 384, and texts of one length."""
    config = BertConfig(
        vocab_size=8000,
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        intermediate_size=1536,
    )
    ids = torch.randint(5, 8000, (rows, tokens))
    return BertForSequenceClassification(config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def vit(rows: int) -> tuple[Any, dict[str, Tensor]]:
    """A ViT of 12 layers, width 384, on images of 64 patches."""
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(rows, 3, 32, 32)}


def seconds(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of every variant in every round, after one round that warms up."""
    names = list(variants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            start = time.process_time()
            variants[name]()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: np.array(values) for name, values in found.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios, with a 95 percent bootstrap interval."""
    paired = numerator / denominator
    draws = np.random.default_rng(0).choice(paired, size=(2000, len(paired)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(paired)), "low": float(low), "high": float(high)}


@torch.no_grad()
def measured(
    build: Callable[[int], tuple[Any, dict[str, Tensor]]], rows: int, rounds: int
) -> dict[str, Any]:
    """Time one model under every table of exits."""
    torch.manual_seed(0)
    model, inputs = build(rows)
    model.eval()
    exits = untrained_exits(model, None).attach(model)
    depths = np.array([*exits.layers, LAYERS])
    policies = {name: prescribed(shares, rows) for name, shares in SHARES.items()}
    run = EncoderRun(model, inputs)
    embedded = run.hidden

    def layers() -> None:
        run.hidden = embedded
        run.forward(0, LAYERS)

    variants: dict[str, Callable[[], Any]] = {
        "layers alone": layers,
        "the model itself": lambda: model(**inputs),
        "full": lambda: predict(model, inputs),
    }
    for name, policy in policies.items():
        variants[name] = lambda policy=policy: predict(model, inputs, policy=policy)
    times = seconds(variants, rounds)
    layer = float(np.median(times["layers alone"])) / LAYERS
    rest = max(0.0, float(np.median(times["full"] - times["layers alone"]))) / layer
    table = {}
    for name, policy in policies.items():
        stopped = predict(model, inputs, policy=policy).exit_stages.numpy()
        depth = float(depths[stopped].mean())
        ideal = (LAYERS + rest) / (depth + rest)
        realised = ratio(times["full"], times[name])
        table[name] = {
            "mean_depth": depth,
            "ideal": ideal,
            "realised": realised,
            "of_ideal": {key: value / ideal for key, value in realised.items()},
        }
    return {
        "rows": rows,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layer_ms": 1e3 * layer,
        "rest_in_layers": rest,
        "model_over_full": ratio(times["the model itself"], times["full"]),
        "shares": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "adaptive": adaptive.__version__,
        },
        "rounds": options.rounds,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name, build in (("bert", bert), ("vit", vit)):
        report[name] = measured(build, options.rows, options.rounds)
        print(name, json.dumps(report[name], indent=2))
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
