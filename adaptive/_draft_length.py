"""How many drafts to make before they are confirmed, from measured costs and acceptance."""

from __future__ import annotations

import numpy as np

from adaptive._costs import Costs

#: Counts as one draft seen before the first: half of it was accepted.
_PRIOR = 0.5
#: Drafts before anything is known.
_FIRST = 8


class DraftLength:
    """Number of drafts that gives the most confirmed tokens per second.

    With acceptance ``a`` of each draft after accepted ones, ``k`` drafts give
    ``1 + a + ... + a^(k-1)`` tokens: the full model's own choice replaces the first wrong one
    (Leviathan et al. 2023, section 3.1; without their extra token, as no draft's state is left
    to read it from). They take ``k`` shallow steps and one pass of the remaining layers and the
    head over ``k`` tokens.

    Parameters
    ----------
    costs : Costs
    layers : int
        Of the model.
    rows : int
        Rows that are drafted and confirmed together.
    most : int
        Largest number of drafts.
    """

    def __init__(self, costs: Costs, *, layers: int, rows: int, most: int) -> None:
        self._costs, self._layers, self._rows = costs, layers, rows
        self._counts = np.arange(1, most + 1)
        self._deep = np.array([costs.of_layer(rows * count) for count in range(1, most + 1)])
        self._head = np.array([costs.of_head(rows * count) for count in range(1, most + 1)])
        self._accepted, self._seen = _PRIOR, 1.0
        self._depth, self._drafts = 0.0, 0

    @property
    def acceptance(self) -> float:
        """Share of drafts that were accepted, among those before and at a first wrong one."""
        return self._accepted / self._seen

    def observe(self, *, accepted: int, rejected: bool, depths: list[float]) -> None:
        """Take in one confirmation: drafts accepted, whether one was wrong, and their layers."""
        self._accepted += accepted
        self._seen += accepted + rejected
        self._depth += sum(depths)
        self._drafts += len(depths)

    def best(self) -> int:
        """Drafts to make before the next confirmation."""
        if not self._drafts:
            return min(_FIRST, int(self._counts[-1]))
        depth = self._depth / self._drafts
        tokens = np.cumsum(self.acceptance ** (self._counts - 1))
        step = depth * self._costs.of_layer(self._rows) + self._costs.of_head(self._rows)
        seconds = self._counts * step + (self._layers - depth) * self._deep + self._head
        return int(self._counts[np.argmax(tokens / seconds)])
