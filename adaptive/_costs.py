"""What layers and head take for n tokens on this machine: measured once, in about a second."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from transformers import PreTrainedModel

from adaptive._device import finish
from adaptive._executor import AbstractExecutor, TokenExecutor
from adaptive._families._rope import room_for
from adaptive._tier import Tier, executor_for
from adaptive._tokens import Tokens

#: Numbers of tokens that are timed.
_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SECONDS = 1.0
#: The table ends here if even one layer takes long.
_ENOUGH = 16
_ROUNDS = 5
#: A pass that takes at most this much more per token than the best one is as good.
_SLACK = 1.05
_BEFORE = 8
#: Layers that are run to compare rows apart with rows together.
_SPAN = 8
#: Rows go apart where half of them take less than this part of what all take: the loop around
#: them has more to do then.
_WORTH = 0.9
_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], Costs]] = (
    weakref.WeakKeyDictionary()
)
_shares: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], float]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Costs:
    """Seconds that one layer and the head take for several tokens at once.

    Parameters
    ----------
    tokens : tuple of int
        Ascending from 1.
    layer, head : tuple of float
        For that many tokens; may be in any unit of time.
    """

    tokens: tuple[int, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]

    def of_layer(self, tokens: float) -> float:
        """Time of one layer, interpolated; beyond the table as the last piece goes on."""
        return _at(self.tokens, self.layer, tokens)

    def of_head(self, tokens: float) -> float:
        """Time of the head, the same way."""
        return _at(self.tokens, self.head, tokens)

    @cached_property
    def least(self) -> float:
        """Time of one layer for a token of the pass in which a token takes least."""
        return float(np.divide(self.layer, self.tokens).min())

    @property
    def efficient(self) -> int:
        """Fewest tokens of a pass at which a token takes hardly less than in a larger one."""
        each = np.divide(self.layer, self.tokens)
        return self.tokens[int(np.argmax(each <= _SLACK * each.min()))]


def _at(tokens: tuple[int, ...], seconds: tuple[float, ...], count: float) -> float:
    if count <= tokens[-1] or len(tokens) == 1:
        return float(np.interp(count, tokens, seconds))
    slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
    return seconds[-1] + max(slope, 0.0) * (count - tokens[-1])


def costs_of(model: PreTrainedModel, *, tier: Tier | None = None) -> Costs:
    """Measure a model on this machine, or say what was measured before in this process.

    Parameters
    ----------
    model : PreTrainedModel
    tier : {"native", "generic"}, optional

    Returns
    -------
    Costs
        Of one row at short context. They decide how many tokens wait for each other, so time
        depends on them and tokens never do.
    """
    executor = executor_for(model, tier=tier)
    key = _place(executor, model)
    found = _known.setdefault(model, {})
    if key not in found:
        room = room_for(model, _BEFORE + _TOKENS[-1])
        found[key] = measure(executor, model.device, room=room)
    return found[key]


def pays_apart(model: PreTrainedModel, rows: int, *, tier: Tier | None = None) -> bool:
    """Whether layers on half of the rows, picked out one by one, take clearly less than on all.

    Where launching operators is what takes the time, they do not: a pass takes as long for few
    rows as for all, and picking adds operators. Measured once per model, process and number of
    rows, in a few passes.
    """
    executor = executor_for(model, tier=tier)
    if not isinstance(executor, TokenExecutor) or room_for(model, _BEFORE + 1) <= _BEFORE:
        return False
    key = (rows, *_place(executor, model))
    found = _shares.setdefault(model, {})
    if key not in found:
        found[key] = share_of_half(executor, model.device, rows=rows)
    return found[key] < _WORTH


@torch.no_grad()
def share_of_half(executor: TokenExecutor, device: torch.device, *, rows: int) -> float:
    """Time of layers on half of the rows, by themselves, over that on all; before ``begin``."""
    length = _BEFORE + 1
    positions = torch.arange(length, device=device)[None].expand(rows, -1)
    executor.begin(batch_size=rows, max_length=length, padding=None, positions=positions)
    try:
        ids = torch.ones(rows, length, dtype=torch.int64, device=device)
        hidden = executor.embed(ids, 0)
        executor.run(0, executor.layers, hidden[:, :_BEFORE], 0)
        newest, half = hidden[:, _BEFORE:], np.arange(rows // 2)
        places = np.full_like(half, _BEFORE)
        picked = Tokens(half, places, places + 1, device=device)
        span = min(executor.layers, _SPAN)
        whole = _fastest(executor, partial(executor.run, 0, span, newest, _BEFORE))
        states = newest[: len(half), 0]
        apart = _fastest(executor, partial(executor.run_tokens, 0, span, states, picked))
    finally:
        executor.end()
    return apart / whole


def _place(executor: AbstractExecutor, model: PreTrainedModel) -> tuple[object, ...]:
    """Return what times depend on beside the model."""
    return type(executor), model.device, model.dtype, torch.get_num_threads()


@torch.no_grad()
def measure(
    executor: AbstractExecutor, device: torch.device, *, room: int = _BEFORE + _TOKENS[-1]
) -> Costs:
    """Time an executor that has not begun a run; takes about a second, for large models a few.

    ``room`` is the number of slots that may be used. Where there are too few to time anything,
    texts are so short that any table will do.
    """
    counts = tuple(count for count in _TOKENS if count <= room - _BEFORE)
    if not counts:
        return Costs((1,), (1.0,), (1.0,))
    length = _BEFORE + counts[-1]
    positions = torch.arange(length, device=device)[None]
    executor.begin(batch_size=1, max_length=length, padding=None, positions=positions)
    try:
        hidden = executor.embed(torch.ones(1, length, dtype=torch.int64, device=device), 0)
        executor.run(0, executor.layers, hidden[:, :_BEFORE], 0)
        states = hidden[:, _BEFORE:]
        span = _layers_for(executor, states[:, :1])
        layer, head = [], []
        began = time.perf_counter()
        for count in counts:
            if count > _ENOUGH and time.perf_counter() - began > 2 * _SECONDS:
                break
            given = states[:, :count]
            layer.append(_fastest(executor, partial(executor.run, 0, span, given, _BEFORE)) / span)
            head.append(_fastest(executor, partial(executor.readout, given)))
    finally:
        executor.end()
    return Costs(counts[: len(layer)], _rising(layer), _rising(head))


def _rising(seconds: list[float]) -> tuple[float, ...]:
    """Take noise out: a smaller pass could be filled up to a larger one."""
    return tuple(np.minimum.accumulate(seconds[::-1])[::-1].tolist())


def _layers_for(executor: AbstractExecutor, state: torch.Tensor) -> int:
    """Layers that are run per timing: all, so that weights come from where they lie, or fewer."""
    one = _fastest(executor, partial(executor.run, 0, 1, state, _BEFORE))
    affordable = _SECONDS / (one * sum(_TOKENS) / 2)
    return max(1, min(executor.layers, int(affordable)))


def _fastest(executor: AbstractExecutor, work: Callable[[], object]) -> float:
    """Least seconds of a few calls, fewer if they are long; the first is not counted."""
    best, spent = math.inf, 0.0
    for turn in range(_ROUNDS + 1):
        executor.truncate(_BEFORE)
        seconds = seconds_of(work, executor.readout.device)
        spent += seconds
        if turn > 0 or seconds > _SECONDS / len(_TOKENS):
            best = min(best, seconds)
        if spent > _SECONDS / len(_TOKENS) / 2 and best < math.inf:
            break
    return best


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a piece of work takes.

    On a CPU the process's own time is taken, which other processes disturb less.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    finish(device)
    start = clock()
    work()
    finish(device)
    return clock() - start
