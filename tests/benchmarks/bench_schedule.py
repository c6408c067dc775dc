"""Check schedules of the shipped model: which is chosen, and time predicted beside realised.

    python tests/benchmarks/bench_schedule.py            # measures and writes results
    python tests/benchmarks/bench_schedule.py --table    # the tables of docs/benchmarks.md

Every set of exits is asked at the knob that is cheapest within the risk on the fit prompts, and
generates for other prompts, one at a time, in `propagate` mode; variants take turns. Then, by
position in the text, what a check is worth over what it costs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workshop import Clock, call, command_line, ratio, rounds, shown, stamp

from adaptive import get_exits
from adaptive._families import layers_of
from adaptive._schedule_costs import schedule_costs
from adaptive._trace_model import collect_trace
from adaptive.calibration import Trace
from adaptive.examples import load_model, load_prompts
from adaptive.policies import (
    MaxProbability,
    Policy,
    ProbeScore,
    Threshold,
    choose_stages,
    exit_stages,
    expected_cost,
)
from adaptive.policies._choose_stages import _Table

SCORES = {"probe": ProbeScore(), "largest probability": MaxProbability()}
BANDS = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 63))


def schedules(
    model: Any, ids: list[Tensor], everywhere: Policy, trace: Trace, options: Any
) -> dict[str, Any]:
    """Time of every schedule over that of asking everywhere, predicted and realised."""
    costs = schedule_costs(model, get_exits(model), everywhere)  # type: ignore[arg-type]
    timed = replace(trace, costs=costs.stages)
    given: dict[str, Any] = {"risk": options.risk, "checks": costs.checks}
    table = _Table.of(timed, **given, loss="disagreement", reduction="mean", seed=0)
    sets = [s for n in (3, 2, 1) for s in combinations(everywhere.stages, n)]
    policies = {str(s): table.cheapest(replace(everywhere, stages=s)) for s in sets}
    calls = {
        name: [call(model, prompt, options.new, policy, pad_token_id=0) for prompt in ids]
        for name, policy in policies.items()
    }
    tokens = {  # greedy: every round says the same
        name: sum(work().shape[1] - p.shape[1] for work, p in zip(works, ids, strict=True))
        for name, works in calls.items()
    }
    variants = {name: lambda works=works: [w() for w in works] for name, works in calls.items()}
    seconds = rounds(variants, count=options.rounds, clock=Clock("cpu"))
    each = {name: seconds[name] / tokens[name] for name in calls}
    first = str(everywhere.stages)
    cost = {s: expected_cost(replace(everywhere, stages=s), timed, **given) for s in sets}
    return {
        "check in layers": float(costs.checks.mean() / costs.stages[-1] * len(layers_of(model))),
        "chosen": str(choose_stages(everywhere, timed, **given).stages),
        **by_position(policies[first], timed, costs.checks),
        "schedules": {
            str(s): {
                "predicted": cost[s] / cost[everywhere.stages],
                "realised": ratio(each[str(s)], each[first]),
                "ms per token": float(1e3 * np.median(each[str(s)])),
            }
            for s in sets
        },
    }


def by_position(policy: Policy, trace: Trace, checks: Any) -> dict[str, Any]:
    """What a check is worth over its price, per band of positions and exit.

    And the share of all time that would be saved by not asking where it is worth less.
    """

    def paid(member: Policy) -> tuple[Any, Any]:
        stops = exit_stages(member.rule, trace, stages=member.stages)
        asked = np.cumsum(np.where(np.isin(np.arange(trace.n_exits), member.stages), checks, 0.0))
        return trace.costs[stops], asked[np.minimum(stops, trace.n_exits - 1)]

    stage, check = paid(policy)
    without = {
        exit: paid(replace(policy, stages=tuple(s for s in policy.stages if s != exit)))
        for exit in policy.stages
    }
    worth: dict[str, list[float]] = {}
    wasted = 0.0
    for low, high in BANDS:
        band = (trace.columns["positions"] >= low) & (trace.columns["positions"] <= high)
        gains = [(costs - stage)[band].sum() for costs, _ in without.values()]
        prices = [(check - left)[band].sum() for _, left in without.values()]
        wasted += sum(max(0.0, price - gain) for gain, price in zip(gains, prices, strict=True))
        name = str(low) if low == high else f"{low} to {high}"
        worth[name] = [float(g / p) for g, p in zip(gains, prices, strict=True)]
    share = float(wasted / (stage + check).sum())
    return {"value of a check over its price": worth, "share to save by position": share}


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in the docs."""
    head, rule = " | ".join(report["scores"]) + " |", "|---" * (1 + len(report["scores"])) + "|"
    lines = [f"| exits asked | {head}", rule]
    found = list(report["scores"].values())
    for name in found[0]["schedules"]:
        cells = []
        for score in found:
            one = score["schedules"][name]
            mark = "; chosen" if name == score["chosen"] else ""
            cells.append(f"{one['predicted']:.3f}; {shown(one['realised'])}{mark}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"| position | {head}", rule]
    for name in found[0]["value of a check over its price"]:
        rows = [score["value of a check over its price"][name] for score in found]
        lines.append(f"| {name} | " + " | ".join(", ".join(f"{v:.1f}" for v in r) for r in rows))
        lines[-1] += " |"
    checks = [f"{name} {one['check in layers']:.2f}" for name, one in report["scores"].items()]
    shares = [
        f"{name} {one['share to save by position']:.2%}" for name, one in report["scores"].items()
    ]
    last = "a check in layers: " + ", ".join(checks) + "; to save by position: " + ", ".join(shares)
    return "\n".join([*lines, "", last])


def main() -> None:
    parser = command_line(
        __doc__, out="schedule.json", rounds=7, risk=0.05, new=64, fit=60, timed=6
    )
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model()
    prompts = load_prompts(options.fit + options.timed, rng=1)
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in prompts[options.fit :]]
    report: dict[str, Any] = stamp(options, model) | {"scores": {}}
    for name, score in SCORES.items():
        trace = collect_trace(
            model,
            prompts[: options.fit],
            score=score,
            tokenizer=tokenizer,
            new_tokens=options.new,
            progress=False,
        )
        policy = Policy(score, Threshold(), stages=(0, 1, 2), mode="propagate")
        report["scores"][name] = schedules(model, ids, policy, trace, options)
        print(name, json.dumps(report["scores"][name], indent=1), flush=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
