"""``calibrate``: a model, prompts and a promise in; a policy with its certificate out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._bench import Bench
from adaptive._calibrate_classifier import calibrate_classifier
from adaptive._certify import certify
from adaptive._classifier_losses import ClassLoss, ClassLossName
from adaptive._deployment import Deployment
from adaptive._distributed import from_first
from adaptive._encoders import is_classifier
from adaptive._evidence import Facts, count_units, data_fingerprint, test_of, too_few
from adaptive._exits import Exits
from adaptive._families import family_of
from adaptive._inputs import Units, read_units, tokenizer_of
from adaptive._losses import LossName, Reduction, SequenceLoss, unit_loss
from adaptive._runs import require_same_work
from adaptive._settings import check_stages, fingerprints, tokenizer_fingerprints
from adaptive._split import Split, in_batches, split_units
from adaptive._stages import is_staged
from adaptive._tier import Tier
from adaptive._train import ExitTraining
from adaptive._train_classifier import ClassifierTraining
from adaptive._transfer import move
from adaptive.calibration import (
    DeltaLedger,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
    minimum_units,
)
from adaptive.calibration._validation import check_count, check_rng, check_word
from adaptive.policies import Mode, Policy, ProbeScore, Threshold

_log = logging.getLogger(__name__)


def calibrate(
    model: PreTrainedModel | Any,
    dataset: Any,
    risk: float = 0.05,
    delta: float = 0.05,
    *,
    policy: Policy | None = None,
    loss: LossName | SequenceLoss | ClassLossName | ClassLoss = "disagreement",
    reduction: Reduction = "mean",
    bound: float | None = None,
    method: str = "auto",
    mode: Mode | None = None,
    groups: Sequence[Any] | str | None = None,
    pool: str | None = None,
    new_tokens: int = 64,
    batch_size: int = 8,
    members: int = 8,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: ExitTraining | ClassifierTraining | None = None,
    device: torch.device | str | None = None,
    tier: Tier | None = None,
    ledger: DeltaLedger | None = None,
    rng: int = 0,
    progress: bool = True,
    **generation: Any,
) -> Policy:
    r"""Find the cheapest stopping policy whose risk is certified to be at most ``risk``.

    With probability at least ``1 - delta`` over the draw of the test prompts, the returned
    policy's expected loss on prompts drawn like them is at most ``risk``. If nothing can be
    certified, the returned policy is full computation, and its certificate says why and how many
    prompts would do.

    Prompts are split in two. On the *fit* split the model's own full-depth text is traced, and a
    path of policies from full depth to the cheapest is chosen. On the *test* split the members of
    that path generate text for real, one after the other from the safest on, and a fixed-sequence
    test certifies members until the first failure. The last one certified stops earliest and is
    returned, unless an earlier one, or full depth, is clearly faster on this machine.

    Parameters
    ----------
    model
        A causal language model; or a classifier, as :func:`predict` takes it: a Hugging Face
        encoder, anything that yields the logits of its stages, a list of models. If a Hugging Face
        model has no exits, some are trained on a share of the prompts (inputs).
    dataset
        Prompts: a list of strings or chat conversations, a ``datasets.Dataset``, a DataLoader of
        tokenised batches, or an iterable of dicts (see ``column``). Each is one unit. Equal
        prompts count once. For a classifier: inputs, or ``(inputs, labels)``; see the notes.
    risk : float
        The promise, in (0, bound).
    delta : float
        Probability that the draw of the test prompts misleads, in (0, 1).
    policy : Policy, optional
        The family: its rule's knob is what is calibrated, and it is asked at its own ``stages``.
        By default a threshold on the exits' probes, at the exits worth asking at: on the fit split,
        with measured times of layers and checks, :func:`~adaptive.policies.choose_stages` leaves
        out those at which asking costs more than it saves.
    loss : str or callable
        ``"disagreement"``: share of a run's tokens that differ from the full model's choice after
        the same own prefix. ``"departure"``: 1 if the text departs from the full model's at all.
        ``"token_f1"``, ``"rouge_l"``, ``"edit"``: distance of the text from the full model's. Or
        ``loss(early, full, reference)`` on token ids, at most ``bound``; it may be negative where
        early is better. For a classifier: ``"disagreement"`` with the full model;
        ``"excess_error"``, error minus the full model's (needs labels); ``"error"`` (needs labels,
        and full computation is tested too); or ``loss(early, full, labels)`` on logits
        ``[rows, classes]``.
    reduction : {"mean", "any"}
        How token disagreements become a unit's loss: their share, or whether there is any (the
        same as ``"departure"``). Losses between texts are not reduced.
    bound : float, optional
        Largest value of a callable loss.
    method : str
        The test, as in :func:`adaptive.calibration.control_risk`; ``"auto"`` is the exact
        binomial for 0/1 losses and a betting test otherwise.
    mode : {"exact", "propagate"}, optional
        What happens to skipped layers. ``None`` takes ``"exact"``, and if that is measured to be
        slower than full depth on this machine, says so and returns full depth.
    groups : sequence or str, optional
        Cluster of each prompt (document, user), or the key it is found under. The split keeps
        clusters together, and the cluster is the unit of the test.
    pool : str, optional
        Say that prompts were drawn at random from this named pool. Then the prompt is the unit
        whatever the clusters, the promise is about draws from that pool, and the certificate says
        so.
    new_tokens : int
        Most tokens generated per prompt, at least 2. The certificate covers texts up to this
        length.
    batch_size : int
        Prompts decoded together; part of the promise where they decide together (see the notes).
    members : int
        Number of policies placed on the path, at least 1.
    column : str, optional
        Key or column of the prompt in dicts.
    tokenizer : PreTrainedTokenizerBase, optional
        For prompts that are text; by default the one saved beside the model.
    training : ExitTraining, optional
        Settings for exits, if they have to be trained.
    device : torch.device or str, optional
        Moves the model there first.
    tier : {"native", "generic"}, optional
        Force how layers are run.
    ledger : DeltaLedger, optional
        The deployment's account of error probability: ``delta`` is spent on it before the first
        test loss is read, whatever comes out.
    rng : int
        Seed of the split, the order of units, and sampling.
    progress : bool
        Show progress bars.
    **generation
        How text will be decoded, as for ``model.generate`` (``do_sample=True, top_p=0.9``, ...).
        Greedy if nothing is said.

    Returns
    -------
    Policy
        With ``certificate``. Pass it to :func:`generate`.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind; the message names it.
    UnsupportedError
        If the model's family, the mode or a logits processor is not supported.

    Notes
    -----
    Guarantee: learn-then-test along a path that is fixed before the test prompts are read [1]_.
    Prompts that shaped the exits, and prompts equal to them, never enter the test. Losses are
    those of real generations in the deployed dtype and mode. Assumed: test prompts are
    independent draws (of the pool, if one is named) and later traffic is like them. Cost: one
    full-depth generation and one pass over the fit split, one generation of the test split per
    member visited.

    A rule whose rows decide together (``scope`` "batch") is tested on whole batches: the test
    prompts, in random order, are cut into batches of ``batch_size``, the batch is the unit, and the
    certificate covers batches of that size, put together at random.

    Classifiers: datasets are tensors, arrays or lists of inputs, ``(inputs, labels)``,
    DataLoaders, ``datasets.Dataset`` with a label column, or texts for a Hugging Face encoder.
    The promise is about inputs; ``mode``, ``reduction``, ``new_tokens``, ``tier`` and settings of
    generation do not apply. Members of the path are run for real on the test split, in batches of
    ``batch_size`` (a cascade of estimators, which answer row by row, in larger ones), and their
    time is measured in batches of ``batch_size``.

    References
    ----------
    .. [1] Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test: calibrating predictive
       algorithms to achieve risk control", Annals of Applied Statistics 19(2), 2025.
       doi:10.1214/24-AOAS1998
    """
    if policy is not None and not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    if ledger is not None and not isinstance(ledger, DeltaLedger):
        raise InvalidTypeError("ledger", ledger, "a DeltaLedger")
    if pool is not None:
        pool = check_word("pool", pool)
    batch_size, members = check_count("batch_size", batch_size), check_count("members", members)
    rng = check_rng(rng)
    if is_classifier(model) or is_staged(model):
        _refuse_settings_of_generation(mode, tier, reduction, generation)
        return calibrate_classifier(
            model,
            dataset,
            risk,
            delta,
            policy=policy,
            loss=loss,  # type: ignore[arg-type]  # its names are checked there
            bound=bound,
            method=method,
            groups=groups,
            pool=pool,
            batch_size=batch_size,
            members=members,
            column=column,
            tokenizer=tokenizer,
            training=training,
            device=device,
            ledger=ledger,
            rng=rng,
            progress=progress,
        )
    family_of(model)
    if training is not None and not isinstance(training, ExitTraining):
        raise InvalidTypeError("training", training, "an ExitTraining")
    _check_mode(mode, policy)
    measured = unit_loss(loss, bound=bound, reduction=reduction)  # type: ignore[arg-type]
    needed = minimum_units(risk, delta, **test_of(measured, method))
    deployment = Deployment.of(generation, new_tokens=new_tokens, batch_size=batch_size, seed=rng)
    if device is not None:
        move(model, device)
    units = read_units(dataset, model=model, tokenizer=tokenizer, column=column, groups=groups)
    settings = deployment.settings(model)
    require_same_work(model, units)
    split = split_units(model, units, training=training, rng=rng, progress=progress)
    family = _family(policy, mode, split.exits)
    clustered = groups is not None and pool is None
    split, unit, prompts_of_unit = _split_by_unit(
        split, family, clustered=clustered, batch_size=batch_size
    )
    n_test = count_units(split.test)
    said = "this promise (risk %g, delta %g) needs at least %d units; the test split has %d"
    _log.info(said, risk, delta, needed, n_test)
    bench = Bench(model, split.exits, deployment, split, family, measured, tier, progress)
    facts = _facts(bench, units, settings, unit=unit, pool=pool, tokenizer=tokenizer)
    if n_test < needed:
        why = too_few(n_test, needed, noun="prompts", per_unit=prompts_of_unit)
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    trace = bench.trace()
    if policy is None and trace is not None:
        bench, trace = bench.scheduled(trace, risk=risk)
    path = bench.path(trace, risk=risk, members=members)
    if len(path.knobs) == 1:
        why = "No member stops early on the fit split within 1.2 times the promised risk."
        return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=why)
    if mode is None and policy is None:
        slower = bench.no_gain(path, risk)
        if slower is not None:
            _log.warning("%s", slower)
            return bench.nothing(facts, risk=risk, delta=delta, n=n_test, why=slower)
    facts = facts.booked(ledger, delta, purpose=f"calibrate {measured.name} at {risk:g}")
    found = certify(bench, path, facts, risk=risk, delta=delta, method=method)
    return replace(found, certificate=from_first(lambda: found.certificate))


def _refuse_settings_of_generation(
    mode: Mode | None, tier: Tier | None, reduction: Reduction, generation: dict[str, Any]
) -> None:
    """Refuse what means nothing for a classifier, rather than ignore it."""
    if mode is not None or tier is not None or reduction != "mean" or generation:
        foreign = f"mode={mode!r}, tier={tier!r}, reduction={reduction!r}, {sorted(generation)}"
        raise InvalidArgumentError("settings of generation", foreign, "left out for a classifier")


def _check_mode(mode: Mode | None, policy: Policy | None) -> None:
    """Refuse the mode that has no risk, and words that are no mode."""
    if mode == "verify" or (mode is None and policy is not None and policy.mode == "verify"):
        raise UnsupportedError(
            "`verify` mode has no risk to calibrate: its text is the full model's under any "
            "policy. Pass the policy to `generate` as it is"
        )
    if mode not in (None, "exact", "propagate"):
        raise InvalidArgumentError("mode", mode, "'exact', 'propagate' or None")


def _family(policy: Policy | None, mode: Mode | None, exits: Exits) -> Policy:
    """Return the given family, or a threshold on every probe, in the mode and for these exits."""
    family = policy
    if family is None:
        family = Policy(ProbeScore(), Threshold(), stages=tuple(range(len(exits.layers))))
    family = replace(family, mode=mode or family.mode, certificate=None)
    check_stages(family, exits)
    return family


def _split_by_unit(
    split: Split, family: Policy, *, clustered: bool, batch_size: int
) -> tuple[Split, str, int]:
    """Group the test prompts by the unit of the test; name it, and count its prompts.

    Raises
    ------
    UnsupportedError
        If rows decide together and come in clusters: no unit is independent then.
    """
    if family.scope == "row":
        if clustered:
            return split, "cluster", 1
        return replace(split, test=replace(split.test, groups=None)), "prompt", 1
    if clustered:
        raise UnsupportedError(
            "rows of this rule decide together, so a batch of prompts is the unit of the test, "
            "and batches of prompts from several clusters are not independent. Use a rule that "
            "decides per row, or name the `pool` that prompts were drawn from"
        )
    batched = replace(split, test=in_batches(split.test, batch_size))
    return batched, f"batch of {batch_size} prompts drawn at random", batch_size


def _facts(
    bench: Bench,
    units: Units,
    settings: dict[str, Any],
    *,
    unit: str,
    pool: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Facts:
    """Say what the promise is about: model, exits, data, decoding, split and unit."""
    together = bench.family.scope == "batch"
    size = {"batch_size": bench.deployment.batch_size} if together else {}
    return Facts(
        fingerprints=fingerprints(bench.model, bench.exits)
        | {"data": data_fingerprint(units)}
        | _tokenizer_fingerprints(tokenizer, bench.model),
        decoding={"mode": bench.family.mode} | settings | size,
        split=bench.split.record(bench.deployment.seed),
        pool=pool,
        unit=unit,
    )


def _tokenizer_fingerprints(
    tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> dict[str, str]:
    """Hashes of the tokenizer and its chat template, if one was given or is saved with a model."""
    if tokenizer is None:
        try:
            tokenizer = tokenizer_of(model)
        except InvalidArgumentError:
            return {}
    return tokenizer_fingerprints(tokenizer)
