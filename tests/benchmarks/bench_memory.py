"""Peak memory of `generate` under a policy beside `model.generate` with a static cache.

    python tests/benchmarks/bench_memory.py                     # lengths and batches, CPU
    python tests/benchmarks/bench_memory.py --long 32768        # and a prompt of this length
    python tests/benchmarks/bench_memory.py --table             # the kept figures

Counted is every byte that torch's allocator hands out during a call (on a CPU by torch's profiler,
temporaries inside kernels included; on a GPU by the allocator's own peak): the model's weights are
not in it, they are there before. Packing the weights for the native tier and timing it, once per
model, are measured apart. "With weights" is (weights + peak) over the same of the static cache.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workshop import PATTERNS, Prescribed, build, command_line, stamp

from adaptive import generate
from adaptive._costs import costs_of
from adaptive._tier import executor_for
from adaptive.policies import Mode, NoScore, Policy, ProbeScore, Threshold

#: Prompt and new tokens.
LENGTHS = ((16, 64), (256, 64))
MODES: tuple[Mode, ...] = ("exact", "propagate", "verify")


def peak(work: Callable[[], Any], *, device: str = "cpu") -> int:
    """Most bytes that were allocated at once during a call, over what was before."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found: Any = profiler.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def variants(model: Any, ids: torch.Tensor, new: int) -> dict[str, Callable[[], Any]]:
    """The same text by each of them, as calls that are ready to run."""
    common: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    static = {"cache_implementation": "static", "disable_compile": True}
    rule = Prescribed(PATTERNS["four depths mixed"])
    policies = {"full depth": Policy(NoScore(), Threshold(), stages=(2,))} | {
        mode: Policy(ProbeScore(), rule, stages=(0, 1, 2), mode=mode) for mode in MODES
    }
    calls: dict[str, Callable[[], Any]] = {
        "static cache": functools.partial(model.generate, ids, **common, **static),
        "dynamic cache": functools.partial(model.generate, ids, **common),
    }
    calls |= {
        name: functools.partial(generate, model, ids, policy=policy, **common)
        for name, policy in policies.items()
    }
    return calls


def measured(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Peaks in MiB at every batch and length."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    packing = peak(lambda: executor_for(model), device=options.device)
    measuring = peak(lambda: costs_of(model), device=options.device)
    report: dict[str, Any] = {
        "weights_MiB": weights / 2**20,
        "packing_MiB": packing / 2**20,
        "measuring_MiB": measuring / 2**20,
        "cases": {},
    }
    for batch in (1, 8):
        for prompt, new in LENGTHS:
            ids = torch.randint(2, options.vocabulary, (batch, prompt), device=options.device)
            calls = variants(model, ids, new)
            found = {name: peak(work, device=options.device) for name, work in calls.items()}
            base = found["static cache"]
            name = f"batch {batch}, {prompt} + {new}"
            report["cases"][name] = {
                variant: {
                    "MiB": bytes_ / 2**20,
                    "over_static": bytes_ / base,
                    "with_weights": (weights + bytes_) / (weights + base),
                }
                for variant, bytes_ in found.items()
            }
            print(name, {key: round(value / 2**20, 2) for key, value in found.items()})
    return report


def long_prompt(options: argparse.Namespace) -> dict[str, Any]:
    """One long prompt on a narrow model: peaks, and whether the text is the model's own."""
    narrow = argparse.Namespace(**vars(options) | {"width": 64, "layers": 4, "vocabulary": 997})
    narrow.context = options.long + 64
    model = build(narrow)
    model.config.max_position_embeddings = narrow.context
    executor_for(model)
    ids = torch.randint(2, narrow.vocabulary, (1, options.long), device=options.device)
    kept, found, texts = ("dynamic cache", "full depth", "exact"), {}, {}
    for name, work in variants(model, ids, 8).items():
        if name in kept:

            def keeping(name: str = name, work: Callable[[], Any] = work) -> None:
                texts[name] = work()

            found[name] = peak(keeping, device=options.device) / 2**20
            print(options.long, name, round(found[name], 1), "MiB", flush=True)
    same = {name: torch.equal(text, texts["dynamic cache"]) for name, text in texts.items()}
    return {"prompt": options.long, "MiB": found, "same_text": same}


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in the docs."""
    names = ("static cache", "dynamic cache", "full depth", *MODES)
    lines = ["| case | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case, row in report["cases"].items():
        cells = [f"{row[names[0]]['MiB']:.1f} MiB"]
        cells += [
            f"{row[name]['over_static']:.2f}; {row[name]['with_weights']:.2f}" for name in names[1:]
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, out="memory.json", layers=8, width=256, long=0)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print(table(kept))
        return
    torch.set_num_threads(options.threads)
    report = measured(build(options), options) | stamp(options)
    if options.long:
        report["long"] = long_prompt(options)
    elif "long" in kept:
        report["long"] = kept["long"]
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
