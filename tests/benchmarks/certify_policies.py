"""Every deployable policy, certified end to end on the shipped model and checked on fresh prompts.

    python tests/benchmarks/certify_policies.py             # runs what has no record yet
    python tests/benchmarks/certify_policies.py --only free # rows whose name contains the word
    python tests/benchmarks/certify_policies.py --checks    # times the checks of all records anew
    python tests/benchmarks/certify_policies.py --table     # writes the page's tables

The model gets an exit at every layer but the last. A policy is fitted on prompts of its own where
it has to be, certified by `calibrate` on others (rules whose rows decide together on whole batches
of two), and run on fresh prompts that nobody has seen. Every seed is in this file. A record is
written per policy, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from policy_rows import ROWS, Row, Workshop, slug

import adaptive._bench as calibration_bench
from adaptive import ExitTraining, attach_exits, calibrate, train_exits
from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import Exits
from adaptive._fingerprint import model_fingerprint
from adaptive._full_depth import full_states
from adaptive._inputs import Units, read_units, texts_batch
from adaptive._losses import unit_loss
from adaptive._run import Run, mean_run_depth
from adaptive._runs import full_depth, run_units
from adaptive._stdlib import held_out_functions, training_functions
from adaptive._tier import executor_for
from adaptive.calibration import mixture_log_p, mixture_upper_bound
from adaptive.examples import load_model
from adaptive.policies import (
    Features,
    Policy,
    keyed_noise,
    oracle_stages,
    unit_costs,
    unit_keys,
)

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "policies"
PAGE = HERE.parents[1] / "docs" / "policies.md"
CACHE = HERE.parents[1] / "build" / "certify-policies"

SEED = 20261125
RISK, DELTA = 0.1, 0.05
#: Fresh prompts may not reject "true risk <= promise" at this level.
FALSE_ALARM = 0.001 / len(ROWS)
LAYERS = tuple(range(1, 12))
PROMPT, NEW = 32, 8  # tokens
SHAPING, CALIBRATING, FRESH = 150, 230, 260  # prompts
BATCH = 2  # rows of a batch, for rules whose rows decide together
POOL = f"first {PROMPT} tokens of functions of held-out modules of the Python standard library"


class Bench:
    """The shipped model with an exit at every layer, and prompts by role."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_model()
        self.exits = self._exits()
        draw = held_out_functions(rng=np.random.default_rng(SEED), maximum_lines=24)
        items = self._cut([prompt.text for prompt in draw])
        bounds = np.cumsum([SHAPING, CALIBRATING, FRESH])
        if len(items) < bounds[-1]:
            raise SystemExit(f"the pool holds {len(items)} prompts, {bounds[-1]} are needed")
        self.calibrating = items[bounds[0] : bounds[1]]
        self.fresh = self._units(items[bounds[1] : bounds[2]])
        self.shop = Workshop(self, self._units(items[: bounds[0]]))

    @property
    def deployment(self) -> Deployment:
        return Deployment(
            new_tokens=NEW, batch_size=64, generation={"do_sample": False}, seed=SEED % 1000
        )

    def _exits(self) -> Exits:
        folder = CACHE / model_fingerprint(self.model)
        if (folder / "exits.json").is_file():
            return attach_exits(self.model, folder)
        prompts = [
            prompt.text
            for prompt in training_functions(150, rng=np.random.default_rng(SEED), maximum_lines=12)
        ]
        settings = ExitTraining(
            rank=0, steps=0, new_tokens=16, slots=3000, kept_vocabulary=256, batch_size=64
        )
        exits = train_exits(
            self.model, prompts, layers=LAYERS, training=settings, rng=SEED, progress=False
        )
        exits.save_pretrained(folder)
        return exits

    def _cut(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Prompts of at most PROMPT tokens and what the function goes on with, none twice."""
        found: dict[tuple[int, ...], dict[str, Any]] = {}
        for text in texts:
            ids = tuple(self.tokenizer(text)["input_ids"])
            if len(ids) >= 12 + NEW:
                cut = min(PROMPT, len(ids) - NEW)
                item = {"input_ids": list(ids[:cut]), "continuation": list(ids[cut : cut + NEW])}
                found.setdefault(ids[:cut], item)
        return list(found.values())

    def _units(self, items: list[dict[str, Any]]) -> Units:
        return read_units(items, model=self.model)

    def full_texts(self, units: Units) -> list[tuple[int, ...]]:
        policy = replace(full_depth(self.exits), mode="propagate")
        return [run.tokens for run in self.run(units, policy, labels=False)]

    def run(self, units: Units, policy: Policy, *, labels: bool = True) -> tuple[Run, ...]:
        return run_units(
            self.model,
            units,
            policy,
            deployment=self.deployment,
            labels=labels,
            progress=False,
        )

    @functools.cached_property
    def fresh_texts(self) -> list[tuple[int, ...]]:
        return self.full_texts(self.fresh)

    @functools.cached_property
    def oracle_depth(self) -> float:
        """Mean layers that hindsight would have spent per token of the full model's text."""
        trace = collect(
            self.model, self.fresh, self.fresh_texts, deployment=self.deployment, progress=False
        )
        trace = replace(trace, costs=np.array([*LAYERS, 12.0]), cost_quantity="layers")
        return float(np.average(unit_costs(oracle_stages(trace), trace), weights=trace.lengths))

    @torch.no_grad()
    def states(self, units: Units, texts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Hidden states behind the prompts, float32 [n_tokens, width] per exit and at the end."""
        parts: list[list[torch.Tensor]] = []
        for start in range(0, len(units), 64):
            pairs = list(zip(units.prompts, texts, strict=True))[start : start + 64]
            ids, mask = texts_batch(pairs, self.model.device)
            states, _ = full_states(self.model, ids, mask, self.exits.layers)
            real = [len(text) - 1 for _, text in pairs]
            rows = [torch.cat([s[row, :n] for row, n in enumerate(real)]) for s in states]
            parts.append(rows)
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    @property
    def readout(self) -> Any:
        return executor_for(self.model).readout


@contextlib.contextmanager
def cheapest_is_best() -> Iterator[None]:
    """Let `calibrate` return the last certified member, not the one this machine's clock likes.

    On a model of 3 million parameters what a layer saves is less than what a check costs, and a
    table that depended on the clock could not be repeated.
    """
    kept = calibration_bench.seconds_per_token

    def falling(model: Any, units: Any, policies: Sequence[Policy], **_: Any) -> NDArray[Any]:
        return 1.0 - 0.01 * np.arange(len(policies))[None]

    calibration_bench.seconds_per_token = falling
    try:
        yield
    finally:
        calibration_bench.seconds_per_token = kept


def interval(losses: NDArray[np.float64]) -> tuple[float, float]:
    """Two-sided 95 % betting interval of a mean in [0, 1]."""

    def upper(values: NDArray[np.float64]) -> float:
        return float(np.asarray(mixture_upper_bound(values, delta=0.025)).reshape(-1)[0])

    return 1.0 - upper(1.0 - losses), upper(losses)


def log_p_of_promise(losses: NDArray[np.float64]) -> float:
    """Log p-value of "the true risk is at most the promise", from fresh losses in [0, 1]."""
    return float(np.asarray(mixture_log_p(1.0 - losses, risk=1.0 - RISK)).reshape(-1)[0])


def certify(bench: Bench, row: Row) -> dict[str, Any]:
    """Calibrate one policy and run it on fresh prompts."""
    family = row.build(bench.shop)
    loss: dict[str, Any] = {"loss": row.loss} | ({"bound": 1.0} if callable(row.loss) else {})
    together = family.scope == "batch"
    with cheapest_is_best():
        policy = calibrate(
            bench.model,
            bench.calibrating,
            RISK,
            DELTA,
            policy=family,
            pool=POOL,
            new_tokens=NEW,
            batch_size=BATCH if together else 64,
            members=row.members,
            tokenizer=bench.tokenizer,
            rng=SEED % 1000,
            progress=False,
            **loss,
        )
    assert policy.certificate is not None
    size = BATCH if together else len(bench.fresh)
    parts = [range(start, start + size) for start in range(0, len(bench.fresh) - size + 1, size)]
    runs = tuple(run for part in parts for run in bench.run(bench.fresh.select(part), policy))
    measured = unit_loss(row.loss, bound=loss.get("bound"))
    losses = measured.of(runs, bench.fresh_texts, bench.fresh.references)
    if together:
        losses = losses.reshape(-1, BATCH).mean(axis=1)
    stops = not math.isinf(knob_of(policy.rule)[1])
    low, high = interval(losses)
    return {
        "name": row.name,
        "score": _described(family.score),
        "rule": _described(family.rule),
        "knob_name": knob_of(family.rule)[0],
        "nested": bool(family.rule.nested),
        "scope": family.scope,
        "mode": family.mode,
        "loss": row.loss if isinstance(row.loss, str) else row.loss.__name__,
        "promised": RISK,
        "delta": DELTA,
        "n_test": policy.certificate.n,
        "certified": stops,
        "knob": knob_of(policy.rule)[1] if stops else None,
        "n_fresh": int(losses.size),
        "realised": float(losses.mean()),
        "interval": [low, high],
        "log_p": log_p_of_promise(losses),
        "mean_depth": mean_run_depth(runs, LAYERS, 12),
        "oracle_depth": bench.oracle_depth,
        "check": check_share(bench, family.member(knob_of(policy.rule)[1])),
        "model": model_fingerprint(bench.model),
        "seed": SEED,
    }


def knob_of(rule: Any) -> tuple[str, float]:
    """Name and value of the field that a rule's path moves; combinations move their first rule."""
    if hasattr(rule, "rules"):
        return knob_of(rule.rules[0])
    if hasattr(rule, "rule"):
        return knob_of(rule.rule)
    moved = rule.with_knob(math.inf)
    other = rule.with_knob(moved.levels[0] if hasattr(rule, "levels") else 2.0)
    name = next(f.name for f in fields(rule) if getattr(moved, f.name) != getattr(other, f.name))
    return name, float(getattr(rule, name))


def _described(part: Any) -> str:
    """Names of a score or rule and of what it is made of."""
    inner = [getattr(part, name, None) for name in ("base", "rule", "schedule")]
    inner += getattr(part, "rules", ())
    names = ", ".join(_described(one) for one in inner if one is not None)
    return type(part).__name__ + (f"({names})" if names else "")


@torch.no_grad()
def check_share(bench: Bench, policy: Policy, *, rounds: int = 30) -> float:
    """Fastest time of a check, features included, over the fastest time of one `lm_head` call.

    The mean over the asked exits, one row: what a token pays per check that does not stop it. In
    processor time, walks and heads taking turns, so that a busy machine counts for less.
    """
    exits, readout = bench.exits, bench.readout
    hidden = torch.randn(1, 128)
    position = torch.ones(1, dtype=torch.int64)
    noise = keyed_noise(unit_keys(["a"]), position)
    state = policy.init(1, device=torch.device("cpu"))

    def walk() -> None:
        memory, previous = state, None
        for exit in policy.stages:
            features = exits.features(
                policy.needs_at(exit),
                exit,
                hidden,
                previous=previous,
                position=position,
                readout=readout,
            )
            features = _with_noise(features, noise)
            _, _, memory = policy.update(features, memory)
            previous = hidden

    def seconds(work: Callable[[], object], times: int) -> float:
        start = time.process_time()
        for _ in range(times):
            work()
        return (time.process_time() - start) / times

    head = bench.model.get_output_embeddings()
    walk()
    pairs = [(seconds(walk, 1), seconds(lambda: head(hidden), 20)) for _ in range(rounds)]
    walks, heads = np.min(pairs, axis=0)
    return float(walks / len(policy.stages) / heads)


def measure_checks() -> None:
    """Measure the checks of all records anew, in one run, and leave the rest of each as it is."""
    bench = Bench()
    torch.set_num_threads(1)
    for row in ROWS:
        path = RECORDS / f"{slug(row.name)}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        found["check"] = check_share(bench, row.build(bench.shop).member(math.inf))
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{row.name}: {found['check']:.2g}", flush=True)


def _with_noise(features: Features, noise: torch.Tensor) -> Features:
    return replace(features, noise=noise)


def records() -> list[dict[str, Any]]:
    """Records on disk, in the order of the rows."""
    paths = [RECORDS / f"{slug(row.name)}.json" for row in ROWS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def end_to_end_table() -> str:
    """Markdown table of what was promised and what came of it."""
    lines = [
        "| policy | mode | promised | realised, 95 % interval | mean depth | oracle | check |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in records():
        low, high = found["interval"]
        depth = f"{found['mean_depth']:.2f}"
        lines.append(
            f"| {found['name']} | `{found['mode']}` | {found['promised']} | "
            f"{found['realised']:.3f} [{low:.3f}, {high:.3f}] | "
            f"{depth} | {found['oracle_depth']:.2f} | {found['check']:.2g} |"
        )
    return "\n".join(lines)


def catalogue() -> str:
    """Markdown table of the policies themselves."""
    sources = {row.name: row.source for row in ROWS}
    lines = [
        "| policy | source | score | rule | knob | nested | decides per |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in records():
        nested = "yes" if found["nested"] else "no"
        lines.append(
            f"| {found['name']} | {sources[found['name']]} | `{found['score']}` | "
            f"`{found['rule']}` | `{found['knob_name']}` | {nested} | {found['scope']} |"
        )
    return "\n".join(lines)


def write_page() -> None:
    """Put both tables between their marks in the docs page."""
    page = PAGE.read_text(encoding="utf-8")
    for mark, table in (("catalogue", catalogue()), ("end to end", end_to_end_table())):
        before, _, rest = page.partition(f"<!-- {mark} -->\n")
        _, _, after = rest.partition(f"<!-- end of {mark} -->")
        page = f"{before}<!-- {mark} -->\n\n{table}\n\n<!-- end of {mark} -->{after}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--table", action="store_true", help="write the docs' tables and stop")
    parser.add_argument("--checks", action="store_true", help="measure the checks anew and stop")
    options = parser.parse_args()
    if options.checks:
        measure_checks()
        return
    if options.table:
        write_page()
        return
    RECORDS.mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    for row in ROWS:
        path = RECORDS / f"{slug(row.name)}.json"
        if options.only not in row.name or path.is_file():
            continue
        bench = bench or Bench()
        start = time.perf_counter()
        found = certify(bench, row)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        print(
            f"{row.name}: {found['realised']:.3f} of {RISK}, depth {found['mean_depth']:.2f}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
