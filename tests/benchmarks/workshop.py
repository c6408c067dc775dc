"""Shared by the decoding benchmarks: a model, prescribed exits, a clock, ratios, a command line."""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import adaptive
from adaptive import attach_exits, generate
from adaptive._exits import Exits, ExitsRecord
from adaptive._fingerprint import lineage
from adaptive.policies import AbstractRule, Features, Policy, State

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Prescribed(AbstractRule):
    """Stop at the exit that a table gives for the position, whatever the score."""

    pattern: tuple[int, ...]
    nested: ClassVar[bool] = False

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"pattern": torch.tensor(self.pattern, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        wanted = state["pattern"][(features.position - 1) % len(self.pattern)]
        return wanted <= features.stage, state

    def with_knob(self, knob: float) -> Self:
        return self

    def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
        return (float("inf"),)


def _independent() -> tuple[int, ...]:
    """Exits drawn without regard to each other; the last token goes to full depth."""
    rng = np.random.default_rng(0)
    drawn = rng.permutation([0] * 12 + [1] * 11 + [2] * 6 + [3] * 2)
    return (*(int(exit) for exit in drawn), 3)


#: Exit of each token in turn; 3 is full depth. All have mean depth one half over 32 tokens.
PATTERNS = {
    "all at one half": (1,),
    "four depths mixed": (1, 0, 2, 1, 0, 1, 0, 3),
    "two depths alternating": (0, 2),
    "independent": _independent(),
    "bursty": (0,) * 6 + (1,) * 6 + (2,) * 6 + (0,) * 6 + (1,) * 5 + (3,) * 3,
}


#: Shapes of Llama 3.2 1B and Llama 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
        **{"vocab_size": 128256, "tie_word_embeddings": True},
    },
    "8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        **{"vocab_size": 128256},
    },
}


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    """Random Llama whose layers behind the first exit say nothing: exits always agree."""
    torch.manual_seed(0)
    if options.shape:
        shape = SHAPES[options.shape]
        options.layers, options.width = shape["num_hidden_layers"], shape["hidden_size"]
        options.vocabulary = shape["vocab_size"]
    else:
        shape = {
            "vocab_size": options.vocabulary,
            "hidden_size": options.width,
            "intermediate_size": int(options.width * 2.7) // 32 * 32,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.width // 64,
            "num_key_value_heads": options.width // 128 or 1,
            "head_dim": 64,
        }
    config = LlamaConfig(
        **shape,
        max_position_embeddings=40960,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        dtype=options.dtype,
    )
    with torch.device(options.device):  # large ones are drawn where they live
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    with torch.no_grad():
        for layer in model.model.layers[options.layers // 4 :]:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
    places = tuple(options.layers * part // 4 for part in (1, 2, 3))
    record = ExitsRecord(model=lineage(model), settings={"benchmark": True})
    attach_exits(model, Exits(places, options.width, rank=0, record=record))
    return model


class Clock:
    """Seconds of a piece of work: CPU time of one thread; wall time of several, or of a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __call__(self, work: Callable[[], object]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        work()
        return clock() - start


def rounds(
    variants: dict[str, Callable[[], object]],
    *,
    count: int,
    clock: Clock,
    again: Callable[[str], bool] = lambda name: False,
) -> dict[str, np.ndarray]:
    """Time every variant in every round, after one untimed call each.

    One that any other call makes forget what it has captured is called ``again`` before.
    """
    for work in variants.values():
        work()
    names = list(variants)
    found = {name: np.zeros(count) for name in names}
    gc.disable()
    for turn in range(count):
        gc.collect()
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if again(name):
                variants[name]()
            found[name][turn] = clock(variants[name])
    gc.enable()
    return found


def ratio(over: np.ndarray, under: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios and its 95 percent bootstrap interval."""
    paired = over / under
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(paired, (4000, paired.size)), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(paired)), "low": float(low), "high": float(high)}


def shown(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def call(
    model: PreTrainedModel, ids: Tensor, new: int, policy: Policy | None, **settings: Any
) -> Callable[[], Any]:
    """A generation that is ready to run; without a policy, transformers' own."""
    common = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if policy is None:
        return lambda: model.generate(ids, **common)
    return lambda: generate(model, ids, policy=policy, **common, **settings)


def static_call(
    model: PreTrainedModel, ids: Tensor, new: int, *, compiled: bool = False, **settings: Any
) -> Callable[[], Any]:
    """`model.generate` with settings of a static cache; compiled, with its forward as a whole.

    On a GPU transformers compiles by itself with such a cache, and captures; on a CPU it does not.
    """
    common = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if not compiled:
        return lambda: model.generate(ids, **common, **settings)
    static = common | {"cache_implementation": "static"}
    if model.device.type != "cpu":
        return lambda: model.generate(ids, **static)
    fast = torch.compile(model.forward, dynamic=False)

    def run() -> Any:
        with mock.patch.object(model, "forward", fast):
            return model.generate(ids, **static)

    return run


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    return {
        "cpu": name,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "adaptive": adaptive.__version__,
    }


def command_line(description: str | None, *, out: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options that all have: the model's size, threads, device, and where the figures are kept."""
    assert description is not None
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    sizes = {"prompt": 16, "layers": 24, "width": 640, "vocabulary": 32000, "threads": 1}
    for name, default in (sizes | defaults).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="in place of layers, width, vocabulary")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--table", action="store_true", help="print the kept figures, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def stamp(options: argparse.Namespace, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """Machine, options and time of a measurement, and the model's size."""
    found: dict[str, Any] = {
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if model is not None:
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return found
