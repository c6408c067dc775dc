"""``calibrate``: a model, prompts and a promise in; a policy with its certificate out."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._calibrate_classifier import calibrate_classifier
from adaptive._classifier_losses import ClassLoss, ClassLossName
from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._distributed import from_first
from adaptive._encoders import is_classifier
from adaptive._evidence import Facts, booked, total_units
from adaptive._exits import Exits
from adaptive._families import family_of, layers_of
from adaptive._fastest import Fastest, fastest
from adaptive._inputs import Units, read_units, tokenizer_of
from adaptive._losses import LossName, Reduction, SequenceLoss, UnitLoss, unit_loss
from adaptive._monitor_reference import Reference
from adaptive._path import Path, choose_path
from adaptive._run import Run
from adaptive._runs import full_depth, require_same_work, run_units
from adaptive._schedule_costs import schedule_costs
from adaptive._settings import check_stages, fingerprints, tokenizer_fingerprints
from adaptive._split import Split, in_batches, split_units
from adaptive._stages import is_staged
from adaptive._tier import Tier
from adaptive._timing import seconds_per_token
from adaptive._train import ExitTraining
from adaptive._train_classifier import ClassifierTraining
from adaptive.calibration import (
    Certificate,
    DeltaLedger,
    InvalidArgumentError,
    InvalidTypeError,
    Trace,
    UnsupportedError,
    control_risk,
    minimum_units,
)
from adaptive.calibration._validation import check_count, check_rng, check_word
from adaptive.policies import (
    Mode,
    Policy,
    ProbeScore,
    Threshold,
    asked_at,
    choose_stages,
    expected_cost,
)

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
        if mode is not None or tier is not None or reduction != "mean" or generation:
            foreign = f"mode={mode!r}, tier={tier!r}, reduction={reduction!r}, {sorted(generation)}"
            raise InvalidArgumentError(
                "settings of generation", foreign, "left out for a classifier"
            )
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
    if mode == "verify" or (mode is None and policy is not None and policy.mode == "verify"):
        raise UnsupportedError(
            "`verify` mode has no risk to calibrate: its text is the full model's under any "
            "policy. Pass the policy to "
            "`generate` as it is"
        )
    if mode not in (None, "exact", "propagate"):
        raise InvalidArgumentError("mode", mode, "'exact', 'propagate' or None")
    measured = unit_loss(loss, bound=bound, reduction=reduction)  # type: ignore[arg-type]
    needed = minimum_units(risk, delta, **_test_of(measured, method))
    given = getattr(generation.get("generation_config"), "do_sample", None)
    generation.setdefault("do_sample", bool(given))
    deployment = Deployment(
        new_tokens=new_tokens, batch_size=batch_size, generation=generation, seed=rng
    )
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidArgumentError("device", device, f"a usable device ({reason})") from error
    units = read_units(dataset, model=model, tokenizer=tokenizer, column=column, groups=groups)
    settings = deployment.settings(model)
    require_same_work(model, units)
    split = split_units(model, units, training=training, rng=rng, progress=progress)
    exits = split.exits
    family = (
        Policy(ProbeScore(), Threshold(), stages=tuple(range(len(exits.layers))))
        if policy is None
        else policy
    )
    family = replace(family, mode=mode or family.mode, certificate=None)
    check_stages(family, exits)
    clustered = groups is not None and pool is None
    unit, prompts_of_unit = "cluster" if clustered else "prompt", 1
    decoding = {"mode": family.mode} | settings
    if family.scope == "batch":
        if clustered:
            raise UnsupportedError(
                "rows of this rule decide together, so a batch of prompts is the unit of the test, "
                "and batches of prompts from several clusters are not independent. Use a rule that "
                "decides per row, or name the `pool` that prompts were drawn from"
            )
        split = replace(split, test=in_batches(split.test, batch_size))
        clustered, unit = True, f"batch of {batch_size} prompts drawn at random"
        prompts_of_unit = batch_size
        decoding["batch_size"] = batch_size
    n_test = len(split.test) if not clustered else len(np.unique(split.test.groups))  # type: ignore[arg-type]
    _log.info(
        "this promise (risk %g, delta %g) needs at least %d units; the test split has %d",
        risk,
        delta,
        needed,
        n_test,
    )
    bench = _Bench(model, exits, deployment, split, family, measured, tier, progress)
    facts = Facts(
        fingerprints=fingerprints(model, exits)
        | _data_fingerprints(units, tokenizer, model, dataset),
        decoding=decoding,
        split=split.record(rng),
        pool=pool,
        unit=unit,
    )
    if n_test < needed:
        why = (
            f"Too few units: the test split has {n_test}, and this promise needs at least "
            f"{needed} in the test even if "
            f"every loss is zero (about {total_units(needed) * prompts_of_unit} prompts in all)."
        )
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
    if ledger is not None:
        data = facts.fingerprints["data"]
        purpose = f"calibrate {measured.name} at {risk:g}"
        account = from_first(lambda: booked(ledger, delta, purpose=purpose, data=data))
        facts = replace(facts, split=facts.split | {"ledger": account})
    found = bench.certify(
        path, facts, risk=risk, delta=delta, method=method, clustered=clustered, rng=rng
    )
    return replace(found, certificate=from_first(lambda: found.certificate))


@dataclass(frozen=True)
class _Bench:
    """Everything a calibration runs on."""

    model: PreTrainedModel
    exits: Exits
    deployment: Deployment
    split: Split
    family: Policy
    loss: UnitLoss
    tier: Tier | None
    progress: bool
    schedule: dict[str, Any] | None = None

    def run(
        self, units: Units, policy: Policy, description: str, *, labels: bool = True
    ) -> tuple[Run, ...]:
        """Generate units under a policy; units that decide together in the order given."""
        run = functools.partial(
            run_units,
            self.model,
            policy=policy,
            deployment=self.deployment,
            labels=labels,
            tier=self.tier,
            description=description,
        )
        if policy.scope == "row":
            return run(units, progress=self.progress)
        size = self.deployment.batch_size
        batches = (range(start, start + size) for start in range(0, len(units), size))
        return tuple(done for rows in batches for done in run(units.select(rows), progress=False))

    def trace(self) -> Trace | None:
        """Trace the model's own text on the fit split; none if every text ends with one token."""
        full = replace(full_depth(self.exits), mode="propagate")
        runs = self.run(self.split.fit, full, "full-depth text", labels=False)
        if all(len(run.tokens) < 2 for run in runs):
            return None
        return collect(
            self.model,
            self.split.fit,
            [run.tokens for run in runs],
            deployment=self.deployment,
            score=self.family.score,
            stages=self.family.stages,
            progress=self.progress,
            tier=self.tier,
        )

    def scheduled(self, trace: Trace, *, risk: float) -> tuple[_Bench, Trace]:
        """Leave out the exits that are not worth asking at, on the fit split's trace."""
        costs = from_first(
            lambda: schedule_costs(self.model, self.exits, self.family, tier=self.tier)
        )
        timed = replace(trace, costs=costs.stages)
        settings: dict[str, Any] = {
            "risk": risk,
            "checks": costs.checks,
            "reduction": "any" if self.any_token else "mean",
            "seed": self.deployment.seed,
        }
        chosen = choose_stages(self.family, timed, **settings)
        schedule = {
            "stages": list(chosen.stages),
            "microseconds_per_check": [round(1e6 * float(check), 2) for check in costs.checks],
            "milliseconds_per_token": {
                name: round(1e3 * expected_cost(policy, timed, **settings), 4)
                for name, policy in (("chosen", chosen), ("everywhere", self.family))
            },
        }
        _log.info("the policy asks at exits %s of %s", chosen.stages, self.family.stages)
        bench = replace(self, family=chosen, schedule=schedule)
        return bench, asked_at(trace, chosen.stages)

    @property
    def any_token(self) -> bool:
        """Whether a unit's loss is predicted by any disagreement, not by the share of tokens."""
        return self.loss.binary or self.loss.sequence is not None

    def path(self, trace: Trace | None, *, risk: float, members: int) -> Path:
        """Place the members; full depth alone where there is nothing to stop."""
        if trace is None:
            return Path((float("inf"),), np.zeros(1))
        return choose_path(
            self.family,
            trace,
            risk=risk,
            members=members,
            any_token=self.any_token,
            seed=self.deployment.seed,
            batch_size=self.deployment.batch_size,
        )

    def fastest(self, policies: Sequence[Policy]) -> Fastest:
        """Choose by seconds per token, one prompt at a time, or as many as decide together.

        Policies are given from full depth to the one expected to be fastest.
        """
        rows = self.deployment.batch_size if self.family.scope == "batch" else 1
        few = self.split.fit.select(range(min(max(4, rows), len(self.split.fit))))
        round_of = functools.partial(
            seconds_per_token,
            self.model,
            few,
            policies,
            deployment=self.deployment,
            rows=rows,
            tier=self.tier,
        )
        return from_first(lambda: fastest(round_of, preferred=len(policies) - 1))

    def no_gain(self, path: Path, risk: float) -> str | None:
        """Say so if the member nearest to the promise is measured to be slower than full depth."""
        within = np.flatnonzero(path.predicted <= risk)
        nearest = self.family.member(path.knobs[max(1, int(within.max()))])
        choice = self.fastest([full_depth(self.exits), nearest])
        if choice.index == 1:
            return None
        full, early = choice.seconds
        return (
            f"In `{self.family.mode}` mode stopping early gains nothing on this machine "
            f"({1e3 * early:.3g} ms per token "
            f"against {1e3 * full:.3g} at full depth): skipped layers are computed later, in "
            "batches, which pays where "
            f"decoding is bound by memory. Pass mode='propagate' to skip them for good."
        )

    def certify(
        self,
        path: Path,
        facts: Facts,
        *,
        risk: float,
        delta: float,
        method: str,
        clustered: bool,
        rng: int,
    ) -> Policy:
        """Walk the path on the test split and return the certified member that pays most."""
        test = self.split.test
        full = None
        if self.loss.sequence is not None:
            policy = replace(full_depth(self.exits), mode="propagate")
            full = [run.tokens for run in self.run(test, policy, "full-depth text", labels=False)]

        layers = len(layers_of(self.model))
        depths = {"0": float(layers)}
        counts: dict[str, list[int]] = {}
        visited: dict[int, NDArray[np.float64]] = {}
        walked_runs: dict[int, tuple[Run, ...]] = {}

        @functools.cache  # the upper bound reads the last certified member a second time
        def losses(column: int) -> NDArray[np.float64]:
            member = self.family.member(path.knobs[column])
            runs = self.run(test, member, f"testing member {column} of {len(path.knobs) - 1}")
            depths[str(column)] = mean_run_depth(runs, self.exits.layers, layers)
            counts[str(column)] = exit_counts(runs, len(self.exits.layers))
            visited[column] = self.loss.of(runs, full, test.references)
            walked_runs[column] = runs
            return visited[column]

        result = control_risk(
            losses,
            risk=risk,
            delta=delta,
            bound=self.loss.bound,
            loss_type="binary" if self.loss.binary else "bounded",
            method=method,
            n_columns=len(path.knobs),
            groups=test.groups if clustered else None,
            rng=rng,
            loss=self.loss.name,
            unit="prompt",
        )
        certificate = facts.completed(replace(result.certificate, unit=facts.unit))
        walked = {
            "mean_depth": depths,
            "exit_layers": [*self.exits.layers, layers],
            "exit_counts": counts,
            "knobs": [str(knob) for knob in path.knobs],
            "predicted": [float(value) for value in path.predicted],
        }
        if self.schedule is not None:
            walked["check_schedule"] = self.schedule
        certificate = replace(certificate, evidence=certificate.evidence | walked)
        if result.index is None:
            return replace(self.family.member(path.knobs[0]), certificate=certificate)
        columns = [j for j in np.flatnonzero(result.certified) if j > 0]
        choice = self.fastest(
            [full_depth(self.exits)] + [self.family.member(path.knobs[j]) for j in columns]
        )
        best, costs = choice.index, choice.seconds
        timing = {
            "milliseconds_per_token": {
                str(j): round(1e3 * float(cost), 4)
                for j, cost in zip([0, *columns], costs, strict=True)
            }
        }
        certificate = replace(
            certificate, evidence=certificate.evidence | timing, cost=float(costs[best])
        )
        if best == 0:
            note = (
                f"Members {[int(j) for j in columns]} are certified, but none is faster than "
                "full depth on this machine in "
                f"`{self.family.mode}` mode, so full computation is used."
            )
            certificate = replace(
                certificate, holds=False, index=None, notes=(*certificate.notes, note)
            )
            return replace(self.family.member(path.knobs[0]), certificate=certificate)
        index = int(columns[best - 1])
        knob = float(path.knobs[index])
        if index != result.index:
            groups = test.groups if clustered else None
            upper = self.upper_bound(
                visited[index], groups, certificate, delta=delta, method=method
            )
            certificate = replace(
                certificate, evidence=certificate.evidence | {"upper_bound": upper}
            )
        reference = Reference.of(
            walked_runs[index],
            visited[index],
            exits=self.exits.layers,
            layers=layers,
            bound=self.loss.bound,
            members=len(path.knobs) - 1,
            clusters=test.groups if clustered else None,
        )
        evidence = certificate.evidence | reference.to_evidence()
        certificate = replace(certificate, index=index, knob=knob, evidence=evidence)
        return replace(self.family.member(knob), certificate=certificate)

    def upper_bound(
        self,
        losses: NDArray[np.float64],
        groups: NDArray[Any] | None,
        certificate: Certificate,
        *,
        delta: float,
        method: str,
    ) -> dict[str, float]:
        """Bound of the chosen member's risk, as the certificate gives it for the last certified."""
        again = control_risk(
            np.stack([np.zeros_like(losses), losses], axis=1),
            risk=float(certificate.risk),  # type: ignore[arg-type]
            delta=delta,
            bound=self.loss.bound,
            loss_type="binary" if self.loss.binary else "bounded",
            method=method,
            groups=groups,
            rng=int(certificate.split["seed"]),
            loss=self.loss.name,
        )
        found: dict[str, float] = again.certificate.evidence["upper_bound"]
        return found

    def nothing(self, facts: Facts, *, risk: float, delta: float, n: int, why: str) -> Policy:
        """Return full computation and a certificate that says why."""
        certificate = Certificate(
            holds=False,
            risk=risk,
            delta=delta,
            loss=self.loss.name,
            unit=facts.unit,
            method="none run",
            procedure="fixed-sequence",
            n=n,
            index=None,
            evidence={},
            bound=self.loss.bound,
            assumptions=(),
            split={},
            notes=(why,),
        )
        never = self.family.member(float("inf"))
        return replace(never, certificate=facts.completed(certificate))


def mean_run_depth(runs: Sequence[Run], exits: tuple[int, ...], layers: int) -> float:
    """Mean number of layers behind a token, the first of each text not counted."""
    depth = np.array([*exits, layers], dtype=np.float64)
    later = np.concatenate([run.stages[1:] for run in runs])
    return float(depth[later].mean()) if later.size else float(layers)


def exit_counts(runs: Sequence[Run], exits: int) -> list[int]:
    """Tokens per exit, full depth last, the first of each text not counted."""
    later = np.concatenate([run.stages[1:] for run in runs])
    return [int(count) for count in np.bincount(later, minlength=exits + 1)]


def _test_of(loss: UnitLoss, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "loss_type": "binary" if loss.binary else "bounded",
        "bound": loss.bound,
    }


def _data_fingerprints(
    units: Units, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, dataset: Any
) -> dict[str, str]:
    """Hash of the prompts, and of the tokenizer and chat template if one could be found."""
    found = {"data": hashlib.sha256("".join(sorted(units.ids)).encode()).hexdigest()[:24]}
    if tokenizer is None:
        try:
            tokenizer = tokenizer_of(model)
        except InvalidArgumentError:
            return found
    return found | tokenizer_fingerprints(tokenizer)
