"""Train the small causal LM in `adaptive/shipped` on the interpreter's own standard library.

Run from the repository's root::

    python scripts/train_shipped_model.py train --steps 3000
    python scripts/train_shipped_model.py export adaptive/shipped
    python scripts/train_shipped_model.py compare adaptive/shipped runs/again runs/other-seed

Training resumes from `runs/shipped` after an interruption. The schedule is flat until the last
part of `--steps`, so a run may be shortened or extended: start it again with another `--steps`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
import typer
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaptive._stdlib import (
    HELD_OUT_PERCENT,
    Module,
    held_out_functions,
    stdlib_modules,
    training_texts,
)

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Train, measure and export the shipped model."""


VOCABULARY = 4096
BLOCK = 512
CHECKPOINT_SECONDS = 300
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    steps: int = 3000
    seed: int = 0
    workers: int = 2
    rows: int = 2
    first_rows: int = 4
    first_steps: int = 300
    tests: bool = True
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.2
    exit_weight: float = 0.5
    exit_positions: float = 0.25
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step: warm-up, flat, linear to zero."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay_steps)

    def blocks(self, step: int, *, rank: int) -> range:
        """Give the running numbers of the blocks that a worker reads at a step."""
        rows = self.first_rows if step < self.first_steps else self.rows
        before = min(step, self.first_steps) * self.first_rows
        before += max(0, step - self.first_steps) * self.rows
        start = before * self.workers + rank * rows
        return range(start, start + rows)

    @property
    def decay_steps(self) -> int:
        """Steps in the last phase."""
        return max(1, round(self.steps * self.decay_share))


