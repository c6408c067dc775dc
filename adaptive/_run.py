"""One generated text, what was decided along it, and how deep several went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """One unit's generated text and what was decided along it.

    Parameters
    ----------
    tokens : tuple of int
        Generated tokens, end of text included, padding not.
    stages : ndarray of int64 [n]
        Exit of each token; the number of exits for full depth.
    agreement : ndarray of int8 [n]
        1 where the full model chooses the same token after the same own prefix, 0 where not.
    scores : ndarray of float32 [n]
        Score at the last exit asked; NaN where none was.
    """

    tokens: tuple[int, ...]
    stages: NDArray[np.int64]
    agreement: NDArray[np.int8]
    scores: NDArray[np.float32]

    @property
    def disagreement(self) -> float:
        """Share of the tokens that differ from the full model's choice after the same prefix."""
        return float(np.mean(self.agreement == 0))


def mean_run_depth(runs: Sequence[Run], exits: tuple[int, ...], layers: int) -> float:
    """Mean number of layers behind a token, the first of each text not counted."""
    depth = np.array([*exits, layers], dtype=np.float64)
    later = np.concatenate([run.stages[1:] for run in runs])
    return float(depth[later].mean()) if later.size else float(layers)


def exit_counts(runs: Sequence[Run], exits: int) -> list[int]:
    """Tokens per exit, full depth last, the first of each text not counted."""
    later = np.concatenate([run.stages[1:] for run in runs])
    return [int(count) for count in np.bincount(later, minlength=exits + 1)]
