"""Segments of a layer stack, and what stopped tokens still owe to the deeper ones."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from adaptive._executor import AbstractExecutor

#: Entries of the table of what a piece of a prompt may see.
_TABLE = 2**23


class AbstractStack(abc.ABC):
    """Layers cut into segments by the exits, and the tokens that wait in front of each.

    Parameters
    ----------
    executor : AbstractExecutor
        Already begun.
    exits : tuple of int
        Number of layers below each exit, ascending.
    """

    def __init__(self, executor: AbstractExecutor, exits: tuple[int, ...]) -> None:
        self.executor = executor
        self.bounds = (0, *exits, executor.layers)
        self.segments = len(exits) + 1
        #: Whether final hidden states are kept for :meth:`take_finals`.
        self.keep_finals = False

    def prefill(self, ids: Tensor, *, chunk: int | None = None) -> Tensor:
        """Run a prompt ``[batch, n]`` at full depth; the last slot's final hidden state.

        In pieces of ``chunk`` slots, by default smaller ones for longer prompts: what a piece may
        see is a table of its own length by the prompt's.
        """
        chunk = chunk or max(128, min(1024, _TABLE // ids.shape[1]))
        for start in range(0, ids.shape[1], chunk):
            tokens = ids[:, start : start + chunk]
            hidden = self.executor.embed(tokens, start)
            hidden = self.executor.run(0, self.executor.layers, hidden, start)
        self._begun(ids.shape[1])
        return hidden[:, -1]

    @property
    @abc.abstractmethod
    def pending(self) -> int:
        """Most slots of a row that the last segment has not seen."""

    def complete(self, ids: Tensor) -> None:
        """Take in the last token of rows of ``ids [batch, length]`` that ended before the others.

        Their part of the cache then holds their whole text.
        """
        return

    @abc.abstractmethod
    def settle(self) -> None:
        """Pay everything that is owed: afterwards every segment has every slot."""

    @abc.abstractmethod
    def take_finals(self) -> Tensor | None:
        """Hand over the kept final states in slot order, ``[batch, n, width]``, and forget them.

        ``None`` where settled tokens do not pass the layers they skipped.
        """

    @abc.abstractmethod
    def _begun(self, length: int) -> None:
        """Note that every segment has the first ``length`` slots of every row."""


class HostStack(AbstractStack):
    """The host knows which rows go on, and calls one segment after the other."""

    @abc.abstractmethod
    def first(self, tokens: Tensor, slot: int, rows: list[int]) -> Tensor:
        """Embed the ``rows``' newest tokens, run segment 0; ``[batch, 1, width]``."""

    @abc.abstractmethod
    def deepen(
        self, segment: int, hidden: Tensor, slot: int, rows: list[int], running: Tensor
    ) -> Tensor:
        """Run ``segment`` for the newest token of ``rows``, which have not stopped.

        What the segment must know before it is settled. The rest of ``hidden [batch, 1, width]``
        is handed back as it is. ``running``, bool ``[batch]``, says for the device what ``rows``
        says for the host, if there are several.
        """

    @abc.abstractmethod
    def leave(
        self, segment: int, hidden: Tensor, slot: int, stopped: Tensor, rows: list[int]
    ) -> None:
        """Leave the newest token of rows that stopped in front of ``segment``; ``rows`` go on.

        ``stopped``, bool ``[batch]``, marks them.
        """


class SharedStack(HostStack):
    """All rows share one filled length and one inbox per segment.

    ``filled[s]`` counts the slots whose keys and values segment ``s`` has; it never increases
    with ``s``. A row that stopped early is carried along when another row goes deeper, which in
    ``exact`` mode changes when it is settled and nothing else. For one row this is all there is
    to know; for several, :mod:`adaptive._row_stack` saves what is carried along for nothing.
    """

    def __init__(self, executor: AbstractExecutor, exits: tuple[int, ...]) -> None:
        super().__init__(executor, exits)
        self.filled = [0] * self.segments
        self.inbox: list[list[Tensor]] = [[] for _ in range(self.segments)]

    def first(self, tokens: Tensor, slot: int, rows: list[int]) -> Tensor:
        """See :class:`HostStack`: all rows."""
        hidden = self.executor.embed(tokens[:, None], slot)
        hidden = self.executor.run(0, self.bounds[1], hidden, slot)
        self.filled[0] = slot + 1
        return hidden

    @property
    def pending(self) -> int:
        """See :class:`HostStack`."""
        return self.filled[0] - self.filled[-1]

    def _begun(self, length: int) -> None:
        self.filled = [length] * self.segments

    def _take(self, segment: int) -> Tensor | None:
        waiting, self.inbox[segment] = self.inbox[segment], []
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        return torch.cat(waiting, dim=1)


