"""Run a rule offline over the scores of a trace: the same code that decides in the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import AbstractRule, Features


def exit_stages(rule: AbstractRule, trace: Trace) -> NDArray[np.int64]:
    """Stage at which the rule stops each token of a trace.

    Units run side by side as rows of one batch and tokens in order, so rules with memory see
    what they would see in a generation loop.

    Parameters
    ----------
    rule : AbstractRule
    trace : Trace
        ``scores [n_tokens, n_exits]`` and ``lengths [n_units]``.

    Returns
    -------
    ndarray of int64 [n_tokens]
        0..n_exits-1 for an early stop, ``n_exits`` for full computation.

    Raises
    ------
    InvalidArgumentError
        If the rule reads answers and the trace has no ``answers`` column.
    """
    scores, present = _padded(np.asarray(trace.scores, dtype=np.float32), trace.lengths)
    answers = _answers(rule, trace)
    n_units, longest, n_exits = scores.shape
    stages = torch.full((n_units, longest), n_exits, dtype=torch.int64)
    state = rule.init(n_units, device=torch.device("cpu"))
    for token in range(longest):
        running = torch.ones(n_units, dtype=torch.bool)
        position = torch.full((n_units,), token, dtype=torch.int64)
        for stage in range(n_exits):
            features = Features(
                stage=stage,
                position=position,
                answer=None if answers is None else answers[:, token, stage],
            )
            stop, state = rule.decide(features, scores[:, token, stage], state)
            stages[:, token] = torch.where(running & stop, stage, stages[:, token])
            running = running & ~stop
        state = rule.advance(state)
    found: NDArray[np.int64] = stages.numpy()[present]
    return found


def _answers(rule: AbstractRule, trace: Trace) -> torch.Tensor | None:
    if "answer" not in rule.needs:
        return None
    if "answers" not in trace.columns:
        raise InvalidArgumentError(
            "trace", "no `answers` column", "a trace with the exits' answers, which this rule reads"
        )
    return _padded(np.asarray(trace.columns["answers"]), trace.lengths)[0]


def _padded(
    values: NDArray[Any], lengths: NDArray[np.int64]
) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Ragged ``[n_tokens, ...]`` to ``[n_units, longest, ...]`` and the mask of real tokens."""
    present = np.arange(int(lengths.max(initial=0)))[None, :] < np.asarray(lengths)[:, None]
    padded = np.zeros((*present.shape, *values.shape[1:]), dtype=values.dtype)
    padded[present] = values
    return torch.from_numpy(padded), present
