"""Segments of a layer stack on tensors of fixed shapes: the host reads nothing inside a token."""

from __future__ import annotations

import abc
from collections.abc import Hashable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptive._exits import Exits
from adaptive._native import NativeExecutor
from adaptive._pieces import Perform, every
from adaptive._stack import AbstractStack
from adaptive.policies import Policy, State, keyed_noise

if TYPE_CHECKING:
    from adaptive._graphs import AbstractRunner

#: Keys are read up to a multiple of this many slots, and of a quarter of the text's power of two.
_BUCKET = 256


class DeviceStack(AbstractStack):
    """All rows share filled lengths, as in a ``SharedStack``; how long they are, the device knows.

    A token's way is cut into pieces that a CUDA graph can hold: ``begin``; for every deeper segment
    ``carry``, in one of two shapes, and ``ask``; ``finish``; ``flush``. They take and return no
    tensors, read and write such as stay in their place, and never ask for a value. One thing is
    made anew: ``near``, by ``begin``, for the pieces after it. Who runs them
    looks at flags: ``going[s]`` says whether any row goes on to segment ``s``, ``alone[s]`` and
    ``crowded[s]`` in which shape it does, ``overdue`` whether no more slots may wait. ``way[s]``
    says the first three in one number: 0, 1 or 2.

    A piece may be compiled. What changes from token to token is then in tensors, not in numbers
    of Python; ``stop`` is one and seldom changes.

    If nothing waits in front of a segment, the newest token passes it alone. Else a window of fixed
    size does, the newest slot and ``most`` before it: a few tokens more cost next to nothing where
    reading the weights is what takes the time. What is not pending is written to a slot that
    nobody reads.

    Parameters
    ----------
    executor : NativeExecutor
        Already begun.
    exits : Exits
    policy : Policy
        Asked at its stages; layers in between are one segment.
    batch : int
        Rows.
    most : int
        Slots that may be pending; as many as that are settled at the end of a step.
    keys : Tensor, int64 [batch]
        Key of each row's unit, for rules that read noise.
    seed : int
        Seed of that noise.
    runner : AbstractRunner
        How pieces are run.
    """

    #: Queries of a window, counted from its end; ``None`` for all.
    _queries: int | None = None

    def __init__(
        self,
        executor: NativeExecutor,
        exits: Exits,
        policy: Policy,
        *,
        batch: int,
        most: int,
        keys: Tensor,
        seed: int,
        runner: AbstractRunner,
    ) -> None:
        super().__init__(executor, tuple(exits.layers[stage] for stage in policy.stages))
        self.executor: NativeExecutor = executor
        self.batch, self.most = batch, most
        self._exits, self._policy = exits, policy
        self._keys, self._seed = keys.clone(), seed
        self._runner = runner
        #: Whether a row that stops has been read already, wherever it stops.
        self._reads_logits = all(
            {"logits", "answer"} & policy.needs_at(stage) for stage in policy.stages
        )
        self._laid_out = False
        self._at = -1
        self._pending: int | None = 0
        #: Keys below this slot are read.
        self.stop = 0

    def prefill(self, ids: Tensor, *, chunk: int | None = None) -> Tensor:
        """See :class:`AbstractStack`."""
        last = super().prefill(ids, chunk=chunk)
        if not self._laid_out:
            self._allocate(last)
            self._laid_out = True
        self._reset()
        return last

    def _begun(self, length: int) -> None:
        self._origin, self._at = length, length - 1

    def _allocate(self, like: Tensor) -> None:
        """Lay down every tensor that lives from one piece to another; ``like [batch, width]``."""
        batch, width = like.shape
        device = like.device
        self.overdue = torch.zeros((), dtype=torch.bool, device=device)
        # of segment 0 too, where nobody looks: then the others are at their own numbers
        self.going, self.alone, self.crowded = (
            [torch.zeros_like(self.overdue) for _ in range(self.segments)] for _ in range(3)
        )
        self.way = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(self.segments)]
        self.slot, self.origin = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.filled = torch.zeros(self.segments, dtype=torch.int64, device=device)
        self.newest = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.running = torch.ones(batch, dtype=torch.bool, device=device)
        self.closed = torch.zeros_like(self.overdue)
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.stages = torch.zeros(batch, dtype=torch.int64, device=device)
        self.scores = torch.zeros(batch, device=device)
        self.hidden = like.new_zeros(batch, 1, width)
        self.states, self.previous = (like.new_zeros(batch, width) for _ in range(2))
        self.ring = like.new_zeros(self._rings, batch, self.most + 1, width)
        self.logits = self.executor.readout.empty(batch)
        self.state = self._policy.init(batch, device=device)
        self._behind = torch.arange(-self.most, 1, device=device)
        self._finals: Tensor | None = None
        if self.keep_finals and self._settles:
            # of every slot, and one for those behind: another run may begin elsewhere
            self._finals = like.new_zeros(batch, self.executor.void + 1, width)

    def _reset(self) -> None:
        """Say that the prompt is there and nothing else has happened."""
        self.slot.fill_(self._at)
        self.origin.fill_(self._origin)
        self.filled.fill_(self._origin)
        self.closed.fill_(False)
        self._remember(self._policy.init(self.batch, device=self.slot.device))
        self._pending, self.stop = 0, 0

    def go_on_with(self, keys: Tensor) -> None:
        """Serve other units, int64 ``[batch]``, from the next prompt on."""
        self._keys.copy_(keys)

    @cached_property
    def kind(self) -> tuple[Hashable, ...]:
        """What runs have in common that differ in lengths and in the policy's numbers."""
        policy = self._policy
        parts = type(policy.score), type(policy.rule), policy.stages
        return type(self), self.batch, self.most, self.keep_finals, *parts

    @property
    @abc.abstractmethod
    def _rings(self) -> int:
        """Number of states that are kept of a token that waits."""

    @property
    @abc.abstractmethod
    def _settles(self) -> bool:
        """Whether waiting tokens get to the end."""

    @property
    def pending(self) -> int:
        """See :class:`AbstractStack`: read from the device if the runner does not know."""
        if self._pending is None:
            self._pending = int(self.slot + 1 - self.filled[-1])
        return self._pending

    def step(self, ids: Tensor, active: Tensor) -> None:
        """Take the newest token of every row as deep as the policy wants.

        ``stages``, ``scores`` and ``logits`` then say where it stopped and what it is read as.

        Parameters
        ----------
        ids : Tensor, int64 [batch, max_length]
            The text.
        active : Tensor, bool [batch]
            Rows whose token counts.
        """
        self._at += 1
        self.newest.copy_(ids[:, self._at : self._at + 1])
        self.active.copy_(active)
        self.stop = max(self.stop, self._bucket(self._at + 1))  # so windows of a bucket stay
        self._pending = self._runner.run(self)

    def close(self) -> None:
        """Take every token to full depth from here on."""
        self.closed.fill_(True)

    def _bucket(self, length: int) -> int:
        """Where to stop reading keys: the same for many lengths."""
        grain = max(_BUCKET, 2 ** (length.bit_length() - 3))
        return min(-(-length // grain) * grain, self.executor.void)

    def begin(self) -> None:
        """Embed the newest token, run segment 0, ask for the first time."""
        self.slot.add_(1)
        self.near = self.executor.window(self.slot, queries=1, stop=self.stop)
        hidden = self.executor.embed_window(self.newest, self.near)
        hidden = self.executor.run_window(0, self.bounds[1], hidden, self.near, self.slot)
        self.hidden.copy_(hidden)
        self.states.copy_(hidden[:, 0])
        self.running.copy_(self.active)
        self.position.copy_((self.slot - self.origin + 1).expand(self.batch))
        self.stages.fill_(len(self._exits.layers))
        self.scores.fill_(float("nan"))
        self.ask(0)

    def look(self) -> None:
        """Prepare the window that ends at the newest slot."""
        self._slots = self.slot + self._behind
        self._order = self._slots % (self.most + 1)
        queries = self._queries or self.most + 1
        self._window = self.executor.window(self._slots, queries=queries, stop=self.stop)

    def carry(self, segment: int, *, alone: bool) -> None:
        """Run ``segment`` for the rows that go on."""
        if alone:
            self._carry_alone(segment)
        else:
            self._carry_window(segment)

    def _carry_alone(self, segment: int) -> None:
        low, high = self.bounds[segment], self.bounds[segment + 1]
        frozen = self._frozen()
        self.hidden.copy_(
            self.executor.run_window(low, high, self.hidden, self.near, self.slot, frozen=frozen)
        )
        self.filled[segment : segment + 1].copy_(self.slot + 1)

    def ask(self, segment: int) -> None:
        """Ask the policy behind a segment; behind the last one, read the rows that got there."""
        if segment == self.segments - 1:
            if self._reads_logits:
                self._read(self.running, self.executor.readout(self.hidden[:, 0]))
            return
        policy, exit, here = self._policy, self._policy.stages[segment], self.hidden[:, 0]
        features = self._exits.features(
            policy.needs_at(exit),
            exit,
            here,
            previous=self.previous if segment else None,
            position=self.position,
            readout=self.executor.readout,
        )
        noise = None
        if "noise" in policy.needs:
            noise = keyed_noise(self._keys, self.position, seed=self._seed)
        features = replace(features, noise=noise, running=self.running)
        stop, score, state = policy.update(features, self.state)
        self._remember(state)
        asked = self.running & ~self.closed
        stop = stop & asked
        self.scores.copy_(torch.where(asked, score.float(), self.scores))
        self.stages.masked_fill_(stop, exit)
        translated = self._exits.translate(exit, here)
        self.states.copy_(torch.where(stop[:, None], translated, self.states))
        if self._reads_logits and features.logits is not None:
            self._read(stop, features.logits)
        self.running.logical_and_(~stop)
        self.previous.copy_(here)
        self._asked(segment)
        deeper = segment + 1
        going = self.running.any()
        waiting = self.slot[0] > self.filled[deeper]
        self.going[deeper].copy_(going)
        self.crowded[deeper].copy_(going & waiting)
        self.alone[deeper].copy_(going & ~waiting)
        self.way[deeper].copy_(going.to(torch.int64) + (going & waiting))

    def finish(self) -> None:
        """Read every row where it stopped; the policy's state is that behind the token."""
        self.states.copy_(torch.where(self.running[:, None], self.hidden[:, 0], self.states))
        if not self._reads_logits:
            self.logits.copy_(self.executor.readout(self.states))
        self._remember(self._policy.advance(self.state))
        self._leave()
        self.overdue.copy_((self.slot + 1 - self.filled[-1:] >= self.most)[0])

    def flush(self) -> None:
        """Pay what every segment is owed."""
        self.look()
        for segment in range(1, self.segments):
            self._pay(segment)

    def settle(self) -> None:
        """See :class:`AbstractStack`."""
        if self.pending and self._policy.mode == "verify":
            self._runner.settle(self)
        elif self.pending:
            self.flush()  # once at the end, which no capture is worth
        self._pending = 0
        self.executor.reached(0, self.executor.layers, self._at + 1)

    def rehearse(self, perform: Perform) -> None:
        """Run every piece once, and put everything back: kernels are loaded, nothing has changed.

        Keys and values that are written stay; they are written again before they are read.
        """
        kept = [
            *(*self.going, *self.alone, *self.crowded, *self.way, self.overdue),
            *(self.slot, self.filled, self.running, self.position),
            *(self.stages, self.scores, self.hidden, self.states, self.previous, self.ring),
            *(self.logits, *self.state.values()),
        ]
        before = [value.clone() for value in kept]
        for piece in every(self.segments):
            perform(self, piece)
        for value, old in zip(kept, before, strict=True):
            value.copy_(old)

    def _read(self, rows: Tensor, logits: Tensor) -> None:
        self.logits.copy_(torch.where(rows[:, None], logits, self.logits))

    def _remember(self, state: State) -> None:
        """Write a policy's state where it is read from."""
        old = tuple(self.state.values())
        new = {key: value for key, value in state.items() if value is not self.state[key]}
        for key, value in new.items():
            if any(value is other for other in old):  # one entry has become another's old value
                new[key] = value.clone()
        for key, value in new.items():
            self.state[key].copy_(value)

    def _owed(self, segment: int) -> tuple[Tensor, Tensor]:
        """Which slots of the window the segment has not seen, bool ``[n]``; it now has."""
        pending = self._slots >= self.filled[segment]
        self.filled[segment : segment + 1].copy_(self.slot + 1)
        return pending, torch.where(pending, self._slots, self.executor.void)

    def _newest(self) -> Tensor:
        """Where the newest slot's states are kept, int64 ``[1]``."""
        return self.slot % (self.most + 1)

    @abc.abstractmethod
    def _frozen(self) -> Tensor | None:
        """Rows that keep their state when others go deeper, bool ``[batch]``."""

    @abc.abstractmethod
    def _asked(self, segment: int) -> None:
        """Keep what is needed of a token that may stop behind a segment."""

    @abc.abstractmethod
    def _carry_window(self, segment: int) -> None:
        """Run a segment for the newest token, and what the segment must know before."""

    @abc.abstractmethod
    def _leave(self) -> None:
        """Keep what is needed of a token that is finished."""

    @abc.abstractmethod
    def _pay(self, segment: int) -> None:
        """Give a segment everything it is owed."""


class ExactDeviceStack(DeviceStack):
    """``exact`` mode: the window passes every segment that any token needs, layer for layer.

    The ring keeps, for every slot of the window, its state in front of every segment it got to.
    """

    @property
    def _rings(self) -> int:
        return self.segments - 1

    @property
    def _settles(self) -> bool:
        return True

    def _begun(self, length: int) -> None:
        super()._begun(length)
        self._taken = length

    def take_finals(self) -> Tensor:
        """See :class:`AbstractStack`."""
        assert self._finals is not None
        first, self._taken = self._taken, self._at + 1
        return self._finals[:, first - self._origin : self._taken - self._origin]

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on (nothing may be pending)."""
        self.executor.truncate(length)
        self._at = length - 1
        self._taken = min(self._taken, length)
        self.slot.fill_(self._at)
        self.filled.clamp_(max=length)

    def recall(self, state: State) -> None:
        """Go back to a state that the policy was in."""
        self._remember(state)

    def _frozen(self) -> None:
        """None: rows that stopped are settled along with the others."""

    def _asked(self, segment: int) -> None:
        self.ring[segment].index_copy_(1, self._newest(), self.hidden)

    def _carry_alone(self, segment: int) -> None:
        super()._carry_alone(segment)
        if segment == self.segments - 1 and self._finals is not None:
            self._finals.index_copy_(1, self.slot - self.origin, self.hidden)

    def _carry_window(self, segment: int) -> None:
        self.hidden.copy_(self._pass(segment)[:, -1:])

    def _leave(self) -> None:
        return

    def _pay(self, segment: int) -> None:
        self._pass(segment)

    def _pass(self, segment: int) -> Tensor:
        """Run a segment over the window, ``[batch, n, width]``."""
        pending, into = self._owed(segment)
        given = self.ring[segment - 1].index_select(1, self._order)
        low, high = self.bounds[segment], self.bounds[segment + 1]
        done = self.executor.run_window(low, high, given, self._window, into)
        if segment < self.segments - 1:
            kept = self.ring[segment].index_select(1, self._order)
            ahead = torch.where(pending[None, :, None], done, kept)
            self.ring[segment].index_copy_(1, self._order, ahead)
        elif self._finals is not None:
            self._finals.index_copy_(1, into - self.origin, done)
        return done


class PropagateDeviceStack(DeviceStack):
    """``propagate`` mode: waiting tokens join the key and value products of the newest token.

    The ring keeps the state that every slot of the window ended with.
    """

    _queries = 1

    @property
    def _rings(self) -> int:
        return 1

    @property
    def _settles(self) -> bool:
        return False

    def take_finals(self) -> None:
        """See :class:`AbstractStack`: there are none."""

    def _frozen(self) -> Tensor | None:
        return ~self.running if self.batch > 1 else None

    def _asked(self, segment: int) -> None:
        return

    def _carry_window(self, segment: int) -> None:
        _, into = self._owed(segment)
        done = self.executor.run_window(
            self.bounds[segment],
            self.bounds[segment + 1],
            self.hidden,
            self._window,
            into,
            frozen=self._frozen(),
            waiting=self.ring[0].index_select(1, self._order[:-1]),
        )
        self.hidden.copy_(done)

    def _leave(self) -> None:
        self.ring[0].index_copy_(1, self._newest(), self.hidden)

    def _pay(self, segment: int) -> None:
        _, into = self._owed(segment)
        states = self.ring[0].index_select(1, self._order)
        low, high = self.bounds[segment], self.bounds[segment + 1]
        self.executor.fill_window(low, high, states, self._window, into)
