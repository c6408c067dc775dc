"""The decode loop: one token at a time through the segments, stopping where the policy says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from adaptive._choose import Chooser
from adaptive._device_stack import DeviceStack
from adaptive._draft_length import DraftLength
from adaptive._exits import Exits
from adaptive._families import Readout
from adaptive._speculation import SpeculationMode
from adaptive._stack import AbstractStack, HostStack
from adaptive._transfer import sent
from adaptive.policies import Features, Policy, State, keyed_noise

_LABEL_CHUNK = 32


@dataclass(frozen=True)
class Job:
    """Everything a run needs that does not change while it runs.

    Parameters
    ----------
    policy : Policy
    exits : Exits
    stack : AbstractStack
        Begun, empty.
    chooser : Chooser
    criteria : StoppingCriteriaList
    prompt : Tensor, int64 [batch, prompt]
    max_length : int
        Prompt included.
    pad : int
        Fills rows that are finished.
    ends : Tensor, int64 [n]
        Tokens that end a row; empty if none does.
    has_eos : bool
        Whether rows can finish on their own.
    open_ended : bool
        Whether anything but ``max_length`` can end the run, which then has to be asked for.
    emit : callable
        Receives each final token, int64 [batch].
    max_pending : int
        Most slots an inbox may hold.
    draft_length : DraftLength, optional
        In ``verify`` mode, says how many drafts are confirmed together; at most ``max_pending``.
    speculation : {"coupled", "rejection"}
        In ``verify`` mode, how sampled drafts are drawn and accepted.
    labels : bool
        Settle at the end and compare every token with the full model's choice.
    label_later : bool
        Keep what :func:`label` needs, in case somebody asks for it after the run.
    keep_scores, keep_logits : bool
        Keep processed scores and raw logits of every token.
    keys : Tensor, int64 [batch]
        Key of each row's unit, for rules that read noise.
    seed : int
        Seed of that noise.
    resumed : Tensor, int64 [batch], optional
        Goes on with texts that were begun: how many tokens at the end of each prompt are the
        run's own. Their keys and values must be the full model's (``exact`` mode).
    interrupt : callable
        Asked before every token: ``None``, or the policy of full depth to go on with from here.
    seen : list of list of Tensor, optional
        Per exit, receives the hidden state ``[batch, width]`` of every token that gets there.
    """

    policy: Policy
    exits: Exits
    stack: AbstractStack
    chooser: Chooser
    criteria: StoppingCriteriaList
    prompt: Tensor
    max_length: int
    pad: int
    ends: Tensor
    has_eos: bool
    open_ended: bool
    emit: Callable[[Tensor], None]
    max_pending: int
    labels: bool
    keep_scores: bool
    keep_logits: bool
    keys: Tensor
    seed: int
    label_later: bool = False
    draft_length: DraftLength | None = None
    speculation: SpeculationMode = "coupled"
    resumed: Tensor | None = None
    interrupt: Callable[[], Policy | None] = lambda: None
    seen: list[list[Tensor]] | None = None


class Record:
    """Tokens of a run and what was decided for each, in fixed buffers."""

    def __init__(self, job: Job) -> None:
        batch, start = job.prompt.shape
        device = job.prompt.device
        room = job.max_length - start
        self.start = start
        self.length = start
        self.ids = torch.full((batch, job.max_length), job.pad, dtype=torch.int64, device=device)
        self.ids[:, :start] = job.prompt
        self.stages = torch.full((batch, room), -1, dtype=torch.int64, device=device)
        self.exit_scores = torch.full((batch, room), float("nan"), device=device)
        self.agreement = torch.full((batch, room), -1, dtype=torch.int8, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        #: Rows whose next token counts. Without an end token nothing replaces what a finished row
        #: goes on to say, here as in ``model.generate``.
        self.active = self.unfinished
        #: The same rows, as the host knows them.
        self.rows = list(range(batch))
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def generated(self) -> int:
        """Number of tokens generated so far, the same for all rows."""
        return self.length - self.start

    def add(self, job: Job, tokens: Tensor, step: Step) -> bool:
        """Append one final token per row; return whether any row goes on."""
        at = self.generated
        if job.has_eos:
            tokens = torch.where(self.unfinished, tokens, job.pad)
        self.ids[:, self.length] = tokens
        self.stages[:, at] = torch.where(self.unfinished, step.stages, -1)
        self.exit_scores[:, at] = torch.where(self.unfinished, step.exit_scores, float("nan"))
        self.length += 1
        if job.keep_scores and step.scores is not None:
            self.scores.append(step.scores)
        if job.keep_logits and step.logits is not None:
            self.logits.append(step.logits.float())
        job.emit(tokens)
        if not job.open_ended:  # the host need not wait for the device
            return self.length < job.max_length
        kept = tuple(self.scores) if job.keep_scores else None
        self.unfinished = self.unfinished & ~job.criteria(self.ids[:, : self.length], kept)
        unfinished = [row for row, goes_on in enumerate(self.unfinished.tolist()) if goes_on]
        if job.has_eos:
            self.active, self.rows = self.unfinished, unfinished
        return self.length < job.max_length and bool(unfinished)


@dataclass(frozen=True)
class Step:
    """Outcome of one token's way through the segments.

    ``deep`` says whether every row that counts went to full depth; ``None`` if the host does not
    know.
    """

    stages: Tensor
    exit_scores: Tensor
    logits: Tensor | None
    scores: Tensor | None = None
    deep: bool | None = None


def decode(job: Job) -> Record:
    """Generate in ``exact`` or ``propagate`` mode: every token is final when it is chosen."""
    record = Record(job)
    kept = job.labels or job.label_later
    stack = job.stack
    on_device = isinstance(stack, DeviceStack)
    job.stack.keep_finals = kept
    again = job.label_later or job.seen is not None or (job.labels and job.policy.mode == "exact")
    if job.resumed is None:
        going = first_token(job, record)
    else:
        job.stack.prefill(job.prompt[:, :-1])
        going = True
    state = job.policy.init(job.prompt.shape[0], device=job.prompt.device)
    while going:
        other = job.interrupt()
        if other is not None and isinstance(stack, DeviceStack):
            stack.close()
        elif other is not None:
            job = replace(job, policy=other)
            state = other.init(job.prompt.shape[0], device=job.prompt.device)
        step, state = walk(job, record, state)
        assert step.logits is not None
        tokens, scores = job.chooser(record.ids[:, : record.length], step.logits, record.generated)
        if job.chooser.noise is not None and again:
            job.chooser.noise.set_aside(record.generated)
        elif job.chooser.noise is not None:
            job.chooser.noise.release(record.generated)
        going = record.add(job, tokens, Step(step.stages, step.exit_scores, step.logits, scores))
        if not on_device and job.stack.pending >= job.max_pending:  # else it sees to that itself
            job.stack.settle()
    if job.labels:
        label(job, record)
    return record


class _Way:
    """Where the newest token of every row has stopped so far, and what it is read from there.

    ``running`` marks the rows that are still on their way, ``rows`` lists them for the host.
    """

    def __init__(self, hidden: Tensor, record: Record, exits: Exits) -> None:
        batch, device = hidden.shape[0], hidden.device
        self.exits = exits
        self.running, self.rows = record.active, record.rows
        self.stages = torch.full((batch,), len(exits.layers), device=device)
        self.scores = torch.full((batch,), float("nan"), device=device)
        self.states = hidden[:, 0]
        #: Rows that stopped at the last exit.
        self.stopped = self.running
        self.logits: Tensor | None = None
        #: Rows that are where they stopped without logits, and are read off their states.
        self.unread: list[int] = []

    def decide(self, features: Features, here: Tensor, stop: Tensor, score: Tensor) -> bool:
        """Take an exit's decision; return whether any row stops there. One read by the host."""
        exit = features.stage
        if here.shape[0] == 1:  # the one row is running, or nobody would have asked
            self.scores = score.float()
            if not bool(stop):
                return False
            self.stages = torch.full_like(self.stages, exit)
            self.states, self.logits = self.exits.translate(exit, here), features.logits
            if features.logits is None:
                self.unread = self.rows
            self.rows = []
            return True
        self.stopped = stop = stop & self.running
        self.scores = torch.where(self.running, score.float(), self.scores)
        flags = stop.tolist()
        going = [row for row in self.rows if not flags[row]]
        if len(going) == len(self.rows):
            return False
        if features.logits is None:
            self.unread += [row for row in self.rows if flags[row]]
        self.rows = going
        self.stages = torch.where(stop, exit, self.stages)
        self.states = torch.where(stop[:, None], self.exits.translate(exit, here), self.states)
        if features.logits is not None:
            known = features.logits if self.logits is None else self.logits
            self.logits = torch.where(stop[:, None], features.logits, known)
        self.running = self.running & ~stop
        return True

    def finish(self, hidden: Tensor) -> None:
        """Read the rows that never stopped off the last layer's output."""
        self.states = torch.where(self.running[:, None], hidden[:, 0], self.states)
        self.unread = self.unread + self.rows

    def read(self, readout: Readout) -> Tensor | None:
        """Logits ``[batch, vocabulary]``, void for rows whose token does not count."""
        if not self.unread:
            return self.logits
        return readout.among(self.states, sorted(self.unread), into=self.logits)


