"""Self-speculation beside transformers' own: speed, acceptance and equality of the text.

    python tests/benchmarks/bench_speculation.py                              # 24 layers, CPU
    python tests/benchmarks/bench_speculation.py --rounds 3 --width 128       # a quick look
    python tests/benchmarks/bench_speculation.py --sampling                   # two ways to sample
    python tests/benchmarks/bench_speculation.py --table [--sampling]         # the kept figures

Batch 1, float32, greedy and sampled. Three ways to draft and verify with one set of weights:

- ours: `verify` mode, drafts stop at the exit after half of the layers, at most n of them wait;
  the layers below the exit are not run again for the verification;
  In the row "while sure" (trained exits only) a token whose probe says less than 0.8 goes on to
  full depth, which ends the round; how many of its drafts were accepted is not counted;
- `assistant_early_exit` of `model.generate`, the same exit, n drafts per round at a fixed
  schedule, no confidence threshold; in the row "default" transformers' own (20 drafts, stop
  below a confidence of 0.4);
- prompt lookup of `model.generate` with n drafts, which needs no second readout at all.

The planted model is a random Llama whose layers behind the first quarter say nothing, so that an
exit at one half always agrees: what acceptance can give at most. The shipped model is a small
trained Llama: its exit at one half agrees with the full depth less often.

Reported are the median over rounds of `model.generate` (dynamic cache) over the variant, whole
calls in one process, its 95 percent bootstrap interval, the share of drafts that were accepted,
and whether the text is that of `model.generate`. Sampled text of transformers' assisted decoding
follows the model's distribution but is another draw; ours is the same draw.

`--sampling` holds our two ways of accepting sampled drafts against each other on the shipped
model: common noise (`speculation="coupled"`) and rejection sampling. Acceptance is the share of
drafts that stayed among those that were judged (behind a wrong draft none is), over 64 prompts
with the standard error over them; the number of drafts per round does not change it. Speed is
that of four prompts per round over `model.generate`, and with rejection sampling over common
noise, each round under a seed of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import (
    EarlyExitCandidateGenerator,
    PromptLookupCandidateGenerator,
)
from workshop import (
    Clock,
    Prescribed,
    build,
    command_line,
    ratio,
    rounds,
    shown,
    stamp,
)

from adaptive import generate
from adaptive._costs import costs_of
from adaptive._exits import require_exits
from adaptive._native import NativeExecutor
from adaptive._tier import executor_for
from adaptive.examples import load_model, load_prompts
from adaptive.policies import Policy, ProbeScore, Threshold

#: Drafts per round.
LENGTHS = (4, 8, 16)
#: Probability of agreement from which on a token is a draft in the row "while sure".
SURE = 0.8
#: What the generation configuration says by itself.
DEFAULT = {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}


@contextmanager
def assistants(model: PreTrainedModel, drafts: int | None) -> Iterator[None]:
    """Set the draft length where transformers reads it, and put everything back.

    It reads the assistant's own configuration, not the call's; and if drafting fails, it leaves
    the configured number of layers changed.
    """
    config, layers = model.generation_config, model.config.num_hidden_layers
    fixed = {"num_assistant_tokens": drafts, "assistant_confidence_threshold": 0.0}
    wanted = DEFAULT if drafts is None else fixed
    kept = {name: getattr(config, name) for name in (*wanted, "num_assistant_tokens_schedule")}
    config.update(**wanted, num_assistant_tokens_schedule="constant")
    try:
        yield
    finally:
        config.update(**kept)
        model.config.num_hidden_layers = layers


class Counts:
    """Drafts made and drafts accepted."""

    def __init__(self) -> None:
        self.made = self.accepted = 0

    @property
    def share(self) -> float | None:
        return self.accepted / self.made if self.made else None


@contextmanager
def theirs(kind: Any, counts: Counts) -> Iterator[None]:
    """Count what transformers' candidate generator is told about its drafts."""
    original = kind.update_candidate_strategy

    def counted(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        counts.made += scores.shape[1] - 1
        counts.accepted += int(num_matches)
        original(self, input_ids, scores, num_matches)

    kind.update_candidate_strategy = counted
    try:
        yield
    finally:
        kind.update_candidate_strategy = original


def ours(model: PreTrainedModel, ids: Tensor, settings: dict[str, Any], exit: int) -> Counts:
    """Count the drafts of a policy that always stops, and those of them that stayed."""
    counts = Counts()
    executor_for(model)  # its self-check embeds tokens of its own, and so does its timing
    costs_of(model)
    embed = NativeExecutor.embed

    def counted(self: NativeExecutor, tokens: Tensor, start: int) -> Tensor:
        counts.made += 1
        return embed(self, tokens, start)

    NativeExecutor.embed = counted  # type: ignore[method-assign]
    try:
        output: Any = generate(model, ids, **settings, return_dict_in_generate=True)
    finally:
        NativeExecutor.embed = embed  # type: ignore[method-assign]
    counts.made -= 1  # the prompt
    counts.accepted = int((output.exit_stages == exit).sum())
    return counts


def measured(
    model: PreTrainedModel,
    ids: Tensor,
    options: argparse.Namespace,
    *,
    sampled: bool,
    trained: bool,
) -> dict[str, Any]:
    """Every variant on one prompt."""
    exits = require_exits(model)
    exit = len(exits.layers) // 2
    depth = exits.layers[exit]
    common: dict[str, Any] = {
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens,
        "attention_mask": torch.ones_like(ids),
        "do_sample": sampled,
    }
    if sampled:
        common["top_k"] = 0
    plain = functools.partial(model.generate, ids, **common)
    variants: dict[str, Callable[[], Any]] = {"model.generate": plain}
    counts: dict[str, Counts] = {}

    def add(name: str, work: Callable[[], Any]) -> None:
        def seeded() -> Any:
            torch.manual_seed(1)
            return work()

        variants[name] = seeded

    def assisted(drafts: int | None, **extra: Any) -> Callable[[], Any]:
        def work() -> Any:
            with assistants(model, drafts):
                return model.generate(ids, **common, **extra)

        return work

    always = Policy(ProbeScore(), Prescribed((exit,)), stages=(exit,), mode="verify")
    sure = Policy(ProbeScore(), Threshold(SURE), stages=(exit,), mode="verify")
    add("model.generate", plain)
    plans: list[tuple[str, Policy, int | None]] = [
        (f"verify, {drafts} drafts", always, drafts) for drafts in LENGTHS
    ]
    plans.append(("verify, as many as measured", always, None))
    if trained:
        plans.append(("verify, drafts while sure", sure, LENGTHS[-1]))
    for name, policy, drafts in plans:
        settings = common | {"policy": policy, "max_pending": drafts, "tier": "native"}
        add(name, functools.partial(generate, model, ids, **settings))
        if policy is always:
            counts[name] = ours(model, ids, settings, exit)
    early: tuple[int | None, ...] = (*LENGTHS, None)
    for length in early:
        name = f"assistant_early_exit, {'default' if length is None else f'{length} drafts'}"
        add(name, assisted(length, assistant_early_exit=depth))
        counts[name] = Counts()
        with theirs(EarlyExitCandidateGenerator, counts[name]):
            variants[name]()
    for drafts in LENGTHS:
        name = f"prompt lookup, {drafts} drafts"
        add(name, assisted(drafts, prompt_lookup_num_tokens=drafts))
        counts[name] = Counts()
        with theirs(PromptLookupCandidateGenerator, counts[name]):
            variants[name]()
    expected = variants["model.generate"]()
    same = {name: torch.equal(work(), expected) for name, work in variants.items()}
    times = rounds(variants, count=options.rounds, clock=Clock(options.device))
    report: dict[str, Any] = {"exit": depth, "layers": model.config.num_hidden_layers, "rows": {}}
    for name, found in times.items():
        row = {
            "ms_per_token": float(sorted(found)[len(found) // 2]) / options.tokens * 1e3,
            "speed": ratio(times["model.generate"], found),
            "acceptance": counts[name].share if name in counts else None,
            "drafts": counts[name].made if name in counts else None,
            "same_text": same[name],
        }
        report["rows"][name] = row
        print(f"    {name:40s} x{shown(row['speed'])}, accepted {row['acceptance']}, {same[name]}")
    return report


#: Prompts whose drafts are counted, prompts of one timed round.
COUNTED, TIMED = 64, 4
#: When a token is a draft, and drafts per round; `None` leaves the number to the loop.
PLANS: tuple[tuple[str, int | None], ...] = (
    ("always", 4),
    ("always", 8),
    ("always", None),
    ("while sure", 16),
)
WAYS = ("coupled", "rejection")
TEMPERATURES = (1.0, 0.7)


def sampling_ways(options: argparse.Namespace) -> dict[str, Any]:
    """Common noise and rejection sampling on the shipped model."""
    model, tokenizer = load_model()
    model.to(options.device)
    exits = require_exits(model)
    exit = len(exits.layers) // 2
    rules = {"always": Prescribed((exit,)), "while sure": Threshold(SURE)}
    texts = load_prompts(COUNTED)
    prompts = [tokenizer(text, return_tensors="pt").to(options.device) for text in texts]
    report: dict[str, Any] = {"exit": exits.layers[exit], "layers": model.config.num_hidden_layers}
    for temperature in TEMPERATURES:
        common: dict[str, Any] = {
            "max_new_tokens": options.tokens,
            "min_new_tokens": options.tokens,
            "do_sample": True,
            "top_k": 0,
            "temperature": temperature,
        }
        works = {"model.generate": _in_turn(model.generate, prompts[:TIMED], common)}
        shares: dict[str, dict[str, float]] = {}
        for (name, drafts), way in itertools.product(PLANS, WAYS):
            policy = Policy(ProbeScore(), rules[name], stages=(exit,), mode="verify")
            settings = common | {"policy": policy, "speculation": way, "tier": "native"}
            settings["max_pending"] = drafts
            if f"{name}, {way}" not in shares:  # whatever the number of drafts
                shares[f"{name}, {way}"] = _stayed(model, prompts, settings, exit)
                print(f"    {temperature} {name}, {way}: {shares[f'{name}, {way}']}")
            ours = functools.partial(generate, model)
            works[_label(name, drafts, way)] = _in_turn(ours, prompts[:TIMED], settings)
        times = rounds(works, count=options.rounds, clock=Clock(options.device))
        speeds = {
            label: {
                "ms_per_token": float(np.median(found)) / options.tokens / TIMED * 1e3,
                "speed": ratio(times["model.generate"], found),
                "over_coupled": ratio(times[label.replace("rejection", "coupled")], found),
            }
            for label, found in times.items()
        }
        for label, row in speeds.items():
            print(f"    {label:40s} x{shown(row['speed'])} x{shown(row['over_coupled'])}")
        report[f"temperature {temperature}"] = {"acceptance": shares, "speeds": speeds}
    return report


def _label(name: str, drafts: int | None, way: str) -> str:
    return f"{name}, {drafts or 'measured'} drafts, {way}"


def _in_turn(
    work: Callable[..., Any], prompts: list[Any], settings: dict[str, Any]
) -> Callable[[], None]:
    """One round: every prompt once, under a seed that the variants share in each round."""
    seeds = iter(range(10**6))

    def one() -> None:
        torch.manual_seed(next(seeds))
        for prompt in prompts:
            work(**prompt, **settings)

    return one


def _stayed(
    model: PreTrainedModel, prompts: list[Any], settings: dict[str, Any], exit: int
) -> dict[str, float]:
    """Share of the judged drafts that stayed, and its standard error over prompts.

    A token that its policy did not let stop is no draft: it is told from a replaced draft by its
    score.
    """
    made, kept = np.zeros(len(prompts)), np.zeros(len(prompts))
    for row, prompt in enumerate(prompts):
        output: Any = generate(
            model, **prompt, **settings, random="keyed", seed=row, return_dict_in_generate=True
        )
        stages, scores = output.exit_stages[0, 1:], output.exit_scores[0, 1:]
        rule = settings["policy"].rule
        drafts = scores >= SURE if isinstance(rule, Threshold) else torch.ones_like(stages) > 0
        made[row], kept[row] = int(drafts.sum()), int((drafts & (stages == exit)).sum())
    share = kept.sum() / made.sum()
    error = float(np.sqrt(((kept - share * made) ** 2).sum()) / made.sum())
    return {"share": float(share), "error": error, "drafts": int(made.sum())}


def sampling_table(report: dict[str, Any]) -> str:
    """The figures of the two ways as they stand in the docs: acceptance, then speed."""
    parts = [report[f"temperature {temperature}"] for temperature in TEMPERATURES]
    heads = [f"{way}, T={temperature}" for temperature in TEMPERATURES for way in WAYS]
    lines = [f"| drafts | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(name for name, _ in PLANS):
        found = [part["acceptance"][f"{name}, {way}"] for part in parts for way in WAYS]
        cells = [f"{share['share']:.3f} ± {share['error']:.3f}" for share in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    heads = [*heads[:2], "rejection / coupled", *heads[2:], "rejection / coupled"]
    lines += ["", f"| drafts | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, drafts in PLANS:
        cells = []
        for part in parts:
            rows = [part["speeds"][_label(name, drafts, way)] for way in WAYS]
            cells += [_brief(row["speed"]) for row in rows] + [_brief(rows[1]["over_coupled"])]
        lines.append(f"| {name}, {drafts or 'measured'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _brief(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def shipped(options: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """The shipped model and one of its prompts."""
    model, tokenizer = load_model()
    ids = tokenizer(load_prompts(1)[0], return_tensors="pt").input_ids
    return model.to(options.device), ids.to(options.device)


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in the docs."""
    lines: list[str] = []
    columns = [(name, way) for name in report["models"] for way in report["models"][name]]
    lines.append("| variant | " + " | ".join(f"{name}, {way}" for name, way in columns) + " |")
    lines.append("|---|" + "---|" * len(columns))
    last = report["models"][columns[-1][0]][columns[-1][1]]["rows"]
    for variant in [name for name in last if name != "model.generate"]:
        cells = []
        for name, way in columns:
            row = report["models"][name][way]["rows"].get(variant)
            if row is None:
                cells.append("-")
                continue
            speed, share = row["speed"], row["acceptance"]
            accepted = "" if share is None else f"; {share:.2f}"
            cells.append(
                f"{speed['median']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]{accepted}"
                f"{'' if row['same_text'] else '; other text'}"
            )
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, out="speculation.json", rounds=9, tokens=32)
    parser.add_argument("--sampling", action="store_true", help="two ways to sample")
    options = parser.parse_args()
    if options.sampling:
        kept = options.out.with_name("speculation_sampling.json")
        if not options.table:
            torch.set_num_threads(options.threads)
            found = stamp(options) | sampling_ways(options)
            kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(sampling_table(json.loads(kept.read_text())))
        return
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(options.threads)
    planted = build(options)
    ids = torch.randint(2, options.vocabulary, (1, options.prompt), device=options.device)
    report: dict[str, Any] = stamp(options, planted) | {"models": {}}
    for name, (model, prompt) in {"planted": (planted, ids), "shipped": shipped(options)}.items():
        report["models"][name] = {}
        for way, sampled in (("greedy", False), ("sampled", True)):
            print(name, way)
            report["models"][name][way] = measured(
                model, prompt, options, sampled=sampled, trained=name == "shipped"
            )
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
