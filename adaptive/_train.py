"""Training exits on the model's own outputs: translators first, then probes, on different units."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._deployment import Deployment
from adaptive._distributed import from_first, processes, take_first
from adaptive._exits import Exits, ExitsRecord, attach_exits
from adaptive._families import Readout
from adaptive._fingerprint import tokens_hash
from adaptive._full_depth import full_states
from adaptive._inputs import Units, read_units, texts_batch
from adaptive._progress import bar
from adaptive._runs import full_depth_texts
from adaptive._training_checkpoint import TrainingCheckpoint
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, UnsupportedError
from adaptive.calibration._validation import check_count, check_positive, check_rng

_log = logging.getLogger(__name__)
_SAVE_EVERY = 50
_MINIBATCH = 128
#: Inverse regularisation strengths tried for a probe.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class ExitTraining:
    """Settings of :func:`train_exits`.

    Parameters
    ----------
    rank : int
        Rank of the translators; 0 trains probes only.
    steps : int
        Optimiser steps for the translators.
    learning_rate : float
        Of AdamW, decayed linearly to zero.
    new_tokens : int
        Tokens generated per prompt.
    slots : int
        Most token positions kept in memory, shared evenly by translators and probes.
    kept_vocabulary : int
        Size of the pruned vocabulary (the full model's most frequent choices); 0 for none.
    batch_size : int
        Prompts run together.
    """

    rank: int = 16
    steps: int = 300
    learning_rate: float = 2e-3
    new_tokens: int = 64
    slots: int = 20_000
    kept_vocabulary: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        least = {
            "rank": 0,
            "steps": 0,
            "new_tokens": 2,
            "slots": 100,
            "kept_vocabulary": 0,
            "batch_size": 1,
        }
        for name, low in least.items():
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=low))
        rate = check_positive("learning_rate", self.learning_rate)
        object.__setattr__(self, "learning_rate", rate)


@dataclass(frozen=True)
class _Slots:
    """Hidden states at sampled positions: ``states [n_exits + 1, n, width]``, last one final."""

    states: Tensor

    def __len__(self) -> int:
        return int(self.states.shape[1])


def train_exits(
    model: PreTrainedModel,
    dataset: Any,
    *,
    layers: Sequence[int] | None = None,
    training: ExitTraining | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checkpoint: str | Path | None = None,
    rng: int = 0,
    progress: bool = True,
) -> Exits:
    """Train exits on a model's own text and attach them.

    The model continues every prompt greedily at full depth. On one half of the prompts each
    exit's translator learns to bring the early readout's distribution to the final one; on the
    other half a logistic regression learns, from the hidden state, whether the early readout's
    choice agrees with the full model's. No labels are needed and the model does not change.

    Parameters
    ----------
    model : PreTrainedModel
    dataset
        Prompts, in any form that :func:`calibrate` takes; at least 4. Calibration will keep these
        prompts, and equal ones, out of its test split.
    layers : sequence of int, optional
        Layer counts below the exits; a quarter, a half and three quarters by default.
    training : ExitTraining, optional
    column : str, optional
        Key or column of the prompt.
    tokenizer : PreTrainedTokenizerBase, optional
    checkpoint : str or Path, optional
        Directory in which progress is kept. A run that was stopped goes on from there; the
        directory must belong to the same model, prompts and settings.
    rng : int
        Seed of everything random.
    progress : bool
        Show progress bars.

    Returns
    -------
    Exits
        Already attached.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If there are fewer than 4 prompts, ``checkpoint`` holds another run, or an argument is out
        of range or of the wrong kind; the message names it.
    """
    training = ExitTraining() if training is None else training
    if not isinstance(training, ExitTraining):
        raise InvalidTypeError("training", training, "an ExitTraining")
    rng = check_rng(rng)
    units = read_units(dataset, model=model, tokenizer=tokenizer, column=column).distinct()
    if len(units) < 4:
        raise InvalidArgumentError(
            "dataset", f"{len(units)} distinct prompts", "at least 4 distinct prompts"
        )
    if checkpoint is not None and processes() > 1:
        raise UnsupportedError("a checkpoint of one training run is written by one process")
    exits = attach_exits(model, layers, rank=training.rank)
    settings = asdict(training) | {"rng": rng, "layers": list(exits.layers)}
    store = TrainingCheckpoint(
        checkpoint, key=tokens_hash([rng]) + json.dumps([exits.record.model, settings, units.ids])
    )
    generator = np.random.default_rng(rng)
    order = generator.permutation(len(units))
    texts = _texts(model, exits, units, training, store, rng, progress)
    parts = [order[: len(order) // 2], order[len(order) // 2 :]]
    shaping, probing = (
        _sample(
            model,
            exits,
            units.select(part),
            [texts[i] for i in part],
            training,
            generator,
            progress,
        )
        for part in parts
    )
    readout = Readout(model)
    if training.rank > 0 and training.steps > 0:
        _fit_translators(exits, shaping, readout, training, store, rng, progress)
    _fit_probes(exits, probing, readout, rng, progress)
    if training.kept_vocabulary:
        exits.kept = _frequent(shaping, readout, training.kept_vocabulary)
    record = ExitsRecord(model=exits.record.model, units=units.ids, settings=settings)
    exits.record = record
    _take_first(exits)
    store.clear()
    return attach_exits(model, exits)


def _take_first(exits: Exits) -> None:
    """Let every process hold the first one's weights and kept vocabulary."""
    if processes() > 1:
        kept = from_first(exits.kept.cpu)
        exits.kept = nn.Parameter(kept.to(exits.kept.device), requires_grad=False)
        take_first(exits)


def _texts(
    model: PreTrainedModel,
    exits: Exits,
    units: Units,
    training: ExitTraining,
    store: TrainingCheckpoint,
    rng: int,
    progress: bool,
) -> list[tuple[int, ...]]:
    kept = store.texts()
    if kept is not None:
        return kept
    deployment = Deployment(
        new_tokens=training.new_tokens,
        batch_size=training.batch_size,
        generation={"do_sample": False},
        seed=rng,
    )
    texts = full_depth_texts(
        model, units, exits, deployment=deployment, progress=progress, description="own text"
    )
    store.keep_texts(texts)
    return texts


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    exits: Exits,
    units: Units,
    texts: Sequence[tuple[int, ...]],
    training: ExitTraining,
    generator: np.random.Generator,
    progress: bool,
) -> _Slots:
    """Hidden states at randomly chosen positions of the texts, equally many per unit."""
    share = max(1, training.slots // 2 // max(1, len(units)))
    usable = [i for i in range(len(units)) if len(texts[i]) > 1]
    if not usable:
        raise InvalidArgumentError(
            "dataset", "prompts whose text ends at once", "prompts the model continues"
        )
    found: list[Tensor] = []
    with bar(total=len(usable), desc="hidden states", unit="unit", progress=progress) as shown:
        for start in range(0, len(usable), training.batch_size):
            index = usable[start : start + training.batch_size]
            pairs = [(units.prompts[i], texts[i]) for i in index]
            ids, mask = texts_batch(pairs, model.device)
            states, _ = full_states(model, ids, mask, exits.layers)
            for row, (_, text) in enumerate(pairs):
                n = len(text) - 1
                chosen = torch.from_numpy(generator.permutation(n)[:share])
                found.append(torch.stack([state[row, :n].cpu()[chosen] for state in states]))
            shown.update(len(index))
    return _Slots(torch.cat(found, dim=1))


def _fit_translators(
    exits: Exits,
    slots: _Slots,
    readout: Readout,
    training: ExitTraining,
    store: TrainingCheckpoint,
    rng: int,
    progress: bool,
) -> None:
    """Minimise the cross-entropy of the early readouts against the final distribution."""
    device = exits.down.device
    generator = torch.Generator("cpu").manual_seed(rng)
    with torch.no_grad():
        # a random projection down and zero up: the translator starts as the identity
        scale = exits.down.shape[-1] ** -0.5
        exits.down.copy_(torch.randn(exits.down.shape, generator=generator, device="cpu") * scale)
    weights = {"down": exits.down, "up": exits.up, "shift": exits.shift}
    learned = {
        name: nn.Parameter(value.detach().float().clone()) for name, value in weights.items()
    }
    optimizer = torch.optim.AdamW(learned.values(), lr=training.learning_rate, weight_decay=0.0)
    first = _resume(store.tensors(), learned, optimizer)
    for step in bar(range(training.steps), desc="translators", unit="step", progress=progress):
        index = torch.randint(len(slots), (_MINIBATCH,), generator=generator, device="cpu")
        if step < first:
            continue  # the draw above keeps a resumed run on the same random numbers
        rate = training.learning_rate * (1 - step / training.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _translator_loss(learned, slots.states[:, index].to(device), readout)
        # not `backward`, which would leave gradients on the model's norm and head
        gradients = torch.autograd.grad(loss, list(learned.values()))
        for value, gradient in zip(learned.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        if (step + 1) % _SAVE_EVERY == 0:
            store.keep_tensors(_progress(step + 1, learned, optimizer))
    with torch.no_grad():
        for name, value in learned.items():
            weights[name].copy_(value)


def _translator_loss(learned: dict[str, nn.Parameter], states: Tensor, readout: Readout) -> Tensor:
    dtype = states.dtype
    with torch.no_grad():
        target = torch.softmax(readout(states[-1]).float(), dim=-1)
    early = states[:-1].float()
    projected = torch.einsum("enw,erw->enr", early, learned["down"])
    corrected = (
        early + torch.einsum("enr,ewr->enw", projected, learned["up"]) + learned["shift"][:, None]
    )
    logits = readout(corrected.to(dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), target.repeat(early.shape[0], 1))


def _progress(
    step: int, learned: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {"step": torch.tensor(step)}
    for name, value in learned.items():
        state = optimizer.state[value]
        kept |= {
            name: value,
            f"{name}.exp_avg": state["exp_avg"],
            f"{name}.exp_avg_sq": state["exp_avg_sq"],
        }
    return kept


def _resume(
    kept: dict[str, Tensor] | None, learned: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> int:
    """Put a kept state back; return the number of steps already done."""
    if kept is None:
        return 0
    step = int(kept["step"])
    for name, value in learned.items():
        value.data.copy_(kept[name])
        optimizer.state[value] = {
            "step": torch.tensor(float(step)),
            "exp_avg": kept[f"{name}.exp_avg"].to(value.device),
            "exp_avg_sq": kept[f"{name}.exp_avg_sq"].to(value.device),
        }
    _log.info("resuming translators after step %d", step)
    return step


@torch.no_grad()
def _fit_probes(exits: Exits, slots: _Slots, readout: Readout, rng: int, progress: bool) -> None:
    """Fit one logistic regression per exit: does its choice agree with the full model's."""
    device = exits.down.device
    choices = _argmax(slots.states[-1], readout, device)
    for exit in bar(range(len(exits.layers)), desc="probes", unit="exit", progress=progress):
        states = slots.states[exit]
        answers = torch.cat(
            [
                readout(exits.translate(exit, part.to(device))).argmax(dim=-1).cpu()
                for part in states.split(_MINIBATCH)
            ]
        )
        weight, bias = fit_probe(states.float().numpy(), (answers == choices).numpy(), rng=rng)
        exits.probe_weight[exit].copy_(torch.from_numpy(weight))
        exits.probe_bias[exit].fill_(bias)


def fit_probe(
    states: NDArray[np.floating[Any]], agree: NDArray[np.bool_], *, rng: int
) -> tuple[NDArray[np.float32], float]:
    """Fit a logistic regression and fold its scaling into weight and bias.

    Parameters
    ----------
    states : ndarray [n, width]
    agree : ndarray of bool [n]
    rng : int

    Returns
    -------
    weight : ndarray of float32 [width]
    bias : float
        ``states @ weight + bias`` is the logit of agreement. With fewer than 10 of either label
        the probe is constant: there is nothing to learn from.
    """
    n, positive = agree.size, int(agree.sum())
    if min(positive, n - positive) < 10:
        rate = (positive + 0.5) / (n + 1)
        return np.zeros(states.shape[1], dtype=np.float32), float(np.log(rate / (1 - rate)))
    scaler = StandardScaler().fit(states)
    scaled = scaler.transform(states)
    shaping, checking = train_test_split(
        np.arange(n), test_size=1 / 3, random_state=rng, stratify=agree
    )

    def checked(strength: float) -> float:
        model = LogisticRegression(C=strength, max_iter=500).fit(scaled[shaping], agree[shaping])
        return float(log_loss(agree[checking], model.predict_proba(scaled[checking])))

    best = min(_STRENGTHS, key=checked)
    model = LogisticRegression(C=best, max_iter=500).fit(scaled, agree)
    weight = model.coef_[0] / scaler.scale_
    return weight.astype(np.float32), float(model.intercept_[0] - weight @ scaler.mean_)


def _argmax(states: Tensor, readout: Readout, device: torch.device) -> Tensor:
    parts = [readout(part.to(device)).argmax(dim=-1).cpu() for part in states.split(_MINIBATCH)]
    return torch.cat(parts)


@torch.no_grad()
def _frequent(slots: _Slots, readout: Readout, size: int) -> nn.Parameter:
    """Return the full model's most frequent choices, most frequent first."""
    counts = torch.bincount(_argmax(slots.states[-1], readout, torch.device(readout.device)))
    kept = torch.argsort(counts, descending=True, stable=True)[:size]
    return nn.Parameter(kept.to(readout.device), requires_grad=False)