def walk(job: Job, record: Record, state: State) -> tuple[Step, State]:
    """Take the newest token of every row as deep as the policy wants.

    Rows whose token no longer counts never hold the batch up. One flag per row is read at each
    segment boundary; none if the stack's step has fixed shapes.
    """
    if isinstance(job.stack, DeviceStack):
        return _stepped(job, record, job.stack, state)
    slot = record.length - 1
    stack, exits, policy = job.stack, job.exits, job.policy
    assert isinstance(stack, HostStack)
    readout = stack.executor.readout
    hidden = stack.first(record.ids[:, slot], slot, record.rows)
    batch = hidden.shape[0]
    position = torch.full((batch,), record.generated, device=hidden.device)
    if job.resumed is not None:
        position = position + job.resumed
    noise = None
    if "noise" in policy.needs:
        noise = keyed_noise(job.keys, position, seed=job.seed)
    way = _Way(hidden, record, exits)
    previous: Tensor | None = None
    for segment in range(1, stack.segments):
        exit = segment - 1
        if job.seen is not None:
            job.seen[exit].append(hidden[:, 0])
        if exit in policy.stages:
            here = hidden[:, 0]
            features = exits.features(
                policy.needs_at(exit),
                exit,
                here,
                previous=previous,
                position=position,
                readout=readout,
                rows=way.rows,
            )
            if noise is not None or batch > 1:
                running = way.running if batch > 1 else None
                features = replace(features, noise=noise, running=running)
            stop, score, state = policy.update(features, state)
            if way.decide(features, here, stop, score):
                stack.leave(segment, hidden, slot, way.stopped, way.rows)
            if not way.rows:
                break
            previous = here
        hidden = stack.deepen(segment, hidden, slot, way.rows, way.running)
    else:
        way.finish(hidden)
    deep = len(way.rows) == len(record.rows)
    return Step(way.stages, way.scores, way.read(readout), deep=deep), policy.advance(state)


