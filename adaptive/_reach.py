"""What the queries of a run may see, and where its keys and values are written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptive._executor import attention_mask
from adaptive._keys_values import KeyValues
from adaptive._tokens import Layout, Tokens, visible, visible_in_ring


class Reach(NamedTuple):
    """What the queries of a run may see, for layers with the same window, and where they write.

    Places ``low .. stop - 1``; ``mask``, if there is one, is over these. Keys and values are
    written to ``into``. A run that is longer than what may be overwritten at once sees the places
    ``before``, as they were, and then itself.
    """

    low: int
    stop: int
    mask: Tensor | None
    causal: bool
    into: slice | Tensor
    before: Tensor | None = None


class Sight:
    """What may be seen in one run's memory.

    Parameters
    ----------
    memory : KeyValues
    padding : Tensor, bool [batch, prompt], optional
    masked : bool
        Whether attention wants a mask where "causal" would say the same.
    """

    def __init__(self, memory: KeyValues, padding: Tensor | None, *, masked: bool) -> None:
        self._memory, self._padding, self._masked = memory, padding, masked
        self._device = memory.keys[0].device

    def along(self, first: int, start: int, stop: int, window: int | None) -> Reach:
        """Say it for slots ``start .. stop - 1`` of all rows; ``first .. stop - 1`` are written."""
        count, memory, padding = stop - start, self._memory, self._padding
        into = memory.into(window, first, stop)
        low = 0 if window is None else max(0, start + 1 - window)
        before = None
        if memory.wraps(window, stop):
            if memory.holds(window, count):
                slots = torch.arange(start, stop, device=self._device)
                end, mask = self._in_ring(self._lines(slots), padding, window)
                return Reach(0, end, mask, False, into)
            before = memory.where(window, torch.arange(low, start, device=self._device))
        inside = window is None or stop <= window
        if padding is None and inside and not self._masked and start == 0 and count > 1:
            return Reach(0, stop, None, True, into)
        if padding is None and count == 1:
            return Reach(low, stop, None, False, into)
        seen = attention_mask(padding, start=start, count=count, window=window, device=self._device)
        return Reach(low, stop, None if seen is None else seen[..., low:], False, into, before)

    def apart(
        self, tokens: Tokens, layout: Layout, window: int | None, *, written: Tensor
    ) -> Reach:
        """Say it for single tokens of some rows; nothing is hidden from tokens at one slot.

        Slots ``written`` are, int64 ``[n]``.
        """
        lowest, highest = tokens.reach
        into = self._memory.where(window, written)
        padding = None if self._padding is None else layout.of(self._padding)
        slots = layout.lay(tokens.slots, empty=-1)
        if self._memory.wraps(window, highest + 1):
            end, mask = self._in_ring(slots, padding, window)
            return Reach(0, end, mask, False, into)
        low = 0 if window is None else max(0, lowest + 1 - window)
        if padding is None and lowest == highest:
            return Reach(low, highest + 1, None, False, into)
        mask = visible(slots, padding, low=low, stop=highest + 1, window=window)
        return Reach(low, highest + 1, mask, False, into)

    def around(self, slots: Tensor, stop: int, window: int | None) -> Reach:
        """Say it for slots that only the device knows, int64 ``[n]``, all below ``stop``."""
        lines = self._lines(slots)
        padding = None if self._padding is None else self._padding[:, :stop]
        if self._memory.wraps(window, stop):
            end, mask = self._in_ring(lines, padding, window)
        else:
            end, mask = stop, visible(lines, padding, low=0, stop=stop, window=window)
        return Reach(0, end, mask, False, slots)

    def _lines(self, slots: Tensor) -> Tensor:
        """One line of slots per row where rows differ."""
        return slots.expand(1 if self._padding is None else len(self._padding), -1)

    def _in_ring(
        self, slots: Tensor, padding: Tensor | None, window: int | None
    ) -> tuple[int, Tensor]:
        """Where the places of a ring end, and which of them queries ``[lines, n]`` see."""
        assert window is not None
        places = self._memory.places[window]
        return places, visible_in_ring(slots, padding, places=places, window=window)
