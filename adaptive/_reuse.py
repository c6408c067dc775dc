"""Captured steps that outlive a call: the next call like it captures nothing."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from adaptive._device_stack import DeviceStack
from adaptive._executor import AbstractExecutor
from adaptive._exits import Exits
from adaptive._graphs import Capture
from adaptive.policies import Policy

#: Slots are laid out up to a multiple of this: texts of many lengths share one layout.
_GRAIN = 256


@dataclass(frozen=True)
class Plan:
    """What captured operators depend on, beside the weights and what is written in their tensors.

    Parameters
    ----------
    policy : Policy
        Its score and rule are compared as objects: what they hold is part of what was captured.
    exits : Exits
    exits_at : tuple of int
        Addresses of their parameters, which are others once they were moved and moved back.
    capture : {"step", "segments"}
    compiled : bool
    batch : int
        Rows.
    length : int
        Slots that are laid out.
    most : int
        Slots that may be pending.
    seed : int
        Of noise that a rule reads.
    head : tuple, optional
        Version of the head's weights: rows that are gathered from them are not gathered again.
    around : tuple
        How torch is set, of :func:`surroundings`.
    """

    policy: Policy
    exits: Exits
    exits_at: tuple[int, ...]
    capture: Capture
    compiled: bool
    batch: int
    length: int
    most: int
    seed: int
    head: tuple[tuple[int, int], ...] | None
    around: tuple[object, ...]

    def serves(self, other: Plan) -> bool:
        """Whether what was captured for this plan is right for another one."""
        own, asked = self.policy, other.policy
        return (
            (own.score is asked.score and own.rule is asked.rule and self.exits is other.exits)
            and (own.stages, own.mode, self.head) == (asked.stages, asked.mode, other.head)
            and (self.exits_at, self.around) == (other.exits_at, other.around)
            and (self.capture, self.compiled, self.batch, self.length, self.most, self.seed)
            == (other.capture, other.compiled, other.batch, other.length, other.most, other.seed)
        )


def surroundings(device: torch.device) -> tuple[object, ...]:
    """How torch is set where a call runs: inference mode, autocast, the device's current stream.

    Tensors of inference mode may not be changed outside, and on another stream nobody has waited
    for the last call to be done.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return torch.is_inference_mode_enabled(), cast, stream


#: One per model: the keys and values of another one would lie about unused.
_kept: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Plan, DeviceStack]] = (
    weakref.WeakKeyDictionary()
)


def keep(model: PreTrainedModel, plan: Plan, stack: DeviceStack) -> None:
    """Keep a stack whose run is over, with its keys and values, for the next call."""
    _kept[model] = plan, stack


def take(
    model: PreTrainedModel,
    plan: Plan | None,
    executor: AbstractExecutor,
    *,
    padding: Tensor | None,
    positions: Tensor,
) -> DeviceStack | None:
    """Take the stack that was kept, begun again, if it serves.

    What is kept is let go by any call, so that no two lots of keys and values lie about; while it
    is out nobody else can have it: another thread's call captures for itself.
    """
    before, stack = _kept.pop(model, (None, None))
    if plan is None or before is None or stack is None or not before.serves(plan):
        return None
    own = stack.executor
    serves = own.packed_as(executor) and own.begin_again(padding=padding, positions=positions)
    return stack if serves else None


def stretched(
    padding: Tensor | None, positions: Tensor, *, limit: int | None
) -> tuple[Tensor | None, Tensor]:
    """Stretch padding and positions ``[batch, n]`` to as many slots as are laid out for a text.

    The last position is repeated for slots that no text gets to. ``limit`` is the most slots.
    """
    length = positions.shape[1]
    room = -(-length // _GRAIN) * _GRAIN
    room = max(length, room if limit is None else min(room, limit))
    last = positions[:, -1:].expand(-1, room - length)
    if padding is not None:
        padding = F.pad(padding, (0, room - padding.shape[1]))
    return padding, torch.cat([positions, last], dim=1)
