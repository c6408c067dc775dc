"""Training an encoder's exits: classifiers on one half of the units, probes on the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._classifier_exits import ClassifierExits, untrained_exits
from adaptive._distributed import take_first
from adaptive._encoder_stages import EncoderStages
from adaptive._encoders import EncoderRun, encoder_layers
from adaptive._examples import Examples, read_examples
from adaptive._exits import ExitsRecord
from adaptive._progress import bar
from adaptive._rows import take_rows
from adaptive._train import fit_probe
from adaptive.calibration import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import check_count, check_rng

_log = logging.getLogger(__name__)
#: Penalties tried for a classifier, per unit of standardised weight squared.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Share of a half that decides between them.
_CHECKING = 1 / 3


@dataclass(frozen=True)
class ClassifierTraining:
    """Settings of :func:`~adaptive.classifiers.train_classifier_exits`.

    Parameters
    ----------
    steps : int
        Most iterations of L-BFGS per classifier and penalty, at least 1.
    batch_size : int
        Rows run together, at least 1. Changes time only.
    """

    steps: int = 100
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))


def train_classifier_exits(
    model: PreTrainedModel,
    dataset: Any,
    *,
    layers: Sequence[int] | None = None,
    training: ClassifierTraining | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rng: int = 0,
    progress: bool = True,
) -> ClassifierExits:
    """Train exits of a Hugging Face classifier and attach them.

    On one half of the inputs a linear classifier per exit learns the labels or, without labels,
    the model's own probabilities (self-distillation); on the other half a logistic regression
    learns whether that classifier's answer is the full model's. The model does not change.

    Parameters
    ----------
    model : PreTrainedModel
        BERT, ALBERT, RoBERTa, DistilBERT or ViT with a classification head.
    dataset
        Inputs, with labels or without, in any form that :func:`~adaptive.calibrate` takes; at
        least 8 distinct ones. Calibration will keep these inputs, and equal ones, out of its test
        split.
    layers : sequence of int, optional
        Layer counts below the exits; a quarter, a half and three quarters by default.
    training : ClassifierTraining, optional
    column : str, optional
        Column of the inputs.
    tokenizer : PreTrainedTokenizerBase, optional
        For texts; by default the one saved beside the model.
    rng : int
        Seed of the halves.
    progress : bool
        Show progress bars.

    Returns
    -------
    ClassifierExits
        Already attached. ``save_pretrained`` writes them beside the model.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If there are fewer than 8 distinct inputs, labels the model has no class for, or an argument
        is out of range or of the wrong kind; the message names it.
    UnsupportedError
        If the model's family is not supported.

    Notes
    -----
    Cost: one full-depth pass, then convex problems on ``2 width`` numbers per input and exit.
    """
    training = ClassifierTraining() if training is None else training
    if not isinstance(training, ClassifierTraining):
        raise InvalidTypeError("training", training, "a ClassifierTraining")
    rng = check_rng(rng)
    exits = untrained_exits(model, layers)
    stages = EncoderStages(model, None, tokenizer)
    units = read_examples(dataset, stages=stages, column=column).distinct()
    if len(units) < 8:
        raise InvalidArgumentError("dataset", f"{len(units)} distinct inputs", "at least 8")
    if units.labels is not None and units.labels.max() >= exits.classes:
        raise InvalidArgumentError(
            "dataset", f"label {units.labels.max()}", f"labels in 0..{exits.classes - 1}"
        )
    exits = exits.to(model.device)
    summaries, finals = _states(stages, exits, units, training.batch_size, progress)
    targets = torch.softmax(finals, dim=-1)
    if units.labels is not None:
        targets = F.one_hot(torch.from_numpy(units.labels), exits.classes).float()
    order = np.random.default_rng(rng).permutation(len(units))
    shaping, probing = (torch.from_numpy(part) for part in np.array_split(order, 2))
    for exit in bar(range(len(exits.layers)), desc="exits", unit="exit", progress=progress):
        states = summaries[exit]
        weight, bias = fit_classifier(states[shaping], targets[shaping], steps=training.steps)
        exits.weight[exit].copy_(weight)
        exits.bias[exit].copy_(bias)
        answers = (states[probing] @ weight.T + bias).argmax(dim=-1)
        agree = (answers == finals[probing].argmax(dim=-1)).numpy()
        probe, shift = fit_probe(states[probing].numpy(), agree, rng=rng)
        exits.probe_weight[exit].copy_(torch.from_numpy(probe))
        exits.probe_bias[exit].fill_(shift)
        _log.info("exit %d agrees with the full model on %.3f", exit, agree.mean())
    settings = asdict(training) | {"rng": rng, "labels": units.labels is not None}
    exits.record = ExitsRecord(exits.record.model, units.ids, settings)
    take_first(exits)
    return exits.attach(model)


@torch.no_grad()
def _states(
    stages: EncoderStages, exits: ClassifierExits, units: Examples, size: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Read the exits' inputs, float32 [n_exits, n, 2 width], and logits [n, classes]."""
    found: list[Tensor] = []
    finals: list[Tensor] = []
    bounds = (0, *exits.layers)
    with bar(total=len(units), desc="hidden states", unit="input", progress=progress) as shown:
        for start in range(0, len(units), size):
            rows = torch.arange(start, min(len(units), start + size), device="cpu")
            run = EncoderRun(stages.model, stages.prepared(take_rows(units.inputs, rows)))
            read = []
            for low, high in zip(bounds, exits.layers, strict=False):
                run.forward(low, high)
                read.append(run.summary().cpu())
            run.forward(exits.layers[-1], encoder_layers(stages.model))
            found.append(torch.stack(read))
            finals.append(run.logits().float().cpu())
            shown.update(len(rows))
    return torch.cat(found, dim=1), torch.cat(finals)


def fit_classifier(states: Tensor, targets: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression to soft labels and fold its scaling in.

    Parameters
    ----------
    states : Tensor, float32 [n, width]
    targets : Tensor, float32 [n, classes]
        Probabilities.
    steps : int
        Most iterations.

    Returns
    -------
    weight : Tensor, float32 [classes, width]
    bias : Tensor, float32 [classes]
        ``states @ weight.T + bias`` are logits. The penalty is the one of a few that does best on
        the last third of the rows.
    """
    mean, scale = states.mean(dim=0), states.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6, scale, 1.0)
    scaled = (states - mean) / scale
    cut = len(scaled) - max(1, int(_CHECKING * len(scaled)))

    def checked(penalty: float) -> float:
        weight, bias = _solve(scaled[:cut], targets[:cut], penalty, steps)
        return float(F.cross_entropy(scaled[cut:] @ weight.T + bias, targets[cut:]))

    weight, bias = _solve(scaled, targets, min(_PENALTIES, key=checked), steps)
    weight = weight / scale
    return weight, bias - weight @ mean


@torch.enable_grad()
def _solve(states: Tensor, targets: Tensor, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy plus a ridge penalty; convex, so no seed matters."""
    like: dict[str, Any] = {"device": states.device, "requires_grad": True}
    weight = torch.zeros(targets.shape[1], states.shape[1], **like)
    bias = torch.zeros(targets.shape[1], **like)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(states @ weight.T + bias, targets) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()
