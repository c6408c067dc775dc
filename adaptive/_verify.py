"""Self-speculation: tokens that stopped early are drafts until the full depth confirms them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adaptive._decode import Job, Record, Step, first_token, walk
from adaptive._device_stack import ExactDeviceStack
from adaptive._speculation import AbstractSpeculation, Draft, speculation_for
from adaptive._stack import ExactStack
from adaptive.policies import State


class _Drafts:
    """Unconfirmed tokens: what was decided for each, and the policy's state before it."""

    def __init__(self) -> None:
        self.drawn: list[Draft] = []
        self.steps: list[Step] = []
        self.states: list[State] = []
        #: After confirmation: steps that gave a token, and whether the last of them was replaced.
        self.kept = 0
        self.wrong = False

    def add(self, draft: Draft, step: Step, before: State) -> None:
        self.drawn.append(draft)
        self.steps.append(step)
        self.states.append(before)


def decode_verified(job: Job) -> Record:
    """Generate in ``verify`` mode: the tokens are the full model's, or drawn as it would draw.

    Drafts are written behind the confirmed text and read by nobody but the layers. They are
    confirmed when a token needs the full depth anyway, when there are as many as ``max_pending``
    or measured costs and acceptance make worth while, when a draft would end a row, or when the
    text has its full length. Rows accept together: the first wrong draft of any row cuts all
    rows back to it, which costs work and never changes tokens: what becomes final at a place is a
    function of the row's text before it and of the noise of this place, which is kept for another
    draft there.
    """
    record = Record(job)
    job.stack.keep_finals = True
    going = first_token(job, record)
    state = job.policy.init(job.prompt.shape[0], device=job.prompt.device)
    speculation = speculation_for(job.speculation, job.chooser)
    drafts, most = _Drafts(), _most(job)
    while going:
        before = state
        step, state = walk(job, record, state)
        assert step.logits is not None
        prefix = record.ids[:, : record.length]
        draft = speculation.draft(prefix, step.logits, record.generated)
        drafts.add(draft, replace(step, logits=None), before)  # what counts is read when confirmed
        record.ids[:, record.length] = draft.tokens
        record.length += 1
        deep = job.stack.pending == 0
        if deep or len(drafts.steps) >= most or _must_confirm(job, record, draft.tokens):
            known = step.logits if _all_deep(job, step) else None
            going, state = _confirm(job, record, speculation, drafts, state, known)
            if job.draft_length is not None:
                _learn(job, drafts, deep=deep)
            if drafts.wrong and isinstance(job.stack, ExactDeviceStack):
                job.stack.recall(state)
            drafts, most = _Drafts(), _most(job)
    _cut(job, record)
    if job.chooser.noise is not None:
        job.chooser.noise.rewind(record.generated)
    return record


def _most(job: Job) -> int:
    """Drafts to make before the next confirmation."""
    return job.max_pending if job.draft_length is None else job.draft_length.best()


def _learn(job: Job, drafts: _Drafts, *, deep: bool) -> None:
    """Tell how many drafts were accepted; a newest token that went to full depth was none."""
    assert job.draft_length is not None
    made = drafts.steps[: len(drafts.steps) - deep]
    if not made:
        return
    depths = [*job.exits.layers, job.stack.executor.layers]
    stages = torch.stack([step.stages for step in made]).tolist()
    layers = [sum(depths[stage] for stage in row) / len(row) for row in stages]
    # a wrong draft ends what is kept, so only the last kept one can have been replaced
    kept = min(drafts.kept, len(made))
    wrong = drafts.wrong and drafts.kept <= len(made)
    job.draft_length.observe(accepted=kept - wrong, rejected=wrong, depths=layers)


def _all_deep(job: Job, step: Step) -> bool:
    """Whether every row that counts went to full depth; if only the device knows, one read."""
    if step.deep is None:
        return bool((step.stages == len(job.exits.layers)).all())
    return step.deep


def _must_confirm(job: Job, record: Record, tokens: Tensor) -> bool:
    if record.length >= job.max_length:
        return True
    if not job.ends.numel():
        return False
    return bool((torch.isin(tokens, job.ends) & record.unfinished).any())


def _confirm(
    job: Job,
    record: Record,
    speculation: AbstractSpeculation,
    drafts: _Drafts,
    state: State,
    newest: Tensor | None,
) -> tuple[bool, State]:
    """Settle, hold the drafts against the full model, keep them up to the first wrong one.

    ``newest [batch, vocabulary]`` are the last place's logits if they are the full model's: they
    are not formed again, and what was drawn from them stands.

    Returns whether any row goes on, and the policy's state behind the last kept token.
    """
    stack = _stack_of(job)
    stack.settle()
    finals = stack.take_finals()
    count, full = len(drafts.steps), len(job.exits.layers)
    record.length -= count
    drafted = finals[:, : count - (newest is not None)]
    places: list[Tensor] = []
    known: list[bool | None] = []
    if drafted.shape[1]:
        logits = job.stack.executor.readout(drafted)
        places += logits.unbind(dim=1)
        known += _agreeing(record, drafts, logits) if job.chooser.plain else [None] * len(places)
    if newest is not None:
        places.append(newest)
        known.append(True)
    for offset, (draft, step) in enumerate(zip(drafts.drawn, drafts.steps, strict=True)):
        prefix, at = record.ids[:, : record.length], record.generated
        verdict = speculation.judge(
            prefix, places[offset], at, draft=draft, full=step.stages == full
        )
        kept, stands = verdict.kept, known[offset]
        if stands is None:
            stands = bool((kept | ~record.active).all())
        drafts.wrong = not stands
        tokens = draft.tokens
        if drafts.wrong:
            tokens = torch.where(kept, tokens, verdict.instead())
        stages = torch.where(kept, step.stages, full)
        scored = Step(stages, step.exit_scores, places[offset], verdict.scores)
        going = record.add(job, tokens, scored)
        record.agreement[:, at] = torch.where(record.stages[:, at] >= 0, verdict.agreement, -1)
        if job.chooser.noise is not None:
            job.chooser.noise.release(record.generated)
        drafts.kept = offset + 1
        if not going:
            return False, state
        if drafts.wrong:
            _cut(job, record)
            rest = drafts.states[offset + 1] if offset + 1 < count else state
            return True, rest
    return True, state


def _agreeing(record: Record, drafts: _Drafts, logits: Tensor) -> list[bool]:
    """Per place of ``logits``, whether every row that counts would choose the draft; one read.

    A row counts as long as no draft can have ended it, which is up to the first wrong one.
    """
    drawn = drafts.drawn[: logits.shape[1]]
    drafted = torch.stack([draft.tokens for draft in drawn], dim=1)
    agree = logits.argmax(dim=-1) == drafted
    found: list[bool] = (agree | ~record.active[:, None]).all(dim=0).tolist()
    return found


def _cut(job: Job, record: Record) -> None:
    """Forget keys and values of what is no longer in the text; the newest token has none yet."""
    _stack_of(job).truncate(record.length - 1)


def _stack_of(job: Job) -> ExactStack | ExactDeviceStack:
    assert isinstance(job.stack, ExactStack | ExactDeviceStack)
    return job.stack
