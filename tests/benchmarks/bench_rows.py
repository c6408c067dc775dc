"""Batches whose rows stop independently: realised speed beside the best simulated schedule.

    python tests/benchmarks/bench_rows.py            # 150M Llama, float32, one thread
    python tests/benchmarks/bench_rows.py --table    # the table of docs/benchmarks.md

Every row has exits of its own, prescribed by position: drawn independently, or in runs of eight
tokens. Columns, all as speed ratios to full depth through the same loop:

realised   measured, everything included; the prompt's share taken off.
schedule   the best schedule that `schedules.py` finds under what one layer and the head take for
           n tokens, measured in the same run: checks, attention over the rows' own contexts, keys
           and values of skipped layers and the loop itself count as nothing.
shared     measured: all rows wait for the deepest (one filled length for the batch).
per row    (L + h) / (mean depth + h), as if every row had the machine's batched speed at any number
           of rows; nobody can have it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from unittest import mock

import numpy as np
import torch
from schedules import Passes, aligned, best_schedule, simulate
from workshop import Clock, build, call, command_line, ratio, rounds, shown, stamp

from adaptive import _generate
from adaptive._costs import Costs, measure
from adaptive._stack import ExactStack, PropagateStack
from adaptive._tier import executor_for
from adaptive.policies import AbstractRule, Features, NoScore, Policy, ProbeScore, State, Threshold

#: Share of tokens behind each of the four segments, by mean depth.
DEPTHS = {0.25: (1.0, 0.0, 0.0, 0.0), 0.5: (0.4, 0.3, 0.2, 0.1), 0.75: (0.1, 0.2, 0.3, 0.4)}
BURST = 8
FULL = Policy(NoScore(), Threshold(), stages=(2,))


@dataclass(frozen=True)
class PrescribedRows(AbstractRule):
    """Stop each row where its own table says for the position, whatever the score."""

    patterns: tuple[tuple[int, ...], ...]
    nested: ClassVar[bool] = False

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"patterns": torch.tensor(self.patterns[:batch_size], device=device)}

    def decide(self, features: Features, score: Any, state: State) -> Any:
        place = (features.position - 1) % state["patterns"].shape[1]
        return state["patterns"].gather(1, place[:, None])[:, 0] <= features.stage, state

    def with_knob(self, knob: float) -> Self:
        return self

    def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
        return (float("inf"),)


def patterns(share: tuple[float, ...], rows: int, tokens: int, *, bursty: bool) -> Any:
    """Segment behind which each token stops, int ``[rows, tokens]``."""
    rng = np.random.default_rng(0)
    if not bursty:
        return rng.choice(4, (rows, tokens), p=share)
    return np.repeat(rng.choice(4, (rows, -(-tokens // BURST)), p=share), BURST, axis=1)[:, :tokens]


def passes(costs: Costs, layers: int) -> Passes:
    """What a pass takes at each of four equal segments, and at the head."""

    def segment(count: float) -> float:
        return layers / 4 * costs.of_layer(count)

    return Passes((segment, segment, segment, segment, costs.of_head))


def shared(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with one filled length for the whole batch."""

    def stack(executor: Any, exits: Any, mode: str, *_: Any, **__: Any) -> Any:
        kind = PropagateStack if mode == "propagate" else ExactStack
        return kind(executor, exits.layers)

    def run() -> Any:
        with mock.patch.object(_generate, "stack_for", stack):
            return work()

    return run


def batch(model: Any, options: argparse.Namespace, clock: Clock, rows: int) -> dict[str, Any]:
    """Every pattern and mode at one batch size."""
    ids = torch.randint(2, options.vocabulary, (rows, options.prompt), device=options.device)
    new = options.steps + 1
    cases = [(0.25, False), (0.5, False), (0.5, True), (0.75, False)]
    plan: dict[str, tuple[str, Any]] = {}
    variants: dict[str, Callable[[], Any]] = {}
    for depth, bursty in cases:
        drawn = patterns(DEPTHS[depth], rows, options.steps, bursty=bursty)
        rule = PrescribedRows(tuple(map(tuple, drawn.tolist())))
        for mode in ("propagate", "exact"):
            name = f"{mode}, {'bursty' if bursty else 'independent'}, {depth}"
            policy = Policy(ProbeScore(), rule, stages=(0, 1, 2), mode=mode)  # type: ignore[arg-type]
            plan[name] = (mode, drawn)
            variants[name] = call(model, ids, new, policy)
            if depth == 0.5:
                variants[f"{name}, shared"] = shared(variants[name])
    variants["full"] = call(model, ids, new, FULL)
    variants["prompt"] = call(model, ids, 1, FULL)
    times = rounds(variants, count=options.rounds, clock=clock)
    costs = measure(executor_for(model), model.device)
    prompt = np.median(times["prompt"])
    full = times["full"] - prompt
    layers, h = options.layers, costs.of_head(rows) / costs.of_layer(rows)
    node = passes(costs, layers)
    found: dict[str, Any] = {
        "costs": {"tokens": costs.tokens, "layer": costs.layer, "head": costs.head}
    }
    found["full_ms_per_step"] = float(np.median(full)) / options.steps * 1e3
    found["cases"] = {}
    for name, (mode, drawn) in plan.items():
        whole = simulate(np.full_like(drawn, 3), node, aligned)
        best, schedule = best_schedule(drawn, node, exact=mode == "exact")
        ours = simulate(drawn, node, aligned, exact=mode == "exact")
        depth = (drawn.mean() + 1) * layers / 4
        realised = ratio(full, times[name] - prompt)
        row = {
            "mean_depth": depth,
            "realised": realised,
            "best_schedule": whole / best,
            "which": schedule,
            "aligned": whole / ours,
            "realised / best": {key: value / (whole / best) for key, value in realised.items()},
            "per_row": (layers + h) / (depth + h),
        }
        if f"{name}, shared" in times:
            row["shared"] = ratio(full, times[f"{name}, shared"] - prompt)
        found["cases"][name] = row
        print(
            f"    {name:34s} x{realised['median']:.2f}, schedule x{whole / best:.2f} ({schedule}; "
            f"aligned x{whole / ours:.2f}), of it {shown(row['realised / best'])}, "
            f"shared {row['shared']['median'] if 'shared' in row else float('nan'):.2f}, "
            f"per row x{row['per_row']:.2f}"
        )
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown table of the results."""
    lines = [
        "| batch | mode | rows | mean depth | realised | of the best schedule | best schedule "
        "| rows waiting for each other | per row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, found in report["batches"].items():
        for name, case in found["cases"].items():
            mode, kind, _ = name.split(", ")
            waiting = f"x{case['shared']['median']:.2f}" if "shared" in case else ""
            lines.append(
                f"| {rows} | `{mode}` | {kind} | {case['mean_depth']:.1f} "
                f"| x{case['realised']['median']:.2f} | {shown(case['realised / best'])} "
                f"| x{case['best_schedule']:.2f} | {waiting} | x{case['per_row']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, out="rows.json", batches="8,32", rounds=5, steps=32)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"batches": {}}
    if options.table:
        print(table(kept))
        return
    torch.set_num_threads(options.threads)
    model = build(options)
    for rows in options.batches.split(","):
        print(f"batch {rows}")
        found = batch(model, options, Clock(options.device), int(rows))
        kept["batches"][rows] = found | stamp(options, model)
        options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
