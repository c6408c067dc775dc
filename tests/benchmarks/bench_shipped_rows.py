"""The shipped model in batches: whole calls under a policy, through the host's loop and compiled.

    python tests/benchmarks/bench_shipped_rows.py --rows 1,16 --rounds 7 --compiled

Process CPU time on one thread, variants taking turns; paired ratios to `model.generate` and to full
depth through the same kind of step, medians with 95 percent bootstrap intervals. The threshold
is given: what it promises is another script's matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from workshop import Clock, command_line, machine, ratio, rounds, shown, stamp

from adaptive import generate
from adaptive.examples import load_model, load_prompts
from adaptive.policies import NoScore, Policy, ProbeScore, Threshold


def main() -> None:
    parser = command_line(__doc__, out="shipped_rows.json", rounds=7, tokens=48)
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--threshold", type=float, default=0.877)
    parser.add_argument("--compiled", action="store_true", help="also compiled; takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model()
    early = Policy(ProbeScore(), Threshold(options.threshold), stages=(0, 1, 2))
    policies = {
        "full depth": Policy(NoScore(), Threshold(), stages=(2,), mode="propagate"),
        "exact": early,
        "propagate": Policy(early.score, early.rule, stages=early.stages, mode="propagate"),
    }
    report: dict[str, Any] = stamp(options, model) | {"machine": machine()}
    for rows in map(int, options.rows.split(",")):
        prompts = list(load_prompts(rows, rng=3))
        given = tokenizer(
            prompts, return_tensors="pt", padding=True, truncation=True, max_length=64
        )
        new = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        common = {name: given[name] for name in ("input_ids", "attention_mask")} | new
        variants: dict[str, Callable[[], Any]] = {
            "model.generate": lambda common=common: model.generate(**common, do_sample=False)
        }
        for compiled in (False, True)[: 1 + options.compiled]:
            for name, policy in policies.items():
                settings = common | {"policy": policy, "compiled": compiled, "do_sample": False}
                label = f"{name}, compiled" if compiled else name
                variants[label] = lambda settings=settings: generate(model, **settings)
        times = rounds(variants, count=options.rounds, clock=Clock("cpu"))
        found = report[f"{rows} rows"] = {}
        for name, seconds in times.items():
            full = times["full depth, compiled" if name.endswith("compiled") else "full depth"]
            found[name] = {
                "ms_per_token": float(np.median(seconds)) / options.tokens * 1e3,
                "speed against model.generate": ratio(times["model.generate"], seconds),
                "speed against full depth": ratio(full, seconds),
            }
            print(
                f"    {rows} rows, {name:22s} {found[name]['ms_per_token']:7.2f} ms, x"
                f"{shown(found[name]['speed against model.generate'])} of model.generate, x"
                f"{shown(found[name]['speed against full depth'])} of full depth"
            )
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
