"""What a monitor costs a generation: the same prompts with and without one, in turns.

    python tests/benchmarks/bench_monitor_loop.py

Pairs of generations of one unit each on the shipped model, in random order: the median of the
paired ratios, with its 95 % interval. Beside it the share of the time that was spent inside the
monitor, read off clocks around its parts in the same runs: it does not feel what else the machine
does. Where units are audited, the audit is in it (a pass that the policy would not have made).
Every unit is on disk before the call returns.
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
from adaptive import generate
from adaptive._monitor_units import begin_watch, finish_watch
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
    """Seconds spent in the monitor's parts of a generation."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*args, **settings)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def paired(
    model: Any, prompts: list[Any], policy: Policy, monitor: Monitor, *, per_token: float
) -> dict[str, Any]:
    """Ratio of seconds with a monitor to seconds without, and the share spent in the monitor."""
    clock = Clock()
    loop.begin_watch = clock.around(begin_watch)
    loop.finish_watch = clock.around(finish_watch)

    def seconds(prompt: Any, watching: Monitor | None) -> float:
        start = time.perf_counter()
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
        return time.perf_counter() - start

    rng, ratios, shares, alone = np.random.default_rng(0), [], [], []
    for pair in range(PAIRS + 2):
        prompt, found, before = prompts[pair % len(prompts)], {}, clock.seconds
        for watching in (monitor, None) if rng.random() < 0.5 else (None, monitor):
            found[watching is None] = seconds(prompt, watching)
        inside = clock.seconds - before + 1e-6 * per_token * TOKENS
        ratios.append(found[False] / found[True])
        shares.append(inside / (found[False] - inside))
        alone.append(1e3 * found[True] / TOKENS)
    return {
        "ratio": interval(ratios[2:]),
        "share_inside_the_monitor": interval(shares[2:]),
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


def per_unit(policy: Policy, folder: Path, *, journal: bool) -> float:
    """Milliseconds for one unit's beginning, coins and end."""
    path = folder / "alone.jsonl" if journal else None
    with Monitor.for_policy(policy, journal=path, audits=UniformAudits(1.0)) as monitor:
        spent = []
        for unit in range(UNITS):
            start = time.perf_counter()
            ticket = monitor.begin(1, policy=policy)
            monitor.audits(ticket, [0.9])
            monitor.finish(ticket, [Outcome(0.05, 0.93 + 1e-3 * (unit % 7), 10.0, TOKENS)])
            spent.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(spent), 3)


def per_token(policy: Policy) -> float:
    """Microseconds for the question before every token."""
    monitor = Monitor.for_policy(policy)
    ticket = monitor.begin(1)
    start = time.perf_counter()
    for _ in range(20_000):
        _ = ticket.withdrawn or not monitor.withdrawn(ticket)
    return round(1e6 * (time.perf_counter() - start) / 20_000, 3)


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
