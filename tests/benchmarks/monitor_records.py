"""Unit-level records of the shipped model, from which `monitor_shipped.py` replays traffic.

    python tests/benchmarks/monitor_records.py --out FOLDER     # hours on two busy cores; resumable
    python tests/benchmarks/monitor_records.py --out FOLDER --merge    # shards to one file

A policy is calibrated once, which fixes a path of members. Then every prompt of every kind of
traffic is generated for real under every member, each token labelled by a full-depth pass over the
run's own text, and once at full depth, where the members' early answers are only compared (what a
monitor sees in fallback). What is kept per prompt and member is what a monitor sees of a unit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptive._calibrate import calibrate
from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._families import layers_of
from adaptive._inputs import Units, read_units
from adaptive._path import token_losses
from adaptive._run import mean_run_depth
from adaptive._runs import full_depth, run_units
from adaptive._stdlib import held_out_functions, prose_prompts
from adaptive.examples import load_model
from adaptive.policies import Policy, ProbeScore, Saturation, Threshold

POOL = "functions of held-out modules of the Python standard library"
RISK, DELTA, NEW_TOKENS, CALIBRATION, LONGEST = 0.1, 0.05, 32, 280, 24
SCORES = {"probe": ProbeScore(), "saturation": Saturation()}
SHARD = 96
#: Members recorded; cheaper ones are predicted to break the promise and are rarely visited.
MEMBERS = 4
#: Tokens; the model was trained on blocks of 512.
LONGEST_PROMPT = 400


def policy_of(model: Any, tokenizer: Any, prompts: Sequence[str], *, score: str) -> Policy:
    """Return the calibrated policy whose path all records share."""
    stages = tuple(range(len(require_exits(model).layers)))
    return calibrate(
        model,
        prompts,
        RISK,
        DELTA,
        policy=Policy(SCORES[score], Threshold(), stages=stages, mode="propagate"),
        pool=POOL,
        new_tokens=NEW_TOKENS,
        batch_size=32,
        members=6,
        tokenizer=tokenizer,
        progress=False,
    )


#: Of each prompt, in this order.
DISTORTIONS = ("shuffled words", "no spaces", "capitals", "foreign symbols")


def adversarial(prompts: Sequence[str], *, rng: np.random.Generator) -> list[str]:
    """Return all `DISTORTIONS` of each prompt."""
    found = []
    for prompt in prompts:
        words = prompt.split(" ")
        found.append(" ".join(words[i] for i in rng.permutation(len(words))))
        found.append(prompt.replace(" ", ""))
        found.append(prompt.upper())
        shifted = [chr(ord(c) + 0x3A0) if rng.random() < 0.5 and c.isalpha() else c for c in prompt]
        found.append("".join(shifted))
    return found


def traffic(rng: int) -> tuple[list[str], dict[str, list[str]]]:
    """Prompts of the calibration, and of the kinds of traffic."""
    functions = held_out_functions(rng=np.random.default_rng(rng), maximum_lines=LONGEST)
    texts = [function.text for function in functions]
    python = texts[CALIBRATION:]
    return texts[:CALIBRATION], {
        "prose": prose_prompts(800, rng=np.random.default_rng(rng), words=40),
        "adversarial": adversarial(python[:150], rng=np.random.default_rng(rng)),
        "python": python,
    }


def units_of(texts: Sequence[str], model: Any, tokenizer: Any) -> Units:
    """Distinct prompts that are short enough."""
    units = read_units(texts, model=model, tokenizer=tokenizer).distinct()
    short = [i for i, prompt in enumerate(units.prompts) if len(prompt) <= LONGEST_PROMPT]
    return units.select(short)


def distortions(texts: Sequence[str], units: Units, tokenizer: Any) -> NDArray[np.uint8]:
    """Place in `DISTORTIONS` of each adversarial unit; the first text that gives its tokens."""
    places = {
        tuple(tokenizer(text)["input_ids"]): place % len(DISTORTIONS)
        for place, text in reversed(list(enumerate(texts)))
    }
    return np.array([places[tuple(prompt)] for prompt in units.prompts], np.uint8)


def merge(folder: Path, kinds: dict[str, list[str]], model: Any, tokenizer: Any) -> None:
    """Write all shards, and which distortion each adversarial unit is, into one file."""
    found: dict[str, NDArray[Any]] = {}
    for kind in kinds:
        shards = [np.load(path) for path in sorted(folder.glob(f"{kind}-*.npz"))]
        for name in ("loss", "shadow", "score", "depth"):
            whole = np.concatenate([shard[name][:, 1:] for shard in shards])
            found[f"{kind}_{name}"] = whole.astype(np.float32)
    texts = kinds["adversarial"]
    found["adversarial_distortion"] = distortions(
        texts, units_of(texts, model, tokenizer), tokenizer
    )
    np.savez_compressed(folder / "records.npz", **found)


def record(
    model: Any, units: Units, policy: Policy, knobs: Sequence[float]
) -> dict[str, NDArray[np.float64]]:
    """Everything a monitor would see of some units under every member, ``[n_units, n_members]``."""
    exits, layers = require_exits(model), len(layers_of(model))
    deployment = Deployment(
        new_tokens=NEW_TOKENS, batch_size=32, generation={"do_sample": False}, seed=0
    )
    full = run_units(
        model,
        units,
        replace(full_depth(exits), mode="propagate"),
        deployment=deployment,
        labels=False,
        progress=False,
    )
    shape = (len(units), len(knobs))
    found = {name: np.zeros(shape) for name in ("loss", "shadow", "score")}
    found["depth"] = np.full(shape, float(layers))
    found["score"][:] = np.nan
    long = [i for i, run in enumerate(full) if len(run.tokens) > 1]
    trace = collect(
        model,
        units.select(long),
        [full[i].tokens for i in long],
        deployment=deployment,
        score=policy.score,
        stages=policy.stages,
        progress=False,
    )
    starts = np.concatenate(([0], np.cumsum(trace.lengths)[:-1]))
    for j, knob in enumerate(knobs):
        if j == 0:
            continue
        member = policy.member(knob)
        wrong = np.add.reduceat(token_losses(member, trace).astype(float), starts)
        found["shadow"][long, j] = wrong / (trace.lengths + 1)
        runs = run_units(model, units, member, deployment=deployment, progress=False)
        found["loss"][:, j] = [run.disagreement for run in runs]
        found["depth"][:, j] = [mean_run_depth([run], exits.layers, layers) for run in runs]
        asked = [run.scores[~np.isnan(run.scores)] for run in runs]
        found["score"][:, j] = [float(s.mean()) if s.size else np.nan for s in asked]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score", choices=sorted(SCORES), default="saturation")
    parser.add_argument("--limit", type=int, default=None, help="prompts per kind of traffic")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--shards", type=int, default=None, help="stop after so many new files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    calibration, kinds = traffic(0)
    if options.merge:
        merge(options.out, kinds, model, tokenizer)
        return
    saved = options.out / "policy.json"
    if not saved.exists():
        policy_of(model, tokenizer, calibration, score=options.score).save_pretrained(options.out)
    policy = Policy.from_pretrained(options.out)
    assert policy.certificate is not None
    knobs = [float(knob) for knob in policy.certificate.evidence["knobs"][: MEMBERS + 1]]
    print(policy.certificate.summary, policy.certificate.evidence["mean_depth"], flush=True)
    written = 0
    for kind, texts in kinds.items():
        texts = texts[: options.limit]
        units = units_of(texts, model, tokenizer)
        for start in range(0, len(units), SHARD):
            shard = options.out / f"{kind}-{start:05d}.npz"
            if shard.exists():
                continue
            if written == options.shards:
                return
            written += 1
            rows = range(start, min(start + SHARD, len(units)))
            found = record(model, units.select(rows), policy, knobs)
            partial = shard.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, **found)
            partial.replace(shard)
            means = {name: np.round(np.nanmean(v, axis=0), 3).tolist() for name, v in found.items()}
            print(shard.name, json.dumps(means), flush=True)


if __name__ == "__main__":
    main()
