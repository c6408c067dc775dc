"""The main job on real text: calibrate the shipped model, check the promise on fresh prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._calibrate import calibrate
from adaptive._deployment import Deployment
from adaptive._display import RiskPathDisplay
from adaptive._display_axes import save_figure
from adaptive._display_depth import TokenDepthDisplay
from adaptive._exits import require_exits
from adaptive._families import layers_of
from adaptive._generate import generate
from adaptive._inputs import Units, read_units
from adaptive._output import AdaptiveOutput
from adaptive._progress import bar
from adaptive._run import mean_run_depth
from adaptive._runs import full_depth, run_units
from adaptive._stdlib import held_out_functions
from adaptive._timing import layer_and_head_seconds
from adaptive.calibration import InvalidArgumentError
from adaptive.examples import POOL, load_model
from adaptive.policies import Mode, Policy

#: Longest functions used, in lines: prompts stay short enough for a demonstration.
_LONGEST = 16
#: Prompts decoded together.
_BATCH = 16


@dataclass(frozen=True)
class _Outcome:
    """One row of the table."""

    mode: Mode
    policy: Policy
    bound: float | None
    realised: float
    error: float
    depth: float
    ideal: float
    layers: int
    speed: float
    full_speed: float


def run_demo(
    *,
    risk: float,
    delta: float,
    units: int,
    fresh: int,
    new_tokens: int,
    out: Path,
    rng: int,
    progress: bool,
    console: Console,
) -> None:
    """Calibrate in both modes, measure on fresh prompts, print a table, a text and a plot."""
    started = time.perf_counter()
    model, tokenizer = load_model()
    prompts = _prompts(units + fresh, rng)
    console.print(
        f"Model: {model.config.num_hidden_layers} layers, exits after "
        f"{require_exits(model).layers}; {units} prompts to calibrate on, {fresh} fresh ones to "
        f"check, {new_tokens} new tokens each."
    )
    later = read_units(prompts[units:], model=model, tokenizer=tokenizer)
    deployment = Deployment(
        new_tokens=new_tokens, batch_size=_BATCH, generation={"do_sample": False}, seed=rng
    )
    outcomes = []
    for mode in ("exact", "propagate"):
        console.print(f"\n[bold]Calibrating in `{mode}` mode[/bold]")
        policy = calibrate(
            model,
            prompts[:units],
            risk,
            delta,
            mode=mode,
            pool=POOL,
            new_tokens=new_tokens,
            batch_size=_BATCH,
            members=6,
            tokenizer=tokenizer,
            rng=rng,
            progress=progress,
        )
        assert policy.certificate is not None
        console.print(str(policy.certificate), style="dim")
        outcomes.append(_measured(model, later, policy, deployment, progress))
    console.print()
    console.print(_table(outcomes, risk, delta))
    best = max(outcomes, key=lambda outcome: outcome.speed)
    console.print(_completion(model, tokenizer, later, best.policy, new_tokens))
    out.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        outcome.policy.save_pretrained(out / outcome.mode)
    written = _plot(outcomes, out)
    console.print(
        f"Policies in {out}; " + (f"plot in {written}. " if written else "no plot. "), end=""
    )
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


def _prompts(count: int, rng: int) -> list[str]:
    """Draw prompts from the pool that neither the shipped model nor its exits were trained on."""
    pool = held_out_functions(rng=np.random.default_rng(rng), maximum_lines=_LONGEST)
    if count > len(pool):
        raise InvalidArgumentError(
            "units", count, f"at most {len(pool)} together with `fresh`, the functions there are"
        )
    return [prompt.text for prompt in pool[:count]]


def _measured(
    model: PreTrainedModel, fresh: Units, policy: Policy, deployment: Deployment, progress: bool
) -> _Outcome:
    """Risk and depth on fresh prompts, and speed beside full depth, one prompt at a time."""
    runs = run_units(
        model, fresh, policy, deployment=deployment, progress=progress, description="fresh prompts"
    )
    losses = np.array([run.disagreement for run in runs])
    exits, layers = require_exits(model), len(layers_of(model))
    depth = mean_run_depth(runs, exits.layers, layers)
    layer, head = layer_and_head_seconds(model)
    certificate = policy.certificate
    assert certificate is not None
    bound = certificate.evidence.get("upper_bound", {}).get(certificate.loss)
    full, early = _speeds(model, fresh, [full_depth(exits), policy], deployment, progress)
    return _Outcome(
        mode=policy.mode,
        policy=policy,
        bound=bound if certificate.holds else None,
        realised=float(losses.mean()),
        error=float(losses.std(ddof=1) / np.sqrt(losses.size)),
        depth=depth,
        ideal=(layers * layer + head) / (depth * layer + head),
        layers=layers,
        speed=early,
        full_speed=full,
    )


def _speeds(
    model: PreTrainedModel,
    fresh: Units,
    policies: Sequence[Policy],
    deployment: Deployment,
    progress: bool,
) -> list[float]:
    """Tokens per second of each policy, taking turns over the same prompts."""
    spent, tokens = np.zeros(len(policies)), np.zeros(len(policies))
    few = fresh.prompts[:16]
    for index, prompt in enumerate(bar(few, desc="timing", unit="prompt", progress=progress)):
        ids = torch.tensor([prompt])
        for column, policy in enumerate(policies):
            start = time.perf_counter()
            sequence = generate(
                model,
                ids,
                attention_mask=torch.ones_like(ids),
                policy=replace(policy, certificate=None),
                **deployment.arguments([fresh.ids[index]]),
            )
            spent[column] += time.perf_counter() - start
            assert isinstance(sequence, torch.Tensor)
            tokens[column] += sequence.shape[1] - ids.shape[1]
    return [float(value) for value in tokens / spent]


def _table(outcomes: Sequence[_Outcome], risk: float, delta: float) -> Table:
    """One column per mode: narrow enough for any terminal."""
    table = Table(title="Share of tokens that differ from the full model's choice, per prompt")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.mode, justify="right")
    rows: dict[str, Callable[[_Outcome], str]] = {
        "promised risk": lambda outcome: f"{risk:g}, confidence {1 - delta:g}",
        "upper bound": lambda outcome: "-" if outcome.bound is None else f"{outcome.bound:.4f}",
        "realised on fresh prompts": lambda outcome: (
            f"{outcome.realised:.4f} ± {outcome.error:.4f}"
        ),
        "mean depth, in layers": lambda outcome: f"{outcome.depth:.2f} of {outcome.layers}",
        "ideal speed-up": lambda outcome: f"x{outcome.ideal:.2f}",
        "realised speed-up": lambda outcome: f"x{outcome.speed / outcome.full_speed:.2f}",
        "tokens/s with the policy": lambda outcome: f"{outcome.speed:.0f}",
        "tokens/s at full depth": lambda outcome: f"{outcome.full_speed:.0f}",
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(outcome) for outcome in outcomes))
    return table


def _completion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fresh: Units,
    policy: Policy,
    new_tokens: int,
) -> Text:
    """One fresh prompt's text, each token in the colour of its exit."""
    ids = torch.tensor([min(fresh.prompts, key=len)])
    output = generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        policy=policy,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AdaptiveOutput)
    display = TokenDepthDisplay.from_output(output, model, tokenizer=tokenizer)
    return Text("\nOne completion: ").append_text(display.__rich__()).append("\n")


def _plot(outcomes: Sequence[_Outcome], out: Path) -> Path | None:
    """Draw risk and depth along the paths; ``None`` without matplotlib or tested members."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return None
    tested = [outcome for outcome in outcomes if "mean_depth" in _evidence(outcome.policy)]
    if not tested:
        return None
    figure, axes = pyplot.subplots(
        1, len(tested), figsize=(6.4 * len(tested), 4.0), layout="constrained", squeeze=False
    )
    for ax, outcome in zip(axes[0], tested, strict=True):
        assert outcome.policy.certificate is not None
        RiskPathDisplay.from_certificate(outcome.policy.certificate).plot(ax=ax)
        legend = ax.get_legend()
        assert legend is not None
        legend.set_title(f"{outcome.mode} mode")  # a title of the axes would lie on the legend
    path = out / "risk_path.png"
    save_figure(axes[0][0], path)
    pyplot.close(figure)
    return path


def _evidence(policy: Policy) -> dict[str, Any]:
    return {} if policy.certificate is None else policy.certificate.evidence
