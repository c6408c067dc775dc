"""Run a rule offline over the scores of a trace: the same code that decides in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace
from adaptive.policies._base import AbstractRule, Features, State, check_exits, check_stage, held
from adaptive.policies._noise import keyed_noise, unit_keys

#: What is asked of a rule at a stage: (features, score, state) -> (tensor [batch], state).
Ask = Callable[[Features, Tensor, State], tuple[Tensor, State]]


def exit_stages(
    rule: AbstractRule, trace: Trace, *, stages: tuple[int, ...] | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Stage at which the rule stops each token of a trace.

    Units run side by side as rows of one batch and tokens in order, so rules with memory see
    what they would see in a generation loop. (A rule of scope "batch" therefore sees the whole
    trace as one batch.)

    Parameters
    ----------
    rule : AbstractRule
    trace : Trace
        ``scores [n_tokens, n_exits]`` and ``lengths [n_units]``.
    stages : tuple of int, optional
        Exits at which the policy asks; those asked when the trace was collected when omitted.
    seed : int
        Seed of the keyed noise, for a rule that reads it.

    Returns
    -------
    ndarray of int64 [n_tokens]
        0..n_exits-1 for an early stop, ``n_exits`` for full computation.

    Raises
    ------
    InvalidArgumentError
        If the rule reads answers and the trace has no ``answers`` column, a stage is not in
        the trace, or the rule has entries for fewer exits than are asked.
    InvalidTypeError
        If ``rule`` is no rule.
    """
    if not isinstance(rule, AbstractRule):
        raise InvalidTypeError("rule", rule, "an AbstractRule (of a policy: `policy.rule`)")
    scores, present = _padded(np.asarray(trace.scores, dtype=np.float32), trace.lengths)
    found = torch.full(scores.shape[:2], scores.shape[2], dtype=torch.int64, device="cpu")
    walk = _walk(rule, rule.decide, trace, stages=stages, seed=seed, absorbing=True)
    for token, stage, stop in walk:
        found[:, token] = torch.where(stop, stage, found[:, token])
    exits: NDArray[np.int64] = found.numpy()[present]
    return exits


def asked_at(trace: Trace, stages: tuple[int, ...]) -> Trace:
    """Return the trace as if only some of its exits had been asked.

    Parameters
    ----------
    trace : Trace
    stages : tuple of int
        Exits that are asked, ascending.

    Returns
    -------
    Trace
        The others have the score ``-inf`` and are marked in the column ``asked``. Scores that look
        at the exit before are left as they are.

    Examples
    --------
    >>> trace = Trace(
    ...     scores=[[0.9, 0.2]],
    ...     losses={"disagreement": [[1, 0]]},
    ...     costs=[1.0, 2.0, 4.0],
    ...     cost_quantity="layers",
    ... )
    >>> asked_at(trace, (1,)).scores.tolist()
    [[-inf, 0.20000000298023224]]
    """
    kept = np.isin(np.arange(trace.n_exits), _asked(stages, trace))
    scores = np.where(kept, trace.scores, np.float32(-np.inf))
    marks = {"asked": np.tile(kept, (trace.n_tokens, 1))}
    return replace(trace, scores=scores, columns=dict(trace.columns) | marks)


def largest(
    rule: AbstractRule,
    ask: Ask,
    trace: Trace,
    *,
    stages: tuple[int, ...] | None = None,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Largest value of a statistic of the rule over the stages of each token, float32 [n_tokens].

    For a rule that stops when the statistic reaches the knob, this is the largest knob at which
    the token stops early at all. NaN counts as minus infinity.
    """
    scores, present = _padded(np.asarray(trace.scores, dtype=np.float32), trace.lengths)
    found = torch.full(scores.shape[:2], float("-inf"), device="cpu")
    for token, _, value in _walk(rule, ask, trace, stages=stages, seed=seed, absorbing=False):
        found[:, token] = torch.fmax(found[:, token], value)
    values: NDArray[np.float32] = found.numpy()[present]
    return values


def _walk(
    rule: AbstractRule,
    ask: Ask,
    trace: Trace,
    *,
    stages: tuple[int, ...] | None,
    seed: int,
    absorbing: bool,
) -> Iterator[tuple[int, int, Tensor]]:
    """Ask at every (token, stage); if absorbing, an answer of True ends the token for its row."""
    scores, present = _padded(np.asarray(trace.scores, dtype=np.float32), trace.lengths)
    asked = _asked(stages, trace)
    check_exits(rule, asked)
    answers = _answers(rule, trace)
    positions = _padded(positions_of(trace), trace.lengths)[0]
    keys = unit_keys(trace.unit_ids) if "noise" in rule.needs else None
    state = rule.init(scores.shape[0], device=torch.device("cpu"))
    for token in range(scores.shape[1]):
        running = torch.from_numpy(present[:, token])
        position = positions[:, token]
        noise = None if keys is None else keyed_noise(keys, position, seed=seed)
        for stage in asked:
            features = Features(
                stage=stage,
                position=position,
                answer=None if answers is None else answers[:, token, stage],
                noise=noise,
                running=running,
            )
            value, new = ask(features, scores[:, token, stage], state)
            state = held(new, state, running)
            if absorbing:
                value = value & running
                running = running & ~value
            yield token, stage, value
        state = rule.advance(state)


def positions_of(trace: Trace) -> NDArray[np.int64]:
    """Position of each token of a trace as the loop counts it, int64 [n_tokens].

    The column ``positions`` where the trace has one (a loop whose first token comes from the
    prompt pass starts at 1), else the place of the row inside its unit, from 0.
    """
    given = trace.columns.get("positions")
    return trace.positions if given is None else np.asarray(given, dtype=np.int64)


def _asked(stages: tuple[int, ...] | None, trace: Trace) -> tuple[int, ...]:
    """Return the exits given, else those the trace says were asked, else all."""
    if stages is None:
        marks = trace.columns.get("asked", np.ones((1, trace.n_exits), dtype=bool))
        return tuple(int(stage) for stage in np.flatnonzero(marks[0]))
    asked = check_stage(stages)
    if asked[-1] >= trace.n_exits:
        raise InvalidArgumentError("stages", stages, f"exits of the trace, 0..{trace.n_exits - 1}")
    return asked


def _answers(rule: AbstractRule, trace: Trace) -> Tensor | None:
    if "answer" not in rule.needs:
        return None
    if "answers" not in trace.columns:
        raise InvalidArgumentError(
            "trace", "no `answers` column", "a trace with the exits' answers, which this rule reads"
        )
    return _padded(np.asarray(trace.columns["answers"]), trace.lengths)[0]


def _padded(values: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_]]:
    """Ragged ``[n_tokens, ...]`` to ``[n_units, longest, ...]`` and the mask of real tokens."""
    present = np.arange(int(lengths.max(initial=0)))[None, :] < np.asarray(lengths)[:, None]
    padded = np.zeros((*present.shape, *values.shape[1:]), dtype=values.dtype)
    padded[present] = values
    return torch.from_numpy(padded), present
