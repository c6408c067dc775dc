"""The step in fixed shapes: captured whole, by segment, or not; and what its parts cost.

    python tests/benchmarks/bench_device.py --device cuda --dtype bfloat16 --shape 8b --compiled
    python tests/benchmarks/bench_device.py --layers 8 --width 128 --tokens 17 --rounds 3   # a look

Part `calls`: whole calls, exits prescribed by position (mean depth one half) and full depth,
through the host's loop and through the step in fixed shapes, beside `model.generate` with its
dynamic cache and its static one, with `--compiled` compiled too. Realised is full depth over early
exits, both through the same kind of step.

Part `pieces`: seconds of the pieces of a step, on a GPU each replayed as a graph of its own: the
probe behind a segment, an IF node whose body is skipped, the stacked fill of all skipped layers and
the settling of a window; and the share of the memory's speed that a step at full depth reaches,
weights and cache over the time, the speed being that of a copy on this machine.

On a CPU nothing is captured: the figures then say what fixed shapes cost, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
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

from adaptive._device_stack import DeviceStack, ExactDeviceStack, PropagateDeviceStack
from adaptive._exits import require_exits
from adaptive._graphs import Direct, only_if
from adaptive._pieces import Perform, Piece, perform, perform_compiled
from adaptive._tier import executor_for
from adaptive.policies import NoScore, Policy, ProbeScore, Threshold

ASKED = (0, 1, 2)
REPEATS = 20


def kinds(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Kinds of steps that this machine can run, and the settings that ask for them."""
    found: dict[str, dict[str, Any]] = {"host": {}, "none": {"capture": "none"}}
    if options.device.startswith("cuda"):
        found["segments"] = {"capture": "segments"}
        if hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            found["step"] = {"capture": "step"}
    if options.compiled:
        fixed = {name: how for name, how in found.items() if how}
        found |= {f"{name}, compiled": how | {"compiled": True} for name, how in fixed.items()}
    return found


