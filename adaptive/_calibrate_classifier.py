"""``calibrate`` for classifiers: the same promises as for text, on answers instead of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adaptive._certify_classifier import certify_classifier
from adaptive._classifier_bench import ClassifierBench, ClassifierSplit
from adaptive._classifier_losses import ClassLoss, ClassLossName, row_loss
from adaptive._distributed import from_first, require_equal
from adaptive._encoder_stages import EncoderStages
from adaptive._evidence import (
    FIT_SHARE,
    TRAIN_SHARE,
    Facts,
    count_units,
    data_fingerprint,
    parted,
    test_of,
    too_few,
    unshaped,
)
from adaptive._examples import Examples, read_examples
from adaptive._predict import stages_of
from adaptive._stages import AbstractStages
from adaptive._train_classifier import ClassifierTraining, train_classifier_exits
from adaptive._transfer import move
from adaptive.calibration import (
    DeltaLedger,
    InvalidArgumentError,
    InvalidTypeError,
    minimum_units,
)
from adaptive.policies import Policy

_log = logging.getLogger(__name__)


def calibrate_classifier(
    model: Any,
    dataset: Any,
    risk: float,
    delta: float,
    *,
    policy: Policy | None,
    loss: ClassLossName | ClassLoss,
    bound: float | None,
    method: str,
    groups: Sequence[Any] | str | None,
    pool: str | None,
    batch_size: int,
    members: int,
    column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    training: object,
    device: torch.device | str | None,
    ledger: DeltaLedger | None,
    rng: int,
    progress: bool,
) -> Policy:
    """Certify a policy for a classifier; parameters and promises as :func:`calibrate` has them."""
    if training is not None and not isinstance(training, ClassifierTraining):
        raise InvalidTypeError("training", training, "a ClassifierTraining")
    measured = row_loss(loss, bound=bound)
    needed = minimum_units(risk, delta, **test_of(measured, method))
    if device is not None:
        if not hasattr(model, "to"):
            raise InvalidArgumentError("device", device, "None: this model has no `to`")
        move(model, device)
    stages = stages_of(model, tokenizer=tokenizer)
    units = read_examples(dataset, stages=stages, column=column, groups=groups)
    if measured.needs_labels and units.labels is None:
        raise InvalidArgumentError(
            "dataset", "no labels", f"inputs with labels for loss={loss!r}: (inputs, labels)"
        )
    require_equal(stages.fingerprints() | {"data": units.ids})
    split = _split(stages, units, training=training, rng=rng, progress=progress)
    clustered = groups is not None and pool is None
    if not clustered:
        split = replace(split, test=replace(split.test, groups=None))
    n_test = count_units(split.test)
    _log.info("this promise needs at least %d units; the test split has %d", needed, n_test)
    bench = ClassifierBench.of(
        split, policy, loss=measured, batch_size=batch_size, seed=rng, progress=progress
    )
    facts = Facts(
        fingerprints=split.stages.fingerprints() | {"data": data_fingerprint(units)},
        decoding={
            "task": "classification",
            "dtype": split.stages.dtype,
            "batch_size": batch_size,
            "stages": list(bench.family.stages),
        },
        split=split.record(rng),
        pool=pool,
        unit="cluster" if clustered else "input",
        noun="input",
    )
    if n_test < needed:
        why = too_few(n_test, needed, noun="inputs")
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    path = bench.path(risk=risk, members=members)
    if len(path.knobs) == 1 and measured.relative:
        why = "No member stops early on the fit split within 1.2 times the promised risk."
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    facts = facts.booked(ledger, delta, purpose=f"calibrate {measured.name} at {risk:g}")
    found = certify_classifier(bench, path, facts, risk=risk, delta=delta, method=method)
    return replace(found, certificate=from_first(lambda: found.certificate))


def _split(
    stages: AbstractStages,
    units: Examples,
    *,
    training: ClassifierTraining | None,
    rng: int,
    progress: bool,
) -> ClassifierSplit:
    """Train exits if an encoder has none; keep what shaped them out; part the rest."""
    distinct = units.distinct()
    repeated, trained, shaped = len(units) - len(distinct), 0, set[str]()
    if isinstance(stages, EncoderStages):
        exits = stages.exits
        if exits is None:
            if len(distinct) < 12:
                raise InvalidArgumentError(
                    "dataset", f"{len(distinct)} distinct inputs", "more: exits have to be trained"
                )
            shaping, distinct = parted(distinct, TRAIN_SHARE, rng)
            trained = len(shaping)
            given = shaping.inputs if shaping.labels is None else (shaping.inputs, shaping.labels)
            exits = train_classifier_exits(
                stages.model,
                given,
                training=training,
                tokenizer=stages.tokenizer,
                rng=rng,
                progress=progress,
            )
            stages = replace(stages, exits=exits)
        shaped = set(exits.record.units)
    kept = unshaped(distinct, shaped, noun="inputs")
    fit, test = parted(kept, FIT_SHARE, rng + 1)
    return ClassifierSplit(fit, test, trained, len(distinct) - len(kept), repeated, stages)