class ExactStack(SharedStack):
    """Pending tokens go through a deeper segment together with the token that needs it.

    Every key and value is what the full model computes for the same tokens.
    """

    def __init__(self, executor: AbstractExecutor, exits: tuple[int, ...]) -> None:
        super().__init__(executor, exits)
        #: ``(first slot, [batch, n, width])`` of tokens that got to the end.
        self.finals: list[tuple[int, Tensor]] = []

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on (nothing may be pending)."""
        self.executor.truncate(length)
        self.filled = [min(own, length) for own in self.filled]
        self.finals = []

    def take_finals(self) -> Tensor:
        """See :class:`HostStack`."""
        kept = sorted(self.finals, key=lambda item: item[0])
        self.finals = []
        return torch.cat([hidden for _, hidden in kept], dim=1)

    def deepen(
        self, segment: int, hidden: Tensor, slot: int, rows: list[int], running: Tensor
    ) -> Tensor:
        """See :class:`HostStack`: one causal pass over the inbox and the newest token."""
        self.inbox[segment].append(hidden)
        done = self._pass(segment)
        if done.shape[1] > 1:
            self._hand_on(segment, done[:, :-1], slot + 1 - done.shape[1])
        newest = done[:, -1:]
        if segment == self.segments - 1 and self.keep_finals:
            self.finals.append((slot, newest))
        return newest

    def leave(
        self, segment: int, hidden: Tensor, slot: int, stopped: Tensor, rows: list[int]
    ) -> None:
        """See :class:`HostStack`: once nobody goes on."""
        if not rows:
            self.inbox[segment].append(hidden)

    def settle(self) -> None:
        """See :class:`HostStack`."""
        for segment in range(1, self.segments):
            if self.inbox[segment]:
                start = self.filled[segment]
                self._hand_on(segment, self._pass(segment), start)

    def _pass(self, segment: int) -> Tensor:
        hidden = self._take(segment)
        assert hidden is not None
        low, high = self.bounds[segment], self.bounds[segment + 1]
        start = self.filled[segment]
        self.filled[segment] = start + hidden.shape[1]
        return self.executor.run(low, high, hidden, start)

    def _hand_on(self, segment: int, hidden: Tensor, start: int) -> None:
        if segment < self.segments - 1:
            self.inbox[segment + 1].append(hidden)
        elif self.keep_finals:
            self.finals.append((start, hidden))


class PropagateStack(SharedStack):
    """Skipped layers get keys and values projected from the state the token stopped with.

    They are projected lazily, for all pending tokens at once, with the first token that needs
    the segment.
    """

    def take_finals(self) -> None:
        """See :class:`HostStack`: there are none."""

    def deepen(
        self, segment: int, hidden: Tensor, slot: int, rows: list[int], running: Tensor
    ) -> Tensor:
        """See :class:`HostStack`: rows that stopped keep their state."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        frozen = ~running if len(rows) < hidden.shape[0] else None
        waiting = self._take(segment)
        self.filled[segment] = slot + 1
        return self.executor.run(low, high, hidden, slot, frozen=frozen, waiting=waiting)

    def leave(
        self, segment: int, hidden: Tensor, slot: int, stopped: Tensor, rows: list[int]
    ) -> None:
        """See :class:`HostStack`: once nobody goes on, in front of every deeper segment."""
        if not rows:
            for deeper in range(segment, self.segments):
                self.inbox[deeper].append(hidden)

    def settle(self) -> None:
        """See :class:`HostStack`."""
        for segment in range(1, self.segments):
            self._fill(segment)

    def _fill(self, segment: int) -> None:
        hidden = self._take(segment)
        if hidden is not None:
            low, high = self.bounds[segment], self.bounds[segment + 1]
            self.executor.fill(low, high, hidden, self.filled[segment])
            self.filled[segment] += hidden.shape[1]