def _stepped(job: Job, record: Record, stack: DeviceStack, state: State) -> tuple[Step, State]:
    """Take the newest token of every row as deep as the policy wants, without looking.

    The stack keeps the policy's state, and writes the outcome to the same place every time.
    """
    stack.step(record.ids, record.active)
    if job.policy.mode == "verify":  # drafts are looked at later, and may be taken back
        deep: bool | None = stack.pending == 0
        if deep and stack.batch > 1:
            deep = None  # one row at least: the others may have been carried along
        own = stack.stages.clone(), stack.scores.clone(), stack.logits.clone()
        return Step(*own, deep=deep), {key: value.clone() for key, value in stack.state.items()}
    kept = job.keep_scores or job.keep_logits
    logits = stack.logits.clone() if kept else stack.logits
    return Step(stack.stages, stack.scores, logits), state


def first_token(job: Job, record: Record) -> bool:
    """Run the prompt at full depth and choose the first token."""
    logits = job.stack.executor.readout(job.stack.prefill(job.prompt))
    tokens, scores = job.chooser(record.ids[:, : record.length], logits, 0)
    full = torch.full_like(tokens, len(job.exits.layers))
    nothing = torch.full(tokens.shape, float("nan"), device=tokens.device)
    going = record.add(job, tokens, Step(full, nothing, logits, scores))
    record.agreement[:, 0] = 1
    return going


def label(job: Job, record: Record) -> None:
    """Settle a run; in ``exact`` mode compare its tokens with the full model's choices.

    Choices are those after the same prefix.
    """
    job.stack.complete(record.ids[:, : record.length])
    job.stack.settle()
    # the prompt's own pass decides the first token, unless the text had been begun before
    decided = 1 if job.resumed is None else 0
    if record.generated <= decided:
        return
    finals = job.stack.take_finals()
    if finals is None:
        return
    full = len(job.exits.layers)
    # what full depth chose is the full model's choice; a second product may round otherwise
    record.agreement[record.stages == full] = 1
    own = record.stages[:, decided : decided + finals.shape[1]]
    early = (own >= 0) & (own < full)
    places = [place for place, some in enumerate(early.any(dim=0).tolist()) if some]
    readout = job.stack.executor.readout
    for start in range(0, len(places), _LABEL_CHUNK):
        part = places[start : start + _LABEL_CHUNK]
        at = sent(part, finals.device)
        slots = [record.start + decided - 1 + place for place in part]
        chosen = job.chooser.each(record.ids, readout(finals[:, at]), slots, record.start)
        same = (chosen == record.ids[:, record.start + decided + at]).to(torch.int8)
        known = record.agreement[:, decided + at]
        record.agreement[:, decided + at] = torch.where(early[:, at], same, known)
