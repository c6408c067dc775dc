"""How the layers of a run are stacked: who waits for whom, and how many, from measured costs."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from adaptive._costs import Costs, costs_of, pays_apart
from adaptive._device_stack import DeviceStack, ExactDeviceStack, PropagateDeviceStack
from adaptive._executor import AbstractExecutor, TokenExecutor
from adaptive._exits import Exits
from adaptive._graphs import Capture, runner_for
from adaptive._native import NativeExecutor
from adaptive._row_stack import ExactRowStack, PropagateRowStack
from adaptive._stack import AbstractStack, ExactStack, PropagateStack
from adaptive._tier import Tier
from adaptive.calibration import UnsupportedError
from adaptive.policies import Mode, Policy

#: Most slots an inbox holds by default where none is computed through the layers they wait for.
_MAX_PENDING = 32
#: Most drafts that are confirmed together.
_MAX_DRAFTS = 32


def needed_costs(
    model: PreTrainedModel, mode: Mode, *, max_pending: int | None, tier: Tier | None
) -> Costs | None:
    """Measure the model if its costs are to choose how many wait; before a run begins."""
    open_inbox = mode != "propagate" and max_pending is None
    return costs_of(model, tier=tier) if open_inbox else None


def goes_apart(model: PreTrainedModel, mode: Mode, *, rows: int, tier: Tier | None) -> bool:
    """Whether rows of a batch go their own ways: where that saves time; before a run begins.

    Never in ``verify`` mode, where all rows are cut back to the first wrong draft of any.
    """
    return rows > 1 and mode != "verify" and pays_apart(model, rows, tier=tier)


def inbox(mode: Mode, costs: Costs | None) -> int:
    """Slots that wait at most: enough for a pass in which a token takes as little as it can."""
    if mode == "verify":
        return _MAX_DRAFTS
    return _MAX_PENDING if mode == "propagate" or costs is None else costs.efficient


def stack_for(
    executor: AbstractExecutor,
    exits: Exits,
    mode: Mode,
    *,
    rows: int,
    most: int,
    apart: bool,
    costs: Costs | None = None,
) -> AbstractStack:
    """Let rows of a batch go their own ways, or stay together."""
    if not apart or not isinstance(executor, TokenExecutor):
        shared = PropagateStack if mode == "propagate" else ExactStack
        return shared(executor, exits.layers)
    if mode == "propagate":
        return PropagateRowStack(executor, exits.layers, batch=rows, most=most)
    return ExactRowStack(executor, exits.layers, batch=rows, most=most, costs=costs)


def device_stack_for(
    executor: AbstractExecutor,
    exits: Exits,
    policy: Policy,
    *,
    keys: Tensor,
    seed: int,
    most: int,
    capture: Capture,
    compiled: bool,
) -> DeviceStack:
    """Stack the layers so that a step has fixed shapes; one row per key.

    Raises
    ------
    UnsupportedError
        On the generic tier, without a GPU where one is needed.
    """
    reason = None
    if not isinstance(executor, NativeExecutor):
        reason = "the generic tier, whose layers decide on shapes of their own"
    elif _needs_cuda(capture, keys):
        reason = f"a model on {keys.device.type!r}: CUDA graphs are for CUDA devices"
    if reason is not None:
        raise UnsupportedError(f"`capture={capture!r}` is not possible with {reason}")
    kind = PropagateDeviceStack if policy.mode == "propagate" else ExactDeviceStack
    assert isinstance(executor, NativeExecutor)
    return kind(
        executor,
        exits,
        policy,
        batch=len(keys),
        # in `verify` mode the loop settles when there are `most` drafts, to judge them
        most=most + (policy.mode == "verify"),
        keys=keys,
        seed=seed,
        runner=runner_for(capture, compiled=compiled),
    )


def _needs_cuda(capture: Capture, keys: Tensor) -> bool:
    return capture != "none" and keys.device.type != "cuda"
