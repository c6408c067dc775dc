"""Segments of a layer stack where every row of a batch has filled lengths of its own."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive._costs import Costs
from adaptive._executor import TokenExecutor
from adaptive._stack import HostStack
from adaptive._tokens import Tokens, ring_places


class RowStack(HostStack):
    """Rows that are finished pass no segment any more.

    Row ``r`` has the keys and values of ``filled[s, r]`` slots in segment ``s``, never more than
    in the segment before. The state of every token that waits is kept in a ring, one place per
    row and slot.

    Parameters
    ----------
    executor : TokenExecutor
        Already begun.
    exits : tuple of int
    batch : int
        Rows.
    most : int
        Slots of a row that may be pending.
    """

    def __init__(
        self, executor: TokenExecutor, exits: tuple[int, ...], *, batch: int, most: int
    ) -> None:
        super().__init__(executor, exits)
        self.executor: TokenExecutor = executor
        self.batch, self.most = batch, most
        self.filled: NDArray[np.int64] = np.zeros((self.segments, batch), dtype=np.int64)
        self._ring: Tensor | None = None
        self._last = ([-1], -1, self._tokens([0], 0))

    @property
    def pending(self) -> int:
        """See :class:`HostStack`."""
        return int((self.filled[0] - self.filled[-1]).max())

    def first(self, tokens: Tensor, slot: int, rows: list[int]) -> Tensor:
        """See :class:`HostStack`."""
        self.filled[0, rows] = slot + 1
        if len(rows) == self.batch:
            hidden = self.executor.embed(tokens[:, None], slot)
            return self.executor.run(0, self.bounds[1], hidden, slot)
        newest = self._newest(rows, slot)
        hidden = self.executor.embed_tokens(tokens[newest.rows], newest)
        done = self.executor.run_tokens(0, self.bounds[1], hidden, newest)
        return done.new_zeros(self.batch, done.shape[-1]).index_copy_(0, newest.rows, done)[:, None]

    def leave(
        self, segment: int, hidden: Tensor, slot: int, stopped: Tensor, rows: list[int]
    ) -> None:
        """See :class:`HostStack`."""
        kept = self._kept(hidden)[:, slot % self.most]
        kept.copy_(torch.where(stopped[:, None], hidden[:, 0], kept))

    def complete(self, ids: Tensor) -> None:
        """See :class:`HostStack`."""
        ended = np.flatnonzero(self.filled[0] < ids.shape[1] - 1)
        if not ended.size:
            return
        slots = self.filled[0, ended]
        tokens = Tokens(ended, slots, slots + 1, device=ids.device)
        hidden = self.executor.embed_tokens(ids[tokens.rows, tokens.slots], tokens)
        done = self.executor.run_tokens(0, self.bounds[1], hidden, tokens)
        self._kept(done)[tokens.rows, tokens.slots % self.most] = done
        self.filled[0, ended] = slots + 1

    def _begun(self, length: int) -> None:
        self.filled[:] = length

    def _newest(self, rows: list[int], slot: int) -> Tokens:
        """Newest tokens of rows; the segments of one token mostly ask for the same."""
        if self._last[:2] != (rows, slot):
            self._last = (rows, slot, self._tokens(rows, slot))
        return self._last[2]

    def _tokens(self, rows: list[int], slot: int) -> Tokens:
        of = np.asarray(rows)
        at = np.full_like(of, slot)
        return Tokens(of, at, at + 1, device=self.executor.readout.device)

    def _waiting(self, segment: int, rows: NDArray[np.int64], stops: NDArray[np.int64]) -> Tokens:
        """Tokens of ``rows`` from the segment's filled length up to ``stops``."""
        device = self.executor.readout.device
        return Tokens(rows, self.filled[segment, rows], stops, device=device)

    def _states(self, tokens: Tokens) -> Tensor:
        """States of waiting tokens, ``[n, width]``."""
        assert self._ring is not None
        return self._ring[tokens.rows, tokens.slots % self.most]

    def _kept(self, like: Tensor) -> Tensor:
        if self._ring is None:
            self._ring = like.new_zeros(self.batch, self.most, like.shape[-1])
        return self._ring


