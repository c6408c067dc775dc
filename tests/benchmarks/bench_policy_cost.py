"""What policies cost: deciding, its features included, and fitting, beside one call of a head.

    python tests/benchmarks/bench_policy_cost.py            # measures and writes results
    python tests/benchmarks/bench_policy_cost.py --table    # the table of docs/benchmarks.md

Every policy of `policy_rows` is built on random traces of a model with a head of ordinary size and
asked at its eleven exits, one row. A round times one call of the head, then all decisions of a
token on features that are there, then the same with the features computed; ratios are medians over
rounds. What a fit takes per token of its trace is timed once (three times if it is short).

Time is processor time of this one thread, so that a busy machine counts for less.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policy_rows import ROWS, Row
from torch import Tensor

from adaptive.calibration import Trace
from adaptive.policies import AbstractScore, Features, Policy

RESULTS = Path(__file__).parent / "results" / "policy_cost.json"
WIDTH, VOCABULARY, PRUNED, EXITS = 1024, 32_000, 256, 11
TOKENS, WITH_LOGITS = 600, 60  # of the traces; those whose logits are kept
ROUNDS = 31


@dataclass
class Shop:
    """Stands in for the workshop of `policy_rows`, on random numbers."""

    rng: np.random.Generator
    used: int = 0  # tokens of the largest trace that a fit has read

    def __post_init__(self) -> None:
        shape = (TOKENS, EXITS)
        self._scores = self.rng.uniform(0.02, 0.98, shape).astype(np.float32)
        self._agree = self.rng.uniform(size=shape) < self._scores
        self._hidden = self.rng.normal(size=(*shape, WIDTH)).astype(np.float32)
        self._logits = self.rng.normal(size=(WITH_LOGITS, EXITS, VOCABULARY)).astype(np.float32)
        self._answers = self.rng.integers(0, 5, shape)

    def trace(self, score: AbstractScore) -> Trace:
        self.used = max(self.used, TOKENS)
        return Trace(
            scores=self._scores,
            losses={"disagreement": ~self._agree},
            costs=np.arange(1.0, EXITS + 2.0),
            cost_quantity="layers",
            lengths=np.full(TOKENS // 10, 10),
            columns={
                "answers": self._answers,
                "positions": np.tile(np.arange(1, 11), TOKENS // 10),
            },
        )

    @property
    def hidden(self) -> np.ndarray[Any, Any]:
        self.used = max(self.used, TOKENS)
        return self._hidden

    @property
    def agree(self) -> np.ndarray[Any, Any]:
        return self._agree

    @property
    def logits(self) -> np.ndarray[Any, Any]:
        self.used = max(self.used, WITH_LOGITS)
        return self._logits

    @property
    def choices(self) -> np.ndarray[Any, Any]:
        return self._logits[:, -1].argmax(axis=1)


class Model:
    """A head, a probe per exit and a hidden state: what features are computed from."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=draw) / WIDTH**0.5
        self.kept = self.weight[:PRUNED].contiguous()
        self.probe = torch.randn(EXITS, WIDTH, generator=draw) / WIDTH**0.5
        self.states = [torch.randn(1, WIDTH, generator=draw) for _ in range(EXITS)]

    def head(self) -> Tensor:
        return self.states[0] @ self.weight.T

    def features(self, needs: frozenset[str], exit: int) -> Features:
        """Compute what is asked for and nothing else, as the loop does."""
        hidden = self.states[exit]
        logits = hidden @ self.weight.T if needs & {"logits", "answer"} else None
        return Features(
            stage=exit,
            position=torch.ones(1, dtype=torch.int64),
            probe=hidden @ self.probe[exit] if "probe" in needs else None,
            hidden=hidden if "hidden" in needs else None,
            previous=self.states[exit - 1] if "previous" in needs and exit else None,
            logits=logits,
            head=(lambda ids: (self.weight[ids] @ hidden[:, :, None])[:, :, 0]),
            pruned_logits=hidden @ self.kept.T if "pruned_logits" in needs else None,
            answer=None if logits is None else logits.argmax(dim=-1),
            noise=torch.full((1,), 0.5) if "noise" in needs else None,
        )


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(row: Row, model: Model, shop: Shop) -> dict[str, Any]:
    """Ratios of one policy to the head: a decision alone, a check, its fit per token."""
    shop.used = 0
    fits = [seconds(lambda: row.build(shop))]
    fits += [seconds(lambda: row.build(shop)) for _ in range(2 if fits[0] < 1.0 else 0)]
    policy = row.build(shop)  # with gradients: some fits take them
    with torch.no_grad():
        return {"name": row.name} | decided(policy, model, fits, shop.used)


def decided(policy: Policy, model: Model, fits: Sequence[float], fitted_on: int) -> dict[str, Any]:
    """Time a policy in turns with the head."""
    given = [model.features(policy.needs_at(exit), exit) for exit in policy.stages]
    state = policy.init(1, device=torch.device("cpu"))

    def walk(features: Callable[[int], Features]) -> None:
        memory = state
        for place in range(len(policy.stages)):
            _, _, memory = policy.update(features(place), memory)
        policy.advance(memory)

    def computed(place: int) -> Features:
        exit = policy.stages[place]
        return model.features(policy.needs_at(exit), exit)

    walk(computed)
    heads, decisions, checks = [], [], []
    for _ in range(ROUNDS):
        heads.append(seconds(model.head))
        decisions.append(seconds(lambda: walk(given.__getitem__)) / len(policy.stages))
        checks.append(seconds(lambda: walk(computed)) / len(policy.stages))
    head = np.median(heads)
    return {
        "decide": quartiles(np.divide(decisions, heads)),
        "check": quartiles(np.divide(checks, heads)),
        "fit": float(np.median(fits)) / fitted_on / head if fitted_on else None,
        "head_ms": 1e3 * float(head),
    }


def quartiles(ratios: Any) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(value) for value in np.quantile(ratios, (0.5, 0.25, 0.75))]


def table() -> str:
    """Markdown table of the results."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| policy | a decision | a check | fitting, per token |", "|---|---|---|---|"]
    for row in found["policies"]:
        one, low, high = row["decide"]
        all_in, least, most = row["check"]
        fit = "none" if row["fit"] is None else f"{row['fit']:.2g}"
        decide = f"{one:.3f} [{low:.3f}, {high:.3f}]"
        check = f"{all_in:.3f} [{least:.3f}, {most:.3f}]"
        lines.append(f"| {row['name']} | {decide} | {check} | {fit} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the docs' table and stop")
    if parser.parse_args().table:
        print(table())
        return
    torch.set_num_threads(1)
    model, shop = Model(), Shop(np.random.default_rng(0))
    found = []
    for row in ROWS:
        found.append(measure(row, model, shop))
        print(found[-1], flush=True)
    settings = {"width": WIDTH, "vocabulary": VOCABULARY, "exits": EXITS, "rounds": ROUNDS}
    settings |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    text = json.dumps({"settings": settings, "policies": found}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
