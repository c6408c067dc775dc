"""From a finished generation to what a monitor sees of its units: labels, audits, shadows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._decode import Job, Record, label
from adaptive._exits import Exits
from adaptive._families import Readout
from adaptive._full_depth import agreement_along, choices_along
from adaptive._losses import TOKEN_LOSSES, UnitLoss
from adaptive._monitor import Monitor
from adaptive._monitor_outcome import Outcome, Ticket
from adaptive._monitor_records import Watched
from adaptive._monitor_reference import unit_summary
from adaptive._run import Run
from adaptive._tier import Tier
from adaptive.calibration import Certificate, InvalidArgumentError, UnsupportedError
from adaptive.policies import Policy, Saturation, Threshold, keyed_noise


@dataclass(frozen=True)
class Watch:
    """A monitor's part in one call of ``generate``.

    Parameters
    ----------
    monitor : Monitor
    ticket : Ticket
    policy : Policy
        What runs: the planned member, or full computation.
    shadow : Policy, optional
        In fallback, the policy whose early answers are compared with the full model's text.
    audits : bool
        Whether some row may need a label.
    loss : UnitLoss
        What the certificate promises, read off tokens.
    full : Policy
        Goes on where the policy is withdrawn in the middle of a unit.
    """

    monitor: Monitor
    ticket: Ticket
    policy: Policy
    shadow: Policy | None
    audits: bool
    loss: UnitLoss
    full: Policy

    def interrupt(self) -> Policy | None:
        """Return full computation, once, if the policy was withdrawn meanwhile."""
        if self.ticket.withdrawn or not self.monitor.withdrawn(self.ticket):
            return None
        return self.full


def begin_watch(monitor: Monitor, policy: Policy, exits: Exits, *, rows: int) -> Watch:
    """Ask a monitor what a batch of new units runs under.

    Raises
    ------
    InvalidArgumentError
        If the monitor is another policy's.
    UnsupportedError
        If the certified loss cannot be read off a run and the full model's choices along it.
    """
    if not isinstance(monitor, Monitor):
        raise InvalidArgumentError("monitor", monitor, "a Monitor (see `Monitor.for_policy`)")
    assert monitor.policy.certificate is not None
    loss = _token_loss(monitor.policy.certificate)
    ticket = monitor.begin(rows, policy=policy)
    full = Policy(Saturation(), Threshold(), stages=(len(exits.layers) - 1,), mode=policy.mode)
    fallen = ticket.plan.status == "fallback"
    return Watch(
        monitor=monitor,
        ticket=ticket,
        policy=full if ticket.policy is None else replace(ticket.policy, certificate=None),
        shadow=monitor.policy if fallen else None,
        audits=not fallen and monitor.may_audit(ticket),
        loss=loss,
        full=full,
    )


def finish_watch(
    watch: Watch,
    model: PreTrainedModel,
    job: Job,
    record: Record,
    *,
    padding: Tensor | None,
    covered: bool,
    tier: Tier | None,
) -> tuple[Watched, ...]:
    """Label the units of a finished generation as planned, and put them to the monitor."""
    layers = job.stack.executor.layers
    runs = _runs(record)
    seen = [unit_summary(run, exits=job.exits.layers, layers=layers) for run in runs]
    if watch.shadow is not None:
        losses = watch.loss.of(_shadows(watch.shadow, job, record, runs), None, (None,) * len(runs))
        known: list[float | None] = losses.tolist()
        seen = [(None, depth) for _, depth in seen]
        full = record.stages >= 0
        record.agreement = torch.where(full, 1, -1).to(torch.int8)
    else:
        scores = [score for score, _ in seen]
        coins = [coin for _, coin in watch.monitor.audits(watch.ticket, scores)]
        if any(coins) and job.policy.mode == "propagate":
            runs = _audited(model, job, record, runs, coins, padding=padding, tier=tier)
        elif any(coins) and not job.labels:
            label(job, record)
            runs = _runs(record)
        known = [
            float(watch.loss.of([run], None, (None,))[0])
            if coin and (run.agreement >= 0).all()
            else None
            for run, coin in zip(runs, coins, strict=True)
        ]
    outcomes = [
        Outcome(loss, score, depth, len(run.tokens))
        for loss, (score, depth), run in zip(known, seen, runs, strict=True)
    ]
    return watch.monitor.finish(watch.ticket, outcomes, covered=covered)


def _token_loss(certificate: Certificate) -> UnitLoss:
    for loss in TOKEN_LOSSES:
        if loss.name == certificate.loss:
            return loss
    names = " or ".join(repr(loss.name) for loss in TOKEN_LOSSES)
    raise UnsupportedError(
        f"the certified loss is {certificate.loss!r}, which `generate` cannot observe: it can for "
        f"{names}. Put the units to the monitor yourself (`begin`, `audits`, `finish`)"
    )


def _runs(record: Record) -> list[Run]:
    """Rows of a finished record, each at its own length; one copy to the host."""
    n = record.generated
    stages = record.stages[:, :n].cpu().numpy()
    scores = record.exit_scores[:, :n].float().cpu().numpy()
    agreement = record.agreement[:, :n].cpu().numpy()
    texts = record.ids[:, record.start : record.length].tolist()
    lengths = (stages >= 0).sum(axis=1).tolist()
    return [
        Run(tuple(text[:k]), stages[row, :k], agreement[row, :k], scores[row, :k])
        for row, (text, k) in enumerate(zip(texts, lengths, strict=True))
    ]


def _audited(
    model: PreTrainedModel,
    job: Job,
    record: Record,
    runs: list[Run],
    coins: list[bool],
    *,
    padding: Tensor | None,
    tier: Tier | None,
) -> list[Run]:
    """Label the audited rows: one full-depth pass over their text."""
    ids, start = record.ids[:, : record.length], record.start
    mask = torch.ones_like(job.prompt) if padding is None else (~padding).to(torch.int64)
    rows = torch.tensor([row for row, coin in enumerate(coins) if coin], device=ids.device)
    # noise and processors are those of the whole batch: rows go through it together if it matters
    plain = not job.chooser.processors and job.chooser.noise is None
    chosen = rows if plain else torch.arange(ids.shape[0], device=ids.device)
    found = agreement_along(
        model,
        ids[chosen],
        mask[chosen],
        stages=record.stages[chosen, : record.length - start],
        chooser=job.chooser,
        tier=tier,
    )
    kept = found if plain else found[rows]
    record.agreement[rows, : record.generated] = kept
    labels = kept.cpu().numpy()
    done = list(runs)
    for known, row in zip(labels, rows.tolist(), strict=True):
        done[row] = replace(runs[row], agreement=known[: len(runs[row].tokens)])
    return done


def _shadows(policy: Policy, job: Job, record: Record, runs: list[Run]) -> list[Run]:
    """Compare the full model's text with what the policy would have said along it.

    The states at the exits are a by-product of the full pass; only the exits' readouts are new.
    """
    assert job.seen is not None
    if record.generated < 2:
        return runs
    states = [torch.stack(column, dim=1) for column in job.seen]
    count = states[0].shape[1]
    active = record.stages[:, 1 : 1 + count] >= 0
    stages = _shadow_stages(policy, job, states, active)
    readout = job.stack.executor.readout
    answers = record.ids[:, record.start + 1 : record.start + 1 + count].clone()
    for exit in policy.stages:
        here = stages == exit
        if bool(here.any()):
            early = job.exits.translate(exit, states[exit])
            said = choices_along(early, readout, record.ids, record.start, job.chooser)
            answers = torch.where(here, said, answers)
    same = answers == record.ids[:, record.start + 1 : record.start + 1 + count]
    agreement: NDArray[np.int8] = same.to(torch.int8).cpu().numpy()
    one = np.ones(1, dtype=np.int8)
    return [
        replace(run, agreement=np.concatenate([one, agreement[row]])[: len(run.tokens)])
        for row, run in enumerate(runs)
    ]


def _shadow_stages(policy: Policy, job: Job, states: list[Tensor], active: Tensor) -> Tensor:
    """Exit at which the policy would have stopped each token, int64 ``[batch, n]``."""
    batch, count = active.shape
    device = active.device
    readout: Readout = job.stack.executor.readout
    stages = torch.full((batch, count), len(job.exits.layers), device=device)
    state = policy.init(batch, device=device)
    for token in range(count):
        position = torch.full((batch,), token + 1, device=device)
        noise = None
        if "noise" in policy.needs:
            noise = keyed_noise(job.keys, position, seed=job.seed)
        running = active[:, token]
        previous: Tensor | None = None
        for exit in policy.stages:
            here = states[exit][:, token]
            features = job.exits.features(
                policy.needs, exit, here, previous=previous, position=position, readout=readout
            )
            stop, _, state = policy.update(replace(features, noise=noise, running=running), state)
            stop = stop & running
            stages[:, token] = torch.where(stop, exit, stages[:, token])
            running = running & ~stop
            previous = here
        state = policy.advance(state)
    return stages
