"""What a monitor costs a generation: time inside its calls, over the rest of the unit's time.

    python tests/benchmarks/bench_monitor_loop.py

Generations of one unit each on the shipped model. Processor time is read off clocks around the
monitor's parts in the same run, so it does not feel what else the machine does; the question before
every token is timed alone and added. An audit is a pass that the policy would not have made: it is
told apart from the monitor's own time. Every unit is on disk before the call returns; waiting for
the disk is no processor time, and is told as seconds. Beside it stands the ratio to runs of the
same prompt without a monitor, which sees everything, and noise too.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monitor_shipped import CALIBRATED, HERE, certified, records

import adaptive._generate as loop
import adaptive._monitor_units as units
from adaptive import generate
from adaptive._decode import label
from adaptive._monitor_units import _audited, begin_watch, finish_watch
from adaptive.calibration import AbstractAudits, EvidenceAudits, UniformAudits
from adaptive.examples import load_model, load_prompts
from adaptive.monitoring import Monitor, Outcome
from adaptive.policies import Policy

TOKENS, PAIRS, UNITS = 64, 30, 300
#: A unit is never audited: what is left is the monitor itself.
NEVER = UniformAudits(1e-12)
ROWS: dict[str, tuple[str, AbstractAudits]] = {
    "propagate, no unit audited": ("propagate", NEVER),
    "propagate, a tenth audited": ("propagate", EvidenceAudits(0.1, 0.5)),
    "exact, no unit labelled": ("exact", NEVER),
    "exact, every unit labelled": ("exact", UniformAudits(1.0)),
}


def policy_in(mode: str) -> Policy:
    """The recorded policy in a mode; its certificate, which is for one mode, feeds a monitor."""
    policy = certified(records()["python"], 0.1, np.random.default_rng(0))
    return replace(policy, mode=mode)  # type: ignore[arg-type]


class Clock:
    """Processor seconds spent in a part of a generation."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **settings: Any) -> Any:
            start = time.process_time()
            try:
                return part(*args, **settings)
            finally:
                self.seconds += time.process_time() - start

        return timed


def paired(
    model: Any, prompts: list[Any], policy: Policy, monitor: Monitor, *, per_token: float
) -> dict[str, Any]:
    """Shares of processor time that are the monitor's own and its audits', and the ratio."""
    clock, audit = Clock(), Clock()
    loop.begin_watch = clock.around(begin_watch)
    loop.finish_watch = clock.around(finish_watch)
    units._audited = audit.around(_audited)
    units.label = audit.around(label)

    def seconds(prompt: Any, watching: Monitor | None) -> float:
        start = time.process_time()
        generate(
            model,
            **prompt,
            policy=policy,
            monitor=watching,
            certified=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
        return time.process_time() - start

    rng, ratios, shares, alone = np.random.default_rng(0), [], [], []
    sums = np.zeros(3)  # the monitor's own, its audits, the rest
    for pair in range(PAIRS + 2):
        prompt, found = prompts[pair % len(prompts)], {}
        before, audited = clock.seconds, audit.seconds
        for watching in (monitor, None) if rng.random() < 0.5 else (None, monitor):
            found[watching is None] = seconds(prompt, watching)
        audited = audit.seconds - audited
        inside = clock.seconds - before - audited + 1e-6 * per_token * TOKENS
        rest = found[False] - inside - audited
        ratios.append(found[False] / found[True])
        shares.append(inside / rest)
        alone.append(1e3 * found[True] / TOKENS)
        if pair >= 2:
            sums += inside, audited, rest
    return {
        "share_inside_the_monitor": interval(shares[2:]),
        "mean_share_inside_the_monitor": round(float(sums[0] / sums[2]), 4),
        "mean_share_of_audits": round(float(sums[1] / sums[2]), 4),
        "ratio": interval(ratios[2:]),
        "milliseconds_per_token_alone": round(statistics.median(alone[2:]), 3),
    }


def interval(ratios: list[float]) -> dict[str, float]:
    """Median and the order statistics around it that hold it with 95 % confidence."""
    ordered = sorted(ratios)
    low = int(np.floor(len(ordered) / 2 - 0.98 * np.sqrt(len(ordered))))
    return {
        "median": round(statistics.median(ordered), 4),
        "low": round(ordered[max(low, 0)], 4),
        "high": round(ordered[min(len(ordered) - 1 - low, len(ordered) - 1)], 4),
    }


def per_unit(policy: Policy, folder: Path, *, journal: bool) -> dict[str, float]:
    """Milliseconds for one unit's beginning, coins and end: of the processor, and elapsed."""
    path = folder / "alone.jsonl" if journal else None
    with Monitor.for_policy(policy, journal=path, audits=UniformAudits(1.0)) as monitor:
        spent = []
        for unit in range(UNITS):
            start = np.array([time.process_time(), time.perf_counter()])
            ticket = monitor.begin(1, policy=policy)
            monitor.audits(ticket, [0.9])
            monitor.finish(ticket, [Outcome(0.05, 0.93 + 1e-3 * (unit % 7), 10.0, TOKENS)])
            spent.append(np.array([time.process_time(), time.perf_counter()]) - start)
    used, elapsed = 1e3 * np.median(spent, axis=0)
    return {"processor": round(float(used), 3), "elapsed": round(float(elapsed), 3)}


def per_token(policy: Policy) -> float:
    """Processor microseconds for the question before every token."""
    monitor = Monitor.for_policy(policy)
    ticket = monitor.begin(1)
    start = time.process_time()
    for _ in range(20_000):
        _ = ticket.withdrawn or not monitor.withdrawn(ticket)
    return round(1e6 * (time.process_time() - start) / 20_000, 3)


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    prompts = [
        tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        for text in load_prompts(8, rng=CALIBRATED)
    ]
    found: dict[str, Any] = {"tokens": TOKENS, "pairs": PAIRS, "rows": {}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as place:
        folder = Path(place)
        alone = policy_in("propagate")
        found["milliseconds_per_unit"] = {
            "with a journal": per_unit(alone, folder, journal=True),
            "without": per_unit(alone, folder, journal=False),
        }
        found["microseconds_per_token"] = per_token(alone)
        for number, (name, (mode, audits)) in enumerate(ROWS.items()):
            policy = policy_in(mode)
            with Monitor.for_policy(
                policy, audits=audits, journal=folder / f"{number}.jsonl"
            ) as monitor:
                found["rows"][name] = paired(
                    model,
                    prompts,
                    policy,
                    monitor,
                    per_token=found["microseconds_per_token"],
                )
            print(name, found["rows"][name], flush=True)
    found["machine"] = {"processor": platform.processor() or platform.machine(), "threads": 1}
    print(json.dumps(found))
    (HERE / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
