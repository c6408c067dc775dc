"""How the layers of a run are stacked: who waits for whom, and how many, from measured costs."""

from __future__ import annotations

from transformers import PreTrainedModel

from adaptive._costs import Costs, costs_of, pays_apart
from adaptive._executor import AbstractExecutor, TokenExecutor
from adaptive._exits import Exits
from adaptive._row_stack import ExactRowStack, PropagateRowStack
from adaptive._stack import AbstractStack, ExactStack, PropagateStack
from adaptive._tier import Tier
from adaptive.policies import Mode

#: Most slots an inbox holds by default where none is computed through the layers they wait for.
_MAX_PENDING = 32
#: Most drafts that are confirmed together.
_MAX_DRAFTS = 32


def needed_costs(
    model: PreTrainedModel,
    executor: AbstractExecutor,
    mode: Mode,
    *,
    rows: int,
    max_pending: int | None,
    tier: Tier | None,
) -> Costs | None:
    """Measure the model if something is to be chosen by it; before ``executor`` begins."""
    may_go_apart = rows > 1 and mode != "verify" and isinstance(executor, TokenExecutor)
    inbox_is_open = mode != "propagate" and max_pending is None
    return costs_of(model, tier=tier) if may_go_apart or inbox_is_open else None


def inbox(mode: Mode, costs: Costs | None) -> int:
    """Slots that wait at most: enough for a pass in which a token takes as little as it can."""
    if mode == "verify":
        return _MAX_DRAFTS
    return _MAX_PENDING if mode == "propagate" or costs is None else costs.efficient


def stack_for(
    executor: AbstractExecutor,
    exits: Exits,
    mode: Mode,
    costs: Costs | None,
    *,
    rows: int,
    most: int,
) -> AbstractStack:
    """Let rows of a batch go their own ways where that saves time, else stay together.

    Together in ``verify`` mode, where all rows are cut back to the first wrong draft of any.
    """
    apart = rows > 1 and mode != "verify" and costs is not None and pays_apart(costs, rows)
    if not apart or not isinstance(executor, TokenExecutor):
        shared = PropagateStack if mode == "propagate" else ExactStack
        return shared(executor, exits.layers)
    if mode == "propagate":
        return PropagateRowStack(executor, exits.layers, batch=rows, most=most)
    return ExactRowStack(executor, exits.layers, batch=rows, most=most, efficient=most)