def model_config() -> LlamaConfig:
    """Twelve narrow layers: deep enough for exits, small enough to live in a repository."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


# ------------------------------------------------------------------------------------------ corpus


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens may hold whole runs of indentation; digits stay single."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\n+[ ]*|[ ]?[A-Za-z_]+|\d| ?[^\sA-Za-z_\d]+|[^\S\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts in one row of tokens, each between its begin and end marks."""
    rows = (encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return np.concatenate([np.array([bos, *ids, eos], dtype=np.int64) for ids in rows])


def prepare(run: Path, recipe: Recipe) -> None:
    """Tokenizer and training stream of a run, built once; sources count twice, tests once."""
    if (run / "stream.npy").exists():
        return
    modules = stdlib_modules()
    sources = training_texts(modules, tests=False)
    everything = training_texts(modules, tests=recipe.tests)
    tokenizer = train_tokenizer(everything)
    tokenizer.save_pretrained(run / "tokenizer")
    stream = np.concatenate([encode(tokenizer, everything), encode(tokenizer, sources)])
    partial = run / "partial.npy"
    np.save(partial, stream)
    partial.replace(run / "stream.npy")


def blocks(stream: np.ndarray, numbers: Iterable[int], *, seed: int) -> torch.Tensor:
    """Blocks of the stream by running number; every epoch has its own offset and order."""
    rows = []
    per_epoch = (len(stream) - BLOCK) // BLOCK
    for number in numbers:
        epoch, index = divmod(number, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(BLOCK))
        start = offset + BLOCK * int(rng.permutation(per_epoch)[index])
        rows.append(stream[start : start + BLOCK])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# --------------------------------------------------------------------------------------- optimiser


class Muon:
    """Momentum with orthogonalised updates (Jordan et al., 2024) for the hidden matrices.

    Float32 and batched over matrices of one shape: `torch.optim.Muon` works in bfloat16, which is
    many times slower on processors without bfloat16 arithmetic. Updates have AdamW's typical size.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, weight_decay: float) -> None:
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momenta = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, *, rate: float, rank: int, gradients: torch.Tensor) -> None:
        """One update with this learning rate; the workers share the orthogonalisation.

        `gradients` holds the gradients of all these matrices, and the updates afterwards.
        """
        workers = dist.get_world_size()
        for shape, group in self.groups.items():
            stacked = torch.stack([p.grad for p in group if p.grad is not None])
            momentum = self.momenta[shape].lerp_(stacked, 0.05)
            mine = stacked.lerp(momentum, 0.95)[rank::workers]
            stacked.zero_()
            stacked[rank::workers] = orthogonalise(mine)
            for parameter, change in zip(group, stacked, strict=True):
                parameter.grad.copy_(change)
        dist.all_reduce(gradients)
        for shape, group in self.groups.items():
            scale = 0.2 * max(shape) ** 0.5 * rate
            for parameter in group:
                parameter.mul_(1 - rate * self.weight_decay).sub_(parameter.grad, alpha=scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices, roughly: five Newton-Schulz passes; [n, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


# ---------------------------------------------------------------------------------------- training


def losses(
    model: LlamaForCausalLM, tokens: torch.Tensor, *, layer: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss of the last layer, and of an earlier one at some of the positions."""
    out = model.model(input_ids=tokens[:, :-1], output_hidden_states=True, use_cache=False)
    targets = tokens[:, 1:]
    full = functional.cross_entropy(
        model.lm_head(out.last_hidden_state).flatten(0, 1), targets.flatten()
    )
    early = model.model.norm(out.hidden_states[layer][:, positions])
    exit_ = functional.cross_entropy(
        model.lm_head(early).flatten(0, 1), targets[:, positions].flatten()
    )
    return full, exit_


@dataclass(frozen=True)
class Learner:
    """Model, optimisers, and all gradients in one row, hidden matrices first."""

    model: LlamaForCausalLM
    muon: Muon
    adam: torch.optim.AdamW
    gradients: torch.Tensor


def make_learner(recipe: Recipe) -> Learner:
    """Start from the seed: the same weights in every worker."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(model_config())
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    gradients = torch.zeros(model.num_parameters())
    start = 0
    for parameter in (*hidden, *others):
        parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    muon = Muon(hidden, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    return Learner(model=model, muon=muon, adam=adam, gradients=gradients)


def backward(
    learner: Learner, recipe: Recipe, *, stream: np.ndarray, step: int, rank: int
) -> dict[str, float]:
    """Fill this worker's gradients with its rows of the step."""
    tokens = blocks(stream, recipe.blocks(step, rank=rank), seed=recipe.seed)
    rng = np.random.default_rng([recipe.seed, step, rank])
    layer = int(rng.integers(1, learner.model.config.num_hidden_layers))
    targets = BLOCK - 1
    positions = rng.choice(targets, size=round(targets * recipe.exit_positions), replace=False)
    learner.gradients.zero_()
    full, early = losses(
        learner.model, tokens, layer=layer, positions=torch.from_numpy(np.sort(positions))
    )
    ramp = min(1.0, step / (2 * recipe.warmup))
    (full + ramp * recipe.exit_weight * early).backward()
    return {"loss": float(full.detach()), "layer": layer, "exit_loss": float(early.detach())}


def update(learner: Learner, recipe: Recipe, *, step: int, rank: int) -> dict[str, float]:
    """Average and clip the gradients, and take the step."""
    dist.all_reduce(learner.gradients)
    learner.gradients.div_(recipe.workers)
    norm = float(learner.gradients.norm())
    learner.gradients.mul_(min(1.0, recipe.clip / (norm + 1e-6)))
    rate = recipe.learning_rate * recipe.rate(step)
    hidden = sum(momenta.numel() for momenta in learner.muon.momenta.values())
    learner.muon.step(rate=rate, rank=rank, gradients=learner.gradients[:hidden])
    learner.adam.param_groups[0]["lr"] = rate
    learner.adam.step()
    return {"norm": norm, "rate": rate}


def work(rank: int, recipe: Recipe, run: Path, port: int) -> None:
    """One worker of a run; the first one also keeps the diary and the checkpoints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=recipe.workers)
    learner = make_learner(recipe)
    first = resume(run, recipe, learner)
    stream = np.load(run / "stream.npy", mmap_mode="r")
    saved = time.monotonic()
    for step in tqdm(
        range(first, recipe.steps),
        initial=first,
        total=recipe.steps,
        mininterval=20,
        disable=rank > 0,
    ):
        record = backward(learner, recipe, stream=stream, step=step, rank=rank)
        record |= update(learner, recipe, step=step, rank=rank)
        if rank > 0:
            continue
        log(run, step=step, **record)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == recipe.steps:
            save(run, recipe, learner, step=step + 1)
            saved = time.monotonic()
    dist.destroy_process_group()


def log(run: Path, **record: float) -> None:
    """Append a line to the run's diary."""
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(record | {"time": round(time.time(), 1)}) + "\n")


