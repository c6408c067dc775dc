"""Losses of a trace by name, as fits and references read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError, Trace


def exit_losses(trace: Trace, loss: str) -> NDArray[Any]:
    """Loss of stopping at each exit, [n_tokens, n_exits]."""
    if loss not in trace.losses:
        raise InvalidArgumentError("loss", loss, f"one of {', '.join(map(repr, trace.losses))}")
    return np.asarray(trace.losses[loss])


def stage_losses(trace: Trace, loss: str) -> NDArray[np.float64]:
    """Loss of each stage, float64 [n_tokens, n_exits + 1]; full computation has none."""
    return np.concatenate([exit_losses(trace, loss), np.zeros((trace.n_tokens, 1))], axis=1)


def stages_of(stages: ArrayLike, trace: Trace) -> NDArray[np.int64]:
    """Stages of the tokens of a trace, int64 [n_tokens], checked."""
    where = np.asarray(stages, dtype=np.int64)
    if where.shape != (trace.n_tokens,):
        raise InvalidArgumentError(
            "stages", f"shape {where.shape}", f"of shape ({trace.n_tokens},)"
        )
    if ((where < 0) | (where > trace.n_exits)).any():
        wrong = int(where[(where < 0) | (where > trace.n_exits)][0])
        raise InvalidArgumentError("stages", wrong, f"in 0..{trace.n_exits}, one per token")
    return where
