"""Segments of a layer stack, and what stopped tokens still owe to the deeper ones."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from adaptive._executor import AbstractExecutor


class AbstractStack(abc.ABC):
    """Layers cut into segments by the exits, with one filled length and one inbox per segment.

    ``filled[s]`` counts the slots whose keys and values segment ``s`` has; it never increases
    with ``s``. All rows share the lengths: a row that stopped early is carried along when another
    row goes deeper, which in ``exact`` mode changes when it is settled and nothing else.

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
        self.filled = [0] * self.segments
        self.inbox: list[list[Tensor]] = [[] for _ in range(self.segments)]
        #: Final hidden states, ``(first slot, [batch, n, width])``, of tokens that got there; kept
        #: only where somebody reads them.
        self.finals: list[tuple[int, Tensor]] = []
        self.keep_finals = False

    def prefill(self, ids: Tensor, *, chunk: int = 1024) -> Tensor:
        """Run a prompt ``[batch, n]`` at full depth; the last slot's final hidden state."""
        for start in range(0, ids.shape[1], chunk):
            tokens = ids[:, start : start + chunk]
            hidden = self.executor.embed(tokens, start)
            hidden = self.executor.run(0, self.executor.layers, hidden, start)
        self.filled = [ids.shape[1]] * self.segments
        return hidden[:, -1]

    def first(self, tokens: Tensor, slot: int) -> Tensor:
        """Embed one token per row and run segment 0; ``[batch, 1, width]``."""
        hidden = self.executor.embed(tokens[:, None], slot)
        hidden = self.executor.run(0, self.bounds[1], hidden, slot)
        self.filled[0] = slot + 1
        return hidden

    @property
    def pending(self) -> int:
        """Number of slots that the last segment has not seen."""
        return self.filled[0] - self.filled[-1]

    @abc.abstractmethod
    def deepen(self, segment: int, hidden: Tensor, slot: int, *, running: Tensor) -> Tensor:
        """Run ``segment`` for the newest token, settling what the segment must know before it.

        ``running`` (bool ``[batch]``) marks rows that have not stopped.
        """

    @abc.abstractmethod
    def stop(self, segment: int, hidden: Tensor) -> None:
        """Leave the newest token, ``[batch, 1, width]``, in front of ``segment``."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Pay everything that is owed: afterwards every segment has every slot."""

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on (nothing may be pending)."""
        self.executor.truncate(length)
        self.filled = [min(own, length) for own in self.filled]
        self.finals = []

    def take_finals(self) -> Tensor:
        """Hand over the kept final states in slot order, ``[batch, n, width]``, and forget them."""
        kept = sorted(self.finals, key=lambda item: item[0])
        self.finals = []
        return torch.cat([hidden for _, hidden in kept], dim=1)

    def _take(self, segment: int) -> Tensor | None:
        waiting, self.inbox[segment] = self.inbox[segment], []
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        return torch.cat(waiting, dim=1)


class ExactStack(AbstractStack):
    """Pending tokens go through a deeper segment together with the token that needs it.

    Every key and value is what the full model computes for the same tokens.
    """

    def deepen(self, segment: int, hidden: Tensor, slot: int, *, running: Tensor) -> Tensor:
        """See :class:`AbstractStack`: one causal pass over the inbox and the newest token."""
        self.inbox[segment].append(hidden)
        done = self._pass(segment)
        if done.shape[1] > 1:
            self._hand_on(segment, done[:, :-1], slot + 1 - done.shape[1])
        newest = done[:, -1:]
        if segment == self.segments - 1 and self.keep_finals:
            self.finals.append((slot, newest))
        return newest

    def stop(self, segment: int, hidden: Tensor) -> None:
        """See :class:`AbstractStack`."""
        self.inbox[segment].append(hidden)

    def settle(self) -> None:
        """See :class:`AbstractStack`."""
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


class PropagateStack(AbstractStack):
    """Skipped layers get keys and values projected from the state the token stopped with.

    They are projected lazily, for all pending tokens at once, with the first token that needs
    the segment.
    """

    def deepen(self, segment: int, hidden: Tensor, slot: int, *, running: Tensor) -> Tensor:
        """See :class:`AbstractStack`: rows that stopped keep their state."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        frozen = None if hidden.shape[0] == 1 else ~running
        waiting = self._take(segment)
        self.filled[segment] = slot + 1
        return self.executor.run(low, high, hidden, slot, frozen=frozen, waiting=waiting)

    def stop(self, segment: int, hidden: Tensor) -> None:
        """See :class:`AbstractStack`: every deeper segment will need the state."""
        for deeper in range(segment, self.segments):
            self.inbox[deeper].append(hidden)

    def settle(self) -> None:
        """See :class:`AbstractStack`."""
        for segment in range(1, self.segments):
            self._fill(segment)

    def _fill(self, segment: int) -> None:
        hidden = self._take(segment)
        if hidden is not None:
            low, high = self.bounds[segment], self.bounds[segment + 1]
            self.executor.fill(low, high, hidden, self.filled[segment])
            self.filled[segment] += hidden.shape[1]