def save(run: Path, recipe: Recipe, learner: Learner, *, step: int) -> None:
    """Checkpoint, atomically; the last one before the decay is kept beside it."""
    state = {
        "step": step,
        "recipe": asdict(recipe),
        "model": learner.model.state_dict(),
        "muon": learner.muon.momenta,
        "adam": learner.adam.state_dict(),
    }
    names = ["last.pt"] if step > recipe.steps - recipe.decay_steps else ["last.pt", "flat.pt"]
    for name in names:
        torch.save(state, run / "partial.pt")
        (run / "partial.pt").replace(run / name)


def resume(run: Path, recipe: Recipe, learner: Learner) -> int:
    """Load the newest checkpoint that lies on this recipe's schedule; the step to go on with."""
    for name in ("last.pt", "flat.pt"):
        if not (run / name).exists():
            continue
        state = torch.load(run / name, weights_only=True)
        old = Recipe(**state["recipe"])
        if state["step"] > old.steps - old.decay_steps and old.steps != recipe.steps:
            continue
        learner.model.load_state_dict(state["model"])
        learner.muon.momenta = state["muon"]
        learner.adam.load_state_dict(state["adam"])
        return int(state["step"])
    return 0


@app.command()
def train(
    steps: Annotated[int, typer.Option(min=10, help="Length of the whole schedule.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights, order of blocks and exits.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    rows: Annotated[int, typer.Option(min=1, help="Blocks per worker and step.")] = 2,
    first_steps: Annotated[
        int, typer.Option(help="So many steps at the start take four blocks.")
    ] = 300,
    tests: Annotated[bool, typer.Option(help="Train on the `test` package too.")] = True,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    decay_share: Annotated[float, typer.Option(help="Last part of the steps: decay.")] = 0.2,
    run: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")] = Path(
        "runs/shipped"
    ),
) -> None:
    """Train, or go on training."""
    recipe = Recipe(
        steps=steps,
        seed=seed,
        workers=workers,
        rows=rows,
        first_steps=first_steps,
        tests=tests,
        learning_rate=learning_rate,
        decay_share=decay_share,
    )
    run.mkdir(parents=True, exist_ok=True)
    # Large blocks stay with the allocator: returning them to the system costs a third of the time.
    os.environ.update(
        OMP_NUM_THREADS="1", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000"
    )
    prepare(run, recipe)
    port = 20000 + os.getpid() % 20000
    mp.spawn(work, args=(recipe, run, port), nprocs=workers)


# -------------------------------------------------------------------------- measuring and exporting


def sample_blocks(
    modules: list[Module], tokenizer: PreTrainedTokenizerFast, *, n: int, seed: int
) -> tuple[torch.Tensor, list[str]]:
    """Random full blocks out of these modules' files, and the top-level package of each."""
    pieces: list[np.ndarray] = []
    owners: list[str] = []
    for module in modules:
        tokens = encode(tokenizer, [module.source()])
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            pieces.append(tokens[start : start + BLOCK])
            owners.append(module.name.partition(".")[0])
    chosen = np.random.default_rng(seed).permutation(len(pieces))[:n]
    return torch.from_numpy(np.stack([pieces[i] for i in chosen])), [owners[i] for i in chosen]


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Loss, accuracy and agreement with the last layer; each [n_blocks, n_layers]."""
    table: dict[str, list[list[float]]] = {"loss": [], "accuracy": [], "agreement": []}
    for row in tqdm(tokens, desc="measure", mininterval=20):
        out = model.model(input_ids=row[None, :-1], output_hidden_states=True, use_cache=False)
        states = [model.model.norm(h[0]) for h in out.hidden_states[1:-1]]
        logits = [model.lm_head(h) for h in (*states, out.last_hidden_state[0])]
        choice = logits[-1].argmax(-1)
        table["loss"].append([float(functional.cross_entropy(x, row[1:])) for x in logits])
        table["accuracy"].append([float((x.argmax(-1) == row[1:]).float().mean()) for x in logits])
        table["agreement"].append([float((x.argmax(-1) == choice).float().mean()) for x in logits])
    return {name: np.array(rows) for name, rows in table.items()}


def summarise(values: dict[str, np.ndarray], owners: list[str]) -> dict[str, Any]:
    """Means per layer with standard errors that treat each top-level package as a cluster."""
    codes = np.unique(owners, return_inverse=True)[1]
    result: dict[str, Any] = {"blocks": len(owners), "packages": int(codes.max()) + 1}
    for name, rows in values.items():
        mean = rows.mean(axis=0)
        sums = np.zeros((codes.max() + 1, rows.shape[1]))
        np.add.at(sums, codes, rows - mean)
        clusters = len(sums)
        error = np.sqrt((sums**2).sum(axis=0) * clusters / max(1, clusters - 1)) / len(rows)
        result[name] = [round(float(x), 4) for x in mean]
        result[f"{name}_se"] = [round(float(x), 4) for x in error]
    return result


def diary(run: Path, *, step: int) -> dict[str, Any]:
    """Read the log up to a step: hours of work, smoothed training loss."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = {line["step"]: line for line in lines if line["step"] < step}
    times = [last[s]["time"] for s in sorted(last)]
    gaps = np.minimum(np.diff(times), 60.0)
    return {
        "steps_done": step,
        "hours": round(float(gaps.sum()) / 3600, 2),
        "training_loss_last_50_steps": round(
            float(np.mean([last[s]["loss"] for s in sorted(last)[-50:]])), 3
        ),
    }


def figures(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, n: int
) -> dict[str, dict[str, Any]]:
    """Summaries on the same random blocks of held-out and of training modules for every run."""
    sources = [module for module in stdlib_modules() if not module.is_test]
    found = {}
    for side, held in (("held_out", True), ("training", False)):
        modules = [module for module in sources if module.held_out is held]
        tokens, owners = sample_blocks(modules, tokenizer, n=n, seed=0)
        found[side] = summarise(measure(model, tokens), owners)
    return found


def trained(run: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Model of a run's last checkpoint as it would be stored, its tokenizer, the checkpoint."""
    state = torch.load(run / "last.pt", weights_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(state["model"])
    # What is measured is what is stored.
    return model.to(torch.bfloat16).float().eval(), tokenizer, state


STORED = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
)
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, demonstration]
---

# A small causal LM of Python's standard library

The project's own model for demonstrations and tests: it shows adaptive computation on real text
without a download. Nothing in the package needs it; it loads like any other model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("adaptive/shipped")
tokenizer = AutoTokenizer.from_pretrained("adaptive/shipped")
```

{layers} layers of width {hidden}, {parameters:.2f} million parameters (Llama format, tied
embeddings), byte-level BPE with {vocabulary} tokens, stored in bfloat16 ({megabytes:.1f} MB with
the tokenizer), computed in float32.

## Training

```
python scripts/train_shipped_model.py train {options}
python scripts/train_shipped_model.py export adaptive/shipped
```

{steps_done} steps, {tokens:.1f} million tokens, {hours} hours on two busy CPU cores with Python
{python} and torch {torch}. Text: the interpreter's own standard library without the held-out
modules, {tests}; an epoch would be {stream:.1f} million tokens, non-test sources counted twice.
Blocks of {block} tokens: beyond that position the model is untrained, though the configuration
admits {positions}.

Beside the last layer's loss every worker adds, at each step, the loss of one random earlier layer
(weight {exit_weight}, a quarter of the positions) through the shared final norm and head, so that
every layer can be read as an exit.

**Held out**: whole top-level modules whose name's SHA-256 falls below {percent} of 100, and the
tests written for them (`adaptive/_stdlib.py`). With this Python: {held_out_modules} files; the pool
of prompts has {pool} functions.

## Figures

{held[blocks]} random blocks of held-out modules ({held[packages]} packages) and {train[blocks]} of
training modules ({train[packages]} packages), test suites excluded. Loss in nats per token;
agreement is with the last layer's choice. In brackets: standard errors, packages as clusters.

| layer | held-out loss | accuracy | agreement | training loss | accuracy |
|---|---|---|---|---|---|
{rows}

**Spread over runs.** The brackets cover the choice of evaluation text only.
{spread}

## Limits

It has read little: its text has the shape of Python and rarely its sense, and greedy text soon
repeats itself. It is a subject for measurement, not a tool for writing code. The training text is
the standard library's (PSF licence).
"""


def spread(record: dict[str, Any]) -> str:
    """Say how far other runs of the recipe came out from the exported one, over all layers."""
    if not record["runs"]:
        return "Other runs of this recipe were not measured."
    rows = [
        "| seed | hours | held-out loss | accuracy | largest difference at any layer: loss | of "
        "accuracy | of agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = record["held_out"]
    for run in record["runs"]:
        theirs = run["held_out"]
        apart = [
            f"{np.abs(np.subtract(theirs[key], ours[key])).max():.3f}"
            for key in ("loss", "accuracy", "agreement")
        ]
        last = (f"{theirs['loss'][-1]:.3f}", f"{theirs['accuracy'][-1]:.3f}")
        rows.append("| " + " | ".join([str(run["seed"]), str(run["hours"]), *last, *apart]) + " |")
    return "Complete runs of the same recipe, measured on the same blocks:\n\n" + "\n".join(rows)


def card(record: dict[str, Any], *, config: LlamaConfig, size: int) -> str:
    """Text of the model card."""
    held, train, recipe = record["held_out"], record["training"], record["recipe"]
    cells = [
        (
            i + 1,
            *(
                f"{part[key][i]:.3f} ({part[key + '_se'][i]:.3f})"
                for part, key in (
                    (held, "loss"),
                    (held, "accuracy"),
                    (held, "agreement"),
                    (train, "loss"),
                    (train, "accuracy"),
                )
            ),
        )
        for i in range(config.num_hidden_layers)
    ]
    return CARD.format(
        **record["diary"],
        **record["environment"],
        held=held,
        train=train,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        parameters=record["parameters"] / 1e6,
        megabytes=size / 1e6,
        block=BLOCK,
        percent=HELD_OUT_PERCENT,
        options=" ".join(
            f"--{name.replace('_', '-')} {recipe[name]}"
            for name in ("steps", "first_steps", "seed", "decay_share")
        ),
        tokens=Recipe(**recipe).blocks(record["diary"]["steps_done"], rank=0).start * BLOCK / 1e6,
        tests="test suites included" if recipe["tests"] else "without test suites",
        stream=record["stream_tokens"] / 1e6,
        exit_weight=recipe["exit_weight"],
        held_out_modules=record["held_out_modules"],
        pool=record["pool"],
        spread=spread(record),
        rows="\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells),
    )


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in bfloat16 with a configuration that asks for float32 arithmetic."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where the model goes; replaced as a whole.")],
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/shipped"),
    n: Annotated[int, typer.Option(help="Blocks to measure on, of either side.")] = 200,
) -> None:
    """Measure the run's last checkpoint and write model, figures and card."""
    torch.set_num_threads(1)
    model, tokenizer, state = trained(run)
    sources = [m for m in stdlib_modules() if not m.is_test]
    record: dict[str, Any] = {
        "recipe": state["recipe"],
        "diary": diary(run, step=state["step"]),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": model.num_parameters(),
        "stream_tokens": len(np.load(run / "stream.npy", mmap_mode="r")),
        "held_out_modules": sum(m.held_out for m in sources),
        "pool": len(held_out_functions(rng=np.random.default_rng(0))),
        "runs": [],
    } | figures(model, tokenizer, n=n)
    fresh = Path(tempfile.mkdtemp(dir=folder.resolve().parent, prefix=".export-"))
    write_model(model, tokenizer, fresh)
    (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    size = sum(path.stat().st_size for path in fresh.iterdir() if path.name in STORED)
    (fresh / "README.md").write_text(card(record, config=model.config, size=size))
    if folder.exists():
        shutil.rmtree(folder)
    for path in fresh.iterdir():
        path.chmod(0o644)
    fresh.chmod(0o755)
    fresh.rename(folder)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="The exported model.")],
    runs: Annotated[list[Path], typer.Argument(help="Folders of other complete runs.")],
) -> None:
    """Measure other runs of the same recipe on the same blocks; state the spread in the card."""
    torch.set_num_threads(1)
    record = json.loads((folder / "training.json").read_text())
    record.pop("spread", None)
    record["runs"] = []
    for run in runs:
        model, tokenizer, state = trained(run)
        theirs, ours = dict(state["recipe"]), dict(record["recipe"])
        seed = theirs.pop("seed")
        ours.pop("seed")
        if theirs != ours or state["step"] != record["diary"]["steps_done"]:
            raise typer.BadParameter(f"{run} is not a complete run of the exported recipe")
        measured = figures(model, tokenizer, n=record["held_out"]["blocks"])
        hours = diary(run, step=state["step"])["hours"]
        record["runs"].append({"seed": seed, "hours": hours} | measured)
    config = model_config()
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name in STORED)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(record, config=config, size=size))


if __name__ == "__main__":
    app()