def calls(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    report: dict[str, Any] = {}
    full = Policy(NoScore(), Threshold(), stages=ASKED)
    for batch in map(int, options.batches.split(",")):
        shape = (batch, options.prompt)
        ids = torch.randint(2, options.vocabulary, shape, device=options.device)
        plan = {
            f"{mode}, {name}": Policy(
                ProbeScore(), Prescribed(PATTERNS[name]), stages=ASKED, mode=mode
            )
            for mode in ("propagate", "exact")
            for name in options.patterns.split(",")
        } | {"full depth": full}
        variants: dict[str, Callable[[], Any]] = {
            "model.generate": call(model, ids, options.tokens, None),
            "static cache": static_call(
                model, ids, options.tokens, cache_implementation="static", disable_compile=True
            ),
        }
        if options.compiled:
            compiled = static_call(model, ids, options.tokens, compiled=True)
            variants["static cache, compiled"] = compiled
        variants |= {
            f"{name} | {kind}": call(model, ids, options.tokens, policy, **how)
            for name, policy in plan.items()
            for kind, how in kinds(options).items()
        }
        times = rounds(variants, count=options.rounds, clock=clock, again=_captured)
        plain = times["model.generate"]
        found = {
            name: {
                "ms_per_token": float(np.median(seconds)) / options.tokens * 1e3,
                "speed against model.generate": ratio(plain, seconds),
                "speed against full depth": ratio(
                    times[f"full depth | {name.split(' | ')[-1]}"], seconds
                ),
            }
            for name, seconds in times.items()
            if " | " in name
        } | {
            name: {
                "ms_per_token": float(np.median(seconds)) / options.tokens * 1e3,
                "speed against model.generate": ratio(plain, seconds),
            }
            for name, seconds in times.items()
            if name.startswith("static cache")
        }
        report[f"batch {batch}"] = found
        for name, row in found.items():
            inside = row.get("speed against full depth")
            print(
                f"    batch {batch}, {name:40s} {row['ms_per_token']:8.3f} ms, x"
                f"{shown(row['speed against model.generate'])} of model.generate"
                + ("" if inside is None else f", x{shown(inside)} of full depth")
            )
    return report


def _captured(name: str) -> bool:
    return " | step" in name or " | segments" in name


@torch.no_grad()
def begun(
    kind: type[DeviceStack], model: LlamaForCausalLM, options: argparse.Namespace
) -> DeviceStack:
    """A stack of one row that has taken a few steps."""
    executor = executor_for(model, tier="native")
    slots = options.prompt + 64
    positions = torch.arange(slots, device=options.device)[None]
    executor.begin(batch_size=1, max_length=slots, padding=None, positions=positions)
    policy = Policy(ProbeScore(), Threshold(), stages=ASKED)
    keys = torch.zeros(1, dtype=torch.int64, device=options.device)
    stack = kind(
        executor,  # type: ignore[arg-type]
        require_exits(model),
        policy,
        batch=1,
        most=options.window,
        keys=keys,
        seed=0,
        runner=Direct(),
    )
    ids = torch.randint(2, options.vocabulary, (1, slots), device=options.device)
    stack.prefill(ids[:, : options.prompt])
    for _ in range(4):
        stack.step(ids, torch.ones(1, dtype=torch.bool, device=options.device))
    return stack


def seconds_of(work: Callable[[], None], stack: DeviceStack, clock: Clock) -> float:
    """Least seconds of a piece: on a GPU of its replay, on a CPU of its operators."""
    slot = stack.slot.clone()

    def again() -> None:
        stack.slot.copy_(slot)
        work()

    again()
    run = again
    if clock.cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again()
        run = graph.replay

    def many() -> None:
        for _ in range(REPEATS):
            run()

    return min(clock(many) for _ in range(5)) / REPEATS


@torch.no_grad()
def pieces(model: LlamaForCausalLM, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    exact = begun(ExactDeviceStack, model, options)
    cheap = begun(PropagateDeviceStack, model, options)

    def step(stack: DeviceStack, perform: Perform = perform) -> None:
        perform(stack, Piece("begin"))
        for segment in range(1, stack.segments):
            perform(stack, Piece("segment", segment, alone=True))
        perform(stack, Piece("finish"))

    found = {
        "step at full depth, propagate": seconds_of(lambda: step(cheap), cheap, clock),
        "step at full depth, exact": seconds_of(lambda: step(exact), exact, clock),
        "probe and decision": seconds_of(lambda: cheap.ask(1), cheap, clock),
        "head": seconds_of(
            lambda: cheap.logits.copy_(cheap.executor.readout(cheap.states)), cheap, clock
        ),
        "stacked fill of a window": seconds_of(cheap.flush, cheap, clock),
        "settling of a window": seconds_of(exact.flush, exact, clock),
    }
    best = "step at full depth, propagate"
    if options.compiled:
        best = "step at full depth, propagate, compiled"
        found[best] = seconds_of(lambda: step(cheap, perform_compiled), cheap, clock)
    if clock.cuda and hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        found["IF node"] = _if_node(cheap, clock)
    read = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        read -= model.get_input_embeddings().weight.nbytes
    length = options.prompt + 4
    cache = cheap.executor.keys_values(0)[0].nbytes // max(1, cheap.executor._length[0])
    read += 2 * options.layers * cache * length
    limit = read / copy_speed(options, clock)
    report: dict[str, Any] = {
        "seconds": found,
        "bytes_per_step": read,
        "seconds_at_copy_speed": limit,
        "share_of_memory_speed": limit / found[best],
    }
    for name, value in found.items():
        print(f"    {name:32s} {value * 1e6:10.1f} us")
    print(f"    full depth reaches {report['share_of_memory_speed']:.2f} of the memory's speed")
    return report


def _if_node(stack: DeviceStack, clock: Clock) -> float:
    """Seconds that an IF node whose body is skipped adds, from 16 of them in a row."""
    flag, place = torch.zeros_like(stack.overdue), torch.zeros(1, device=stack.slot.device)

    def nodes(count: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            place.add_(1)
            for _ in range(count):
                with only_if(graph, flag):
                    place.add_(1)
        return graph.replay

    def timed(run: Callable[[], None]) -> float:
        return min(clock(lambda: [run() for _ in range(REPEATS)]) for _ in range(5)) / REPEATS

    return (timed(nodes(16)) - timed(nodes(0))) / 16


def copy_speed(options: argparse.Namespace, clock: Clock) -> float:
    """Bytes per second that a large copy reads and writes together."""
    size = 2**28 if clock.cuda else 2**24
    source: Tensor = torch.ones(size, device=options.device)
    target = torch.empty_like(source)
    best = min(clock(lambda: target.copy_(source)) for _ in range(8))
    return 2 * source.nbytes / best


def main() -> None:
    parser = command_line(__doc__, out="device.json", rounds=7, tokens=65, window=32)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--patterns", default="all at one half,independent,bursty")
    parser.add_argument("--parts", default="calls,pieces")
    parser.add_argument("--compiled", action="store_true", help="steps compiled too; takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(machine()), f"{size / 1e6:.0f}M parameters, {model.dtype}")
    clock = Clock(options.device)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    own = report.setdefault(options.shape or f"width {options.width}", {})
    for name, part in (("pieces", pieces), ("calls", calls)):
        if name in options.parts:
            print(f"({name})")
            own[name] = part(model, options, clock) | stamp(options, model)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