class ExactRowStack(RowStack):
    """``exact`` mode: where some rows need a segment, what waits in front of it may pass with them.

    Every token has to pass every layer sooner or later: of the rows that need the segment at once,
    of the others where that costs no more than it will in the largest pass. Rows that are finished
    are left out: nobody may ever ask for theirs.

    Parameters
    ----------
    executor, exits, batch, most
        See :class:`RowStack`.
    costs : Costs, optional
        Of passes on this machine; ``None`` takes everything along.
    """

    def __init__(
        self,
        executor: TokenExecutor,
        exits: tuple[int, ...],
        *,
        batch: int,
        most: int,
        costs: Costs | None = None,
    ) -> None:
        super().__init__(executor, exits, batch=batch, most=most)
        self._costs = costs
        self._finals: list[tuple[Tokens, Tensor]] = []
        self._start = 0

    def deepen(
        self, segment: int, hidden: Tensor, slot: int, rows: list[int], running: Tensor
    ) -> Tensor:
        """See :class:`HostStack`."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        filled, stops = self.filled[segment], self.filled[segment - 1]
        present, going = np.flatnonzero(self.filled[0] > slot), np.asarray(rows)
        needed = int((stops - filled)[going].sum())
        if self._pays_along(needed, int((stops - filled)[present].sum()) - needed):
            going = present
        starts = filled[going].copy()
        together = going.size == self.batch and (starts == starts[0]).all()
        if together and (stops == slot + 1).all():
            done = self._pass(segment, hidden, int(starts[0]), slot, running)
            self.filled[segment] = slot + 1
            return done
        newest = self._newest(rows, slot)
        states, tokens = hidden[newest.rows, 0], newest
        before = stops[going] - np.isin(going, rows)
        if (starts < before).any():
            behind = self._waiting(segment, going, before)
            states, tokens = torch.cat([self._states(behind), states]), behind + newest
        done = self.executor.run_tokens(low, high, states, tokens)
        self._hand_on(segment, tokens, done)
        self.filled[segment, going] = stops[going]
        return _with(hidden, newest, done[tokens.count - newest.count :])

    def _pays_along(self, needed: int, others: int) -> bool:
        """Whether to take ``others`` along in a pass of ``needed`` tokens."""
        if others == 0 or self._costs is None:
            return True
        whole, alone = (self._costs.of_layer(count) for count in (needed + others, needed))
        return whole - alone <= others * self._costs.least

    def _pass(self, segment: int, hidden: Tensor, start: int, slot: int, running: Tensor) -> Tensor:
        """Run slots ``start .. slot`` of all rows; the last one's state, ``[batch, 1, width]``."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        device, kept = hidden.device, self._kept(hidden)
        # rows that stopped before have gone on without the loop's knowing
        left = kept[:, slot % self.most]
        given = torch.where(running[:, None], hidden[:, 0], left)[:, None]
        if start < slot:
            waiting = ring_places(start, slot, places=self.most, device=device)
            given = torch.cat([kept[:, waiting], given], dim=1)
        done = self.executor.run(low, high, given, start)
        if segment < self.segments - 1:
            kept[:, ring_places(start, slot + 1, places=self.most, device=device)] = done
        elif self.keep_finals:
            every = np.arange(self.batch)
            begin, end = (np.full_like(every, place) for place in (start, slot + 1))
            self._finals.append((Tokens(every, begin, end, device=device), done.flatten(0, 1)))
        return done[:, -1:]

    def settle(self) -> None:
        """See :class:`HostStack`."""
        for segment in range(1, self.segments):
            owing = np.flatnonzero(self.filled[segment] < self.filled[segment - 1])
            if owing.size:
                stops = self.filled[segment - 1, owing]
                tokens = self._waiting(segment, owing, stops)
                low, high = self.bounds[segment], self.bounds[segment + 1]
                done = self.executor.run_tokens(low, high, self._states(tokens), tokens)
                self._hand_on(segment, tokens, done)
                self.filled[segment, owing] = stops

    def take_finals(self) -> Tensor:
        """See :class:`HostStack`; zero behind the end of a row that ended before the others."""
        first = self._finals[0][1]
        stop = int(self.filled[-1].max())
        kept = first.new_zeros(self.batch, stop - self._start, first.shape[-1])
        for tokens, states in self._finals:
            kept[tokens.rows, tokens.slots - self._start] = states
        self._finals = []
        return kept

    def _begun(self, length: int) -> None:
        super()._begun(length)
        self._start = length

    def _hand_on(self, segment: int, tokens: Tokens, states: Tensor) -> None:
        """Keep what came out of a segment: to wait for the next one, or as final."""
        if segment < self.segments - 1:
            self._kept(states)[tokens.rows, tokens.slots % self.most] = states
        elif self.keep_finals:
            self._finals.append((tokens, states))


class PropagateRowStack(RowStack):
    """``propagate`` mode: keys and values of waiting tokens come from the state they stopped with.

    They are projected when their own row needs the segment.
    """

    def deepen(
        self, segment: int, hidden: Tensor, slot: int, rows: list[int], running: Tensor
    ) -> Tensor:
        """See :class:`HostStack`."""
        low, high = self.bounds[segment], self.bounds[segment + 1]
        newest = self._newest(rows, slot)
        of = np.asarray(rows)
        waiting = None
        if (self.filled[segment, of] < slot).any():
            before = self._waiting(segment, of, np.full_like(of, slot))
            waiting = (self._states(before), before)
        self.filled[segment, of] = slot + 1
        if len(rows) == self.batch and waiting is None:
            return self.executor.run(low, high, hidden, slot)
        chosen = hidden[newest.rows, 0]
        done = self.executor.run_tokens(low, high, chosen, newest, waiting=waiting)
        return _with(hidden, newest, done)

    def settle(self) -> None:
        """See :class:`HostStack`."""
        for segment in range(1, self.segments):
            owing = np.flatnonzero(self.filled[segment] < self.filled[0])
            if owing.size:
                tokens = self._waiting(segment, owing, self.filled[0, owing])
                low, high = self.bounds[segment], self.bounds[segment + 1]
                self.executor.fill_tokens(low, high, self._states(tokens), tokens)
                self.filled[segment, owing] = self.filled[0, owing]

    def take_finals(self) -> None:
        """See :class:`HostStack`: there are none."""


def _with(hidden: Tensor, tokens: Tokens, states: Tensor) -> Tensor:
    """``hidden [batch, 1, width]`` with the states of these tokens' rows replaced."""
    if tokens.count == hidden.shape[0]:
        return states[:, None]
    return hidden[:, 0].index_copy(0, tokens.rows, states)[:, None]
