"""Keys and values of a run: every slot, or in windowed layers a ring of the last ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive._tokens import Tokens, ring_places


@dataclass(frozen=True)
class _Part:
    """Layers that keep as many slots: ``[layers, batch, heads, places + 1, width]``."""

    members: list[int]
    keys: Tensor
    values: Tensor


class KeyValues:
    """Keys and values of all layers.

    Slot ``s`` of a windowed layer is kept at place ``s`` modulo its number of places: a window and
    ``ahead`` more. So a run of at most ``ahead + 1`` slots overwrites nothing that one of them
    sees, and neither do ``ahead`` slots that were written and are then forgotten. Behind the places
    of every layer is one more, ``void``, that nobody sees: runs of a fixed shape write there
    what is not theirs to write.

    Parameters
    ----------
    windows : sequence of (int or None)
        Width of each layer's window; ``None`` if it sees everything.
    batch, heads, length, width : int
        Rows, key heads, slots, width of a head.
    ahead : int, optional
        ``None`` keeps every slot everywhere.
    like : Tensor
        Dtype and device.

    Attributes
    ----------
    keys, values : list of Tensor
        Per layer, ``[batch, heads, places + 1, width]``.
    places : dict
        Places by width of the window.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        batch: int,
        heads: int,
        length: int,
        width: int,
        ahead: int | None,
        like: Tensor,
    ) -> None:
        self.batch, self.length, self._windows = batch, length, windows
        self._drops = ahead is not None
        self.places = {
            window: length if window is None or ahead is None else min(length, window + ahead)
            for window in windows
        }
        kept = [self.places[window] for window in windows]
        self._parts: list[_Part] = []
        # a compiled run may only change whole tensors in place: of slices it would copy the rest
        self.keys, self.values = [like] * len(windows), [like] * len(windows)
        for places in sorted(set(kept)):
            members = [layer for layer, own in enumerate(kept) if own == places]
            shape = (len(members), batch, heads, places + 1, width)
            part = _Part(members, like.new_zeros(shape), like.new_zeros(shape))
            self._parts.append(part)
            for layer, own_keys, own_values in zip(members, part.keys, part.values, strict=True):
                self.keys[layer], self.values[layer] = own_keys, own_values

    def clear(self) -> None:
        """Begin again: a number that is none would be read even where it is hidden."""
        for part in self._parts:
            part.keys.zero_()
            part.values.zero_()

    def wraps(self, window: int | None, stop: int) -> bool:
        """Whether layers with this window have begun to overwrite when slots go up to ``stop``."""
        return stop > self.places[window]

    def holds(self, window: int | None, count: int) -> bool:
        """Whether ``count`` slots in a row can be written before any of them looks around."""
        return window is None or count <= self.places[window] - window + 1

    def into(self, window: int | None, first: int, stop: int) -> slice | Tensor:
        """Places of the slots ``first .. stop - 1``, or of the last of them that are kept."""
        places = self.places[window]
        first = max(first, stop - places)
        return ring_places(first, stop, places=places, device=self.keys[0].device)

    def where(self, window: int | None, slots: Tensor) -> Tensor:
        """Places of slots, int64 ``[n]``; ``void`` stays apart."""
        places = self.places[window]
        if places == self.length:
            return slots
        return (slots % places).masked_fill(slots == self.length, places)

    def write(self, layer: int, keys: Tensor, values: Tensor, into: slice | Tensor) -> None:
        """Keep ``[batch, heads, n, width]`` at places."""
        own_keys, own_values = self.keys[layer], self.values[layer]
        if isinstance(into, slice):
            own_keys[:, :, into] = _last(keys, into.stop - into.start)
            own_values[:, :, into] = _last(values, into.stop - into.start)
        else:
            own_keys.index_copy_(2, into, _last(keys, into.shape[0]))
            own_values.index_copy_(2, into, _last(values, into.shape[0]))

    def write_tokens(
        self, layer: int, keys: Tensor, values: Tensor, into: slice | Tensor, rows: Tensor
    ) -> None:
        """Keep ``[heads, n, width]`` of single tokens of ``rows [n]`` at places."""
        self.keys[layer][rows, :, into] = keys.transpose(0, 1)
        self.values[layer][rows, :, into] = values.transpose(0, 1)

    def fill(self, low: int, high: int, keys: Tensor, values: Tensor, first: int) -> None:
        """Keep ``[high - low, batch, heads, n, width]`` of layers, slots from ``first`` on."""
        for part, begin, end, chosen in self._chosen(low, high):
            into = self.into(self._windows[part.members[begin]], first, first + keys.shape[3])
            count = into.stop - into.start if isinstance(into, slice) else into.shape[0]
            for kept, given in ((part.keys, keys), (part.values, values)):
                kept[begin:end, :, :, into] = _last(given[chosen], count)

    def fill_tokens(
        self, low: int, high: int, keys: Tensor, values: Tensor, tokens: Tokens
    ) -> None:
        """Keep ``[high - low, heads, n, width]`` of single tokens."""
        for part, begin, end, chosen in self._chosen(low, high):
            into = self.where(self._windows[part.members[begin]], tokens.slots)
            for kept, given in ((part.keys, keys), (part.values, values)):
                kept[begin:end, tokens.rows, :, into] = given[chosen].permute(2, 0, 1, 3)

    def window_of(self, layer: int) -> int | None:
        """Width of the window of a layer that need not keep every slot."""
        return self._windows[layer] if self._drops else None

    def last(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots below ``length``, in order, or the last that are kept."""
        window = self._windows[layer]
        if not self.wraps(window, length):
            return self.keys[layer][:, :, :length], self.values[layer][:, :, :length]
        places = self.places[window]
        order = torch.arange(length, length + places, device=self.keys[layer].device) % places
        return self.keys[layer][:, :, order], self.values[layer][:, :, order]

    def _chosen(self, low: int, high: int) -> list[tuple[_Part, int, int, slice | list[int]]]:
        """Every part with layers in ``low .. high - 1``: which of its own, which of the given."""
        found: list[tuple[_Part, int, int, slice | list[int]]] = []
        for part in self._parts:
            begin, end = bisect_left(part.members, low), bisect_left(part.members, high)
            if begin < end:
                every = end - begin == high - low
                given = [member - low for member in part.members[begin:end]]
                found.append((part, begin, end, slice(None) if every else given))
        return found


def _last(states: Tensor, count: int) -> Tensor:
    """``[..., n, width]`` of the last slots: all, but of a run longer than what is kept."""
    return states if states.shape[-2] == count else states[..., -count:, :]
