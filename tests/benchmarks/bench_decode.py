"""Decoding speed: full depth against `model.generate`, prescribed early exits, cost of the policy.

    python tests/benchmarks/bench_decode.py                     # 150M Llama, float32, one thread
    python tests/benchmarks/bench_decode.py --width 64 --rounds 3 --parts a   # a quick look

Every round times every variant once, in an order that turns from round to round, so that what
else the machine does falls on all alike. On a CPU the process's own CPU time is taken, on a GPU
wall time. Reported are medians over rounds and, for ratios, the median of the paired ratios with
a 95 percent bootstrap interval.

a  Whole calls at full depth: ours on both tiers against `model.generate` with its dynamic cache and
   with its static one, batch 1, 8 and 32; with `--compiled` ours and the static one also compiled,
   which takes minutes.
b  Realised over ideal speed-up of exits prescribed by position, batch 1, `propagate`. With L
   layers, a head that costs as much as h layers and mean depth d, ideal is (L + h) / (d + h):
   checks, keys and values of skipped layers and the loop itself are counted as nothing. Realised
   is full depth over early exits, both through our native tier, the prompt's share taken off.
   Keep ``--steps`` a multiple of 32: then every pattern ends with nothing owed.
d  The same for `exact` and `verify`, at several inbox sizes.
e  As a, native tier only, for other families than Llama (`--families`), half as deep.
c  Time that the checks add to a token, as a share of a decode step at full depth.

Parts that are not run keep the figures they have in the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from workshop import (
    PATTERNS,
    Clock,
    Prescribed,
    build,
    call,
    command_line,
    machine,
    ratio,
    rounds,
    shown,
    stamp,
    static_call,
)

from adaptive import attach_exits
from adaptive._tier import executor_for
from adaptive.policies import NoScore, Policy, ProbeScore, Threshold


def build_other(family: str, options: argparse.Namespace) -> PreTrainedModel:
    """Random model of another family, of the benchmark's width and half its depth."""
    torch.manual_seed(0)
    width, layers, heads = options.width, options.layers // 2, options.width // 64
    names = {"GPT2": ("n_embd", "n_layer", "n_head", "n_inner")}
    usual = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = dict(zip(names.get(family, usual), (width, layers, heads, 4 * width), strict=True))
    if family == "OPT":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        sizes["word_embed_proj_dim"] = width
    if family.startswith("Gemma"):
        sizes |= {"head_dim": 64, "num_key_value_heads": heads // 2}
    kind = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=options.vocabulary, bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes
    )
    head = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model: PreTrainedModel = getattr(transformers, head)(config).eval().to(options.device)
    attach_exits(model, tuple(layers * part // 4 for part in (1, 2, 3)))
    return model


def unchecked() -> Policy:
    """Full depth without a single check (a policy of the library asks at least once)."""
    policy = Policy(NoScore(), Threshold(), stages=(0,))
    object.__setattr__(policy, "stages", ())
    return policy


def part_a(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    others = {"static cache": {"cache_implementation": "static", "disable_compile": True}}
    if options.compiled:
        others["static cache, compiled"] = {"compiled": True}
    return full_depth(
        model,
        options,
        clock,
        tiers=("native", "generic"),
        batches=tuple(map(int, options.batches.split(","))),
        others=others,
    )


def part_e(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for family in options.families.split(","):
        other = build_other(family, options)
        size = sum(parameter.numel() for parameter in other.parameters())
        print(f"    {family}, {size / 1e6:.0f}M parameters")
        found = full_depth(other, options, clock, tiers=("native",))
        report[family] = found | {"parameters": size}
    return report


def full_depth(
    model: PreTrainedModel,
    options: argparse.Namespace,
    clock: Clock,
    *,
    tiers: tuple[str, ...],
    batches: tuple[int, ...] = (1, 8),
    others: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Whole calls at full depth on each tier against `model.generate`."""
    report: dict[str, Any] = {}
    full = Policy(NoScore(), Threshold(), stages=(2,))
    for batch in batches:
        ids = torch.randint(2, options.vocabulary, (batch, options.prompt), device=options.device)
        new = options.tokens
        same = torch.equal(call(model, ids, new, full)(), call(model, ids, new, None)())
        ours = {tier: call(model, ids, new, full, tier=tier) for tier in tiers}
        if options.compiled:
            ours["native, compiled"] = call(model, ids, new, full, compiled=True)
        theirs = {name: static_call(model, ids, new, **how) for name, how in (others or {}).items()}
        times = rounds(
            {"model.generate": call(model, ids, new, None)} | theirs | ours,
            count=options.rounds,
            clock=clock,
        )
        plain = times["model.generate"]
        row = {
            "ms_per_token": {k: float(np.median(v)) / new * 1e3 for k, v in times.items()},
            "same_tokens": same,
        } | {f"model.generate / {name}": ratio(plain, times[name]) for name in ours}
        for own in (name for name in ours if name.startswith("native")):
            for name in theirs:
                row[f"{name} / {own}"] = ratio(times[name], times[own])
                print(f"    speed of {own} against {name} {shown(row[f'{name} / {own}'])}")
        report[f"batch {batch}"] = row
        per_step = {name: round(value, 2) for name, value in row["ms_per_token"].items()}
        print(f"    batch {batch}, ms per step {per_step}")
        for name in ours:
            found = shown(row[f"model.generate / {name}"])
            print(f"    speed of {name} against model.generate {found}")
    return report


@torch.no_grad()
def components(model: LlamaForCausalLM, context: int) -> dict[str, Callable[[], object]]:
    """All layers on one token, and the readout, on the native tier."""
    executor = executor_for(model, tier="native")
    slots = context + 1
    device = model.device
    executor.begin(
        batch_size=1,
        max_length=slots,
        padding=None,
        positions=torch.arange(slots, device=device)[None],
    )
    ids = torch.ones(1, context, dtype=torch.int64, device=device)
    executor.run(0, executor.layers, executor.embed(ids, 0), 0)
    hidden = executor.embed(ids[:, :1], context)

    def layers() -> None:
        with torch.no_grad():
            for _ in range(4):
                executor.truncate(context)
                executor.run(0, executor.layers, hidden, context)

    def head() -> None:
        with torch.no_grad():
            for _ in range(4):
                executor.readout(hidden[:, -1])

    return {"layers": layers, "head": head}


def part_b(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    cases = [("propagate", name, 32) for name in PATTERNS]
    cases += [("propagate", "four depths mixed", pending) for pending in (1, 8)]
    return prescribed(model, options, clock, cases)


def part_d(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    cases = [
        (mode, name, pending)
        for mode in ("exact", "verify")
        for name, sizes in (("four depths mixed", (32,)), ("all at one half", (4, 8, 16, 32)))
        for pending in sizes
    ]
    return prescribed(model, options, clock, cases)


def prescribed(
    model: LlamaForCausalLM,
    options: argparse.Namespace,
    clock: Clock,
    cases: list[tuple[str, str, int]],
) -> dict[str, Any]:
    """Realised and ideal speed-up of (mode, pattern, largest inbox)."""
    ids = torch.randint(2, options.vocabulary, (1, options.prompt), device=options.device)
    new = options.steps + 1
    full = Policy(NoScore(), Threshold(), stages=(2,))
    plan = {
        f"{mode}, {name}, inbox {pending}": (
            Policy(ProbeScore(), Prescribed(PATTERNS[name]), stages=(0, 1, 2), mode=mode),
            pending,
        )
        for mode, name, pending in cases
    }
    variants = {
        name: call(model, ids, new, policy, max_pending=pending)
        for name, (policy, pending) in plan.items()
    }
    depths, agreement = {}, {}
    for name, (policy, pending) in plan.items():
        output = call(model, ids, new, policy, max_pending=pending, return_dict_in_generate=True)()
        depths[name] = output.mean_depth
        known = output.agreement[output.agreement >= 0].float()
        agreement[name] = float(known.mean()) if known.numel() else None
    variants |= {
        "full": call(model, ids, new, full),
        "model.generate": call(model, ids, new, None),
        "prompt": call(model, ids, 1, full),
        "prompt of model.generate": call(model, ids, 1, None),
    }
    variants |= components(model, options.prompt + new // 2)
    times = rounds(variants, count=options.rounds, clock=clock)
    layer = float(np.median(times["layers"])) / 4 / options.layers
    head = float(np.median(times["head"])) / 4
    h = head / layer
    steps = new - 1
    decode = {name: (times[name] - np.median(times["prompt"])) / steps for name in plan}
    decode["full"] = (times["full"] - np.median(times["prompt"])) / steps
    theirs = times["model.generate"] - np.median(times["prompt of model.generate"])
    decode["model.generate"] = theirs / steps
    print(f"    one layer {layer * 1e3:.3f} ms, head {head * 1e3:.2f} ms: h = {h:.2f} layers")
    print(
        f"    full depth {np.median(decode['full']) * 1e3:.2f} ms per token, "
        f"model.generate {np.median(decode['model.generate']) * 1e3:.2f} ms"
    )
    report: dict[str, Any] = {
        "layer_ms": layer * 1e3,
        "head_ms": head * 1e3,
        "full_ms": float(np.median(decode["full"])) * 1e3,
        "model.generate_ms": float(np.median(decode["model.generate"])) * 1e3,
        "cases": {},
    }
    for name in plan:
        ideal = (options.layers + h) / (depths[name] + h)
        realised = ratio(decode["full"], decode[name])
        share = {key: value / ideal for key, value in realised.items()}
        report["cases"][name] = {
            "ms_per_token": float(np.median(decode[name])) * 1e3,
            "mean_depth": depths[name],
            "agreement": agreement[name],
            "ideal": ideal,
            "realised": realised,
            "realised / ideal": share,
            "against model.generate": ratio(decode["model.generate"], decode[name]),
        }
        print(
            f"    {name:38s} {np.median(decode[name]) * 1e3:7.2f} ms, depth {depths[name]:5.2f}, "
            f"x{realised['median']:.2f} of x{ideal:.2f}: {shown(share)}"
        )
    return report


class Silent:
    """A readout that reads nothing."""

    def __init__(self, answer: Tensor) -> None:
        self.answer, self.device = answer, answer.device

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.answer

    def among(self, hidden: Tensor, rows: list[int], *, into: Tensor | None = None) -> Tensor:
        return self.answer


def part_c(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Whole runs on an executor whose layers do nothing: what is left is the loop."""
    from adaptive import _generate

    step = components(model, options.prompt + options.tokens // 2)
    idle = executor_for(model, tier="native")
    idle.run = lambda low, high, hidden, start, **_: hidden  # type: ignore[method-assign]
    idle.readout = Silent(torch.zeros(1, 8, device=options.device))  # type: ignore[assignment]
    ids = torch.ones(1, 1, dtype=torch.int64, device=options.device)
    checked = Policy(ProbeScore(), Threshold(), stages=(0, 1, 2))
    new = 257
    known = _generate.executor_for, _generate.check_stages
    _generate.executor_for = lambda *_, **__: idle
    _generate.check_stages = lambda *_: None
    try:
        loops = {
            "checked": call(model, ids, new, checked),
            "unchecked": call(model, ids, new, unchecked()),
        }
        times = rounds(loops | step, count=options.rounds, clock=clock)
    finally:
        _generate.executor_for, _generate.check_stages = known
    added = (times["checked"] - times["unchecked"]) / (new - 1)
    whole = (times["layers"] + times["head"]) / 4 + times["unchecked"] / (new - 1)
    share = ratio(added, whole)
    print(
        f"    three checks add {np.median(added) * 1e6:.0f} us to a step of "
        f"{np.median(whole) * 1e3:.2f} ms: share {shown(share)}; the loop without checks takes "
        f"{np.median(times['unchecked']) / (new - 1) * 1e6:.0f} us"
    )
    return {
        "added_us": float(np.median(added)) * 1e6,
        "step_ms": float(np.median(whole)) * 1e3,
        "loop_us": float(np.median(times["unchecked"])) / (new - 1) * 1e6,
        "share": share,
    }


def main() -> None:
    parser = command_line(__doc__, out="decode.json", parts="abcd", rounds=11, tokens=33, steps=64)
    parser.add_argument("--families", default="GPTNeoX,GPT2,Phi3,Gemma2", help="part e")
    parser.add_argument("--compiled", action="store_true", help="part a")
    parser.add_argument("--batches", default="1,8,32", help="part a")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(machine()), f"{size / 1e6:.0f}M parameters, {model.dtype}")
    clock = Clock(options.device)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    for letter, part in (("a", part_a), ("b", part_b), ("c", part_c), ("d", part_d), ("e", part_e)):
        if letter in options.parts:
            print(f"({letter})")
            report[letter] = part(model, options, clock) | stamp(options, model)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
