"""One generated text and what was decided along it."""

from __future__ import annotations

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
