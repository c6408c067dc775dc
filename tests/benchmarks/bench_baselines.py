"""What most published early-exit loops do, re-created beside ours in the same run.

    python tests/benchmarks/bench_baselines.py                            # 24 layers, CPU
    python tests/benchmarks/bench_baselines.py --rounds 3 --width 128     # a quick look
    python tests/benchmarks/bench_baselines.py --table                    # the kept figures

Which token of which row stops where is prescribed, the same for everybody. The re-creations run on
our native layers, so that nothing but the loop differs:

- "wait for all rows": a step goes on until every row is confident (the minimum over the batch of
  CALM's code; Miao and others), then skipped layers get keys and values, in one product;
- "a head at every layer": the confidence is the full vocabulary's softmax, formed and read by the
  host after every layer (CALM; FREE in its CALM mode);
- "keys and values one by one": skipped layers get keys and values layer by layer, at once (CALM);
- "all three".

With one row nobody waits, and the first is the cheapest loop that fills at once. Ours are
`propagate` (skipped layers filled together, when a token needs them) and `exact` (computed
together, when a token needs them). Ratios are medians over rounds of full depth through our own
loop over the variant, the prompt's share taken off. Ideal is (L + h) / (d + h) with d the mean
depth over rows and tokens and h what the head costs in layers: in a batch it takes a layer on some
of the rows to cost that share of a layer on all, which no loop can have where weights are read.

Batch sizes that are not run keep the figures they have in the results. The re-creations do without
logits processors, stopping criteria, streams and labels, which our loop has: that is in their
favour.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from workshop import PATTERNS, Clock, build, command_line, ratio, rounds, shown, stamp

from adaptive import generate
from adaptive._exits import require_exits
from adaptive._tier import executor_for
from adaptive.policies import AbstractRule, Features, NoScore, Policy, ProbeScore, State, Threshold

#: Whether a loop forms a head after every layer, and whether it fills layer by layer.
LOOPS = {
    "wait for all rows": (False, False),
    "a head at every layer": (True, False),
    "keys and values one by one": (False, True),
    "all three": (True, True),
}
MODES = ("propagate", "exact")
#: Tokens of one table of exits.
STEPS = 32


@dataclass(frozen=True)
class PrescribedRows(AbstractRule):
    """Stop where a table says, by row and position, whatever the score."""

    exits: tuple[tuple[int, ...], ...]
    nested: ClassVar[bool] = False

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"exits": torch.tensor(self.exits, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        at = (features.position - 1) % len(self.exits[0])
        return state["exits"].gather(1, at[:, None])[:, 0] <= features.stage, state

    def with_knob(self, knob: float) -> Self:
        return self

    def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
        return (float("inf"),)


def tables(rows: int) -> dict[str, np.ndarray]:
    """Exits ``[rows, STEPS]``; the last token of every row goes to full depth, so nothing is owed.

    Independent rows draw without regard to each other; bursts begin at another place in each row.
    """
    rng = np.random.default_rng(1)
    found = {}
    for name in ("independent", "bursty"):
        base = np.resize(PATTERNS[name], STEPS)[:-1]
        drawn = [
            rng.permutation(base) if name == "independent" else np.roll(base, -(-31 // rows) * row)
            for row in range(rows)
        ]
        found[name] = np.stack([[*row, 3] for row in drawn])
    return found


@torch.no_grad()
def published(
    model: PreTrainedModel, ids: Tensor, exits: np.ndarray, new: int, *, heads: bool, singly: bool
) -> Tensor:
    """Greedy text of a batch, int64 ``[batch, prompt + new]``, by a loop as it is published.

    ``heads`` forms and reads the full vocabulary's confidence after every layer; without it a
    linear probe is read at the exits. ``singly`` fills skipped layers one by one.
    """
    executor = executor_for(model, tier="native")
    batch, prompt = ids.shape
    layers, device = executor.layers, ids.device
    slots = torch.arange(prompt + new, device=device).expand(batch, -1)
    executor.begin(batch_size=batch, max_length=prompt + new, padding=None, positions=slots)
    wanted = torch.from_numpy(np.array([*require_exits(model).layers, layers])[exits]).to(device)
    places = range(1, layers + 1) if heads else (*require_exits(model).layers, layers)
    probe = torch.zeros(model.config.hidden_size, device=device, dtype=model.dtype)
    hidden = executor.run(0, layers, executor.embed(ids, 0), 0)[:, -1:]
    logits = executor.readout(hidden[:, -1])
    text = ids
    for step in range(new):
        tokens = logits.argmax(dim=-1)
        text = torch.cat([text, tokens[:, None]], dim=1)
        if step == new - 1:
            break
        slot, below = prompt + step, 0
        hidden = executor.embed(tokens[:, None], slot)
        for place in places:
            hidden = executor.run(below, place, hidden, slot)
            below = place
            if place == layers:
                break
            if heads:
                logits = executor.readout(hidden[:, -1])
                top = logits.softmax(dim=-1).topk(2).values
                confidence = top[:, 0] - top[:, 1]
            else:
                confidence = torch.sigmoid(hidden[:, -1] @ probe)
            confident = (confidence >= 0) & (wanted[:, step % STEPS] <= place)
            if bool(confident.all()):
                break
        if below < layers:
            for layer in range(below, layers) if singly else (below,):
                executor.fill(layer, layer + 1 if singly else layers, hidden, slot)
        if not heads or below == layers:
            logits = executor.readout(hidden[:, -1])
    executor.end()
    return text


def parts(model: PreTrainedModel, rows: int, context: int) -> dict[str, Callable[[], object]]:
    """All layers on one token of every row, and the readout, four times each."""
    executor = executor_for(model, tier="native")
    ids = torch.ones(rows, context, dtype=torch.int64, device=model.device)
    slots = torch.arange(context + 1, device=model.device).expand(rows, -1)
    executor.begin(batch_size=rows, max_length=context + 1, padding=None, positions=slots)

    @torch.no_grad()
    def layers() -> None:
        for _ in range(4):
            executor.truncate(context)
            executor.run(0, executor.layers, hidden, context)

    @torch.no_grad()
    def head() -> None:
        for _ in range(4):
            executor.readout(hidden[:, -1])

    with torch.no_grad():
        executor.run(0, executor.layers, executor.embed(ids, 0), 0)
        hidden = executor.embed(ids[:, :1], context)
    return {"layers": layers, "head": head}


def measured(model: PreTrainedModel, options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Every loop under every table of exits, one batch size."""
    ids = torch.randint(2, options.vocabulary, (rows, options.prompt), device=options.device)
    new = STEPS + 1
    common: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}

    def call(policy: Policy, tokens: int = new) -> Callable[[], Any]:
        return functools.partial(
            generate, model, ids, policy=policy, max_new_tokens=tokens, tier="native", **common
        )

    full = Policy(NoScore(), Threshold(), stages=(2,))
    variants: dict[str, Callable[[], Any]] = {
        "full": call(full),
        "prompt": call(full, 1),
        "model.generate": functools.partial(model.generate, ids, max_new_tokens=new, **common),
    }
    depths = {}
    layers = model.config.num_hidden_layers
    for pattern, exits in tables(rows).items():
        depths[pattern] = float(np.array([*require_exits(model).layers, layers])[exits].mean())
        rule = PrescribedRows(tuple(tuple(int(exit) for exit in row) for row in exits))
        for mode in MODES:
            policy = Policy(ProbeScore(), rule, stages=(0, 1, 2), mode=mode)
            variants[f"{pattern}, {mode}"] = call(policy)
        for name, (heads, singly) in LOOPS.items():
            variants[f"{pattern}, {name}"] = functools.partial(
                published, model, ids, exits, new, heads=heads, singly=singly
            )
    expected = variants["model.generate"]()
    same = {
        name: torch.equal(work(), expected) for name, work in variants.items() if name != "prompt"
    }
    times = rounds(
        variants | parts(model, rows, options.prompt + STEPS // 2),
        count=options.rounds,
        clock=Clock(options.device),
    )
    layer = float(np.median(times["layers"])) / 4 / layers
    h = float(np.median(times["head"])) / 4 / layer
    prompt = float(np.median(times["prompt"]))
    whole = times["full"] - prompt
    report: dict[str, Any] = {
        "layer_ms": layer * 1e3,
        "head_in_layers": h,
        "full_ms": float(np.median(whole)) / STEPS * 1e3,
        "model.generate": ratio(times["model.generate"], times["full"]),
        "mean_depth": depths,
        "ideal": {name: (layers + h) / (depth + h) for name, depth in depths.items()},
        "rows": {},
    }
    for name in variants:
        pattern, _, loop = name.partition(", ")
        if pattern not in depths:
            continue
        realised = ratio(whole, times[name] - prompt)
        of_ideal = {key: value / report["ideal"][pattern] for key, value in realised.items()}
        report["rows"].setdefault(pattern, {})[loop] = {
            "realised": realised,
            "of_ideal": of_ideal,
            "same_text": same[name],
        }
        print(f"    {rows} x {name:42s} x{shown(realised)} of ideal {shown(of_ideal)} {same[name]}")
    return report


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in the docs."""
    batches = report["batches"]
    columns = [(batch, pattern) for batch in batches for pattern in batches[batch]["rows"]]
    lines = [
        "| loop | " + " | ".join(f"batch {batch}, {pattern}" for batch, pattern in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    ideals = [f"{batches[batch]['ideal'][pattern]:.2f}" for batch, pattern in columns]
    lines.append("| ideal by rows | " + " | ".join(ideals) + " |")
    for loop in (*(f"`{mode}`" for mode in MODES), *LOOPS):
        cells = []
        for batch, pattern in columns:
            found = batches[batch]["rows"][pattern][loop.strip("`")]["realised"]
            cells.append(f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")
        lines.append(f"| {loop} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, out="baselines.json", rounds=7, batches="1,8")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(options.threads)
    model = build(options)
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"batches": {}}
    for batch in options.batches.split(","):
        found = measured(model, options, int(batch))
        kept["batches"][batch] = found | stamp(options, model)
    options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
