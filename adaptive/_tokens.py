"""Single tokens of some rows of a batch: where they are, and attention over their own rows."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive._transfer import sent

#: From this share of the batch's rows on, reading every row's keys takes less time than copying
#: those of the rows that are asked for.
_READ_ALL = 1 / 3


class Tokens:
    """Successive tokens of rows: row ``of[i]`` has the slots ``starts[i] .. stops[i] - 1``.

    Parameters
    ----------
    of : int array [n]
        Rows of the batch; a row may be named more than once.
    starts, stops : int array [n]
    device : torch.device

    Attributes
    ----------
    count : int
        Number of tokens.
    rows, slots : Tensor, int64 [count]
        Row and slot of each token, on ``device``.
    """

    def __init__(
        self,
        of: NDArray[np.int64],
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        *,
        device: torch.device,
    ) -> None:
        lengths = stops - starts
        before = np.cumsum(lengths) - lengths
        self.count = int(lengths.sum())
        self._rows = np.repeat(of, lengths)
        self._slots = np.arange(self.count) + np.repeat(starts - before, lengths)
        self.device = device
        self.rows, self.slots = sent(np.stack([self._rows, self._slots]), device)

    def __add__(self, other: Tokens) -> Tokens:
        """Tokens of both, in this order."""
        both = Tokens.__new__(Tokens)
        both.count, both.device = self.count + other.count, self.device
        both._rows = np.concatenate([self._rows, other._rows])
        both._slots = np.concatenate([self._slots, other._slots])
        both.rows = torch.cat([self.rows, other.rows])
        both.slots = torch.cat([self.slots, other.slots])
        return both

    @cached_property
    def reach(self) -> tuple[int, int]:
        """Lowest and highest slot."""
        return int(self._slots.min()), int(self._slots.max())

    def layout(self, batch: int) -> Layout:
        """Arrange the tokens as queries of attention, in a batch of this many rows."""
        present, inverse = np.unique(self._rows, return_inverse=True)
        everyone = len(present) >= _READ_ALL * batch
        lines = self._rows if everyone else inverse
        order = np.lexsort((self._slots, lines))
        ranked = lines[order]
        first = np.searchsorted(ranked, ranked)  # where each line's tokens begin
        places = np.empty(self.count, dtype=np.int64)
        places[order] = np.arange(self.count) - first
        count = batch if everyone else len(present)
        rows = None if everyone else sent(present, self.device)
        longest = int(places.max()) + 1
        plain = longest == 1 and self.count == count and bool((lines == np.arange(count)).all())
        at = None if plain else sent(np.stack([lines, places]), self.device)
        return Layout(rows, count, longest, at)


class Layout:
    """Queries of single tokens as a rectangle ``[lines, longest]``, one line per row.

    Parameters
    ----------
    rows : Tensor, int64 [lines], optional
        The batch's row of each line; ``None`` if every row has its line.
    lines, longest : int
    at : Tensor, int64 [2, count], optional
        Line and place of each token; ``None`` if token ``i`` alone is line ``i``.
    """

    def __init__(self, rows: Tensor | None, lines: int, longest: int, at: Tensor | None) -> None:
        self.rows, self.lines, self.longest, self._at = rows, lines, longest, at

    def lay(self, values: Tensor, *, empty: float = 0.0) -> Tensor:
        """``[count, ...]`` to ``[lines, longest, ...]``; places without a token hold ``empty``."""
        if self._at is None:
            return values[:, None]
        laid = values.new_full((self.lines, self.longest, *values.shape[1:]), empty)
        laid[self._at[0], self._at[1]] = values
        return laid

    def pick(self, laid: Tensor) -> Tensor:
        """``[lines, longest, ...]`` back to ``[count, ...]``."""
        return laid[:, 0] if self._at is None else laid[self._at[0], self._at[1]]

    def of(self, kept: Tensor) -> Tensor:
        """Entries ``[lines, ...]`` of what is kept for every row of the batch."""
        return kept if self.rows is None else kept.index_select(0, self.rows)


def visible(
    slots: Tensor, padding: Tensor | None, *, low: int, stop: int, window: int | None
) -> Tensor:
    """Which keys, from slot ``low`` on, each query sees.

    Parameters
    ----------
    slots : Tensor, int64 [lines, longest]
        Slots of the queries; below ``low`` where there is none, which then sees one key.
    padding : Tensor, bool [lines, prompt], optional
    low, stop : int
    window : int, optional

    Returns
    -------
    Tensor, bool [lines, 1, longest, stop - low]
    """
    queries = slots.clamp(min=low)[:, :, None]
    keys = torch.arange(low, stop, device=slots.device)
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    if padding is not None:
        hidden = torch.zeros(len(slots), stop, dtype=torch.bool, device=slots.device)
        seen = min(stop, padding.shape[1])
        hidden[:, :seen] = padding[:, :seen]
        allowed = (allowed & ~hidden[:, None, low:]) | (keys == queries)
    return allowed[:, None]


def visible_in_ring(slots: Tensor, padding: Tensor | None, *, places: int, window: int) -> Tensor:
    """Which places of a ring, where slot ``s`` is kept at ``s % places``, each query sees.

    Parameters
    ----------
    slots : Tensor, int64 [lines, longest]
        Slots of the queries; below 0 where there is none, which then sees one key.
    padding : Tensor, bool [lines, prompt], optional
    places, window : int
        What a query sees must not have been overwritten.

    Returns
    -------
    Tensor, bool [lines, 1, longest, places]
    """
    queries = slots.clamp(min=0)[:, :, None]
    # how many slots before the query the last one at each place is
    ages = (queries - torch.arange(places, device=slots.device)) % places
    allowed = (ages < window) & (ages <= queries)
    if padding is not None:
        held = queries - ages
        prompt = padding.shape[1]
        at = held.clamp(min=0, max=prompt - 1).flatten(1)
        hidden = padding.gather(1, at).view_as(held) & (held < prompt)
        allowed &= ~hidden | (ages == 0)
    return allowed[:, None]


def ring_places(first: int, stop: int, *, places: int, device: torch.device) -> slice | Tensor:
    """Where slots ``first .. stop - 1``, at most ``places``, are kept, ``s`` at ``s % places``.

    A slice where they lie in a row, else int64 ``[n]``.
    """
    begin, count = first % places, stop - first
    if begin + count <= places:
        return slice(begin, begin + count)
    return torch.arange(first, stop, device=device) % places
