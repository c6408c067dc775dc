"""Several processes share the work of one calibration; every one of them gets the whole result.

They are those of torch's process group, as ``accelerate.PartialState()`` or ``Accelerator()``
starts it in a script under ``accelerate launch`` or ``torchrun``. Without one, everything here is
the identity. Every process calls the same functions with the same arguments.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from torch import distributed, nn

from adaptive.calibration import AdaptiveError

Value = TypeVar("Value")
Name = TypeVar("Name")


class ProcessesDifferError(AdaptiveError, RuntimeError):
    """Processes that share a calibration were given different models or data."""


def process() -> int:
    """Return the number of this process, 0 for the first or only one."""
    return distributed.get_rank() if _several() else 0


def processes() -> int:
    """Return how many processes share the work."""
    return distributed.get_world_size() if _several() else 1


def share(batches: Iterable[Value]) -> Iterator[Value]:
    """Yield this process's batches: every n-th, where n is the number of processes.

    Batches are formed before they are shared out, so what a batch holds, and with it every rounded
    digit of its results, does not depend on the number of processes.
    """
    return islice(batches, process(), None, processes())


def gathered(own: Mapping[Name, Value]) -> dict[Name, Value]:
    """Join the results of all processes, on every one of them."""
    if not _several():
        return dict(own)
    parts: list[Any] = [None] * processes()
    distributed.all_gather_object(parts, dict(own))
    return {name: value for part in parts for name, value in part.items()}


def from_first(compute: Callable[[], Value]) -> Value:
    """Compute on the first process and hand the result to all: for what is measured or booked.

    An error of the first process is raised on every process.
    """
    if not _several():
        return compute()
    outcome: list[Any] = [None]
    if process() == 0:
        try:
            outcome = [(compute(), None)]
        except Exception as raised:
            distributed.broadcast_object_list([(None, _portable(raised))])
            raise
    distributed.broadcast_object_list(outcome)
    value, error = outcome[0]
    if error is not None:
        raise error
    found: Value = value
    return found


def take_first(module: nn.Module) -> None:
    """Let every process hold the first one's weights, to the last digit."""
    if _several():
        module.load_state_dict(
            from_first(lambda: {name: value.cpu() for name, value in module.state_dict().items()})
        )


def require_equal(facts: Mapping[str, Any]) -> None:
    """Check that every process holds the same.

    Raises
    ------
    ProcessesDifferError
        On every process, naming what differs.
    """
    if not _several():
        return
    everywhere = gathered({process(): dict(facts)})
    differing = [
        name for name in facts if any(other[name] != facts[name] for other in everywhere.values())
    ]
    if differing:
        raise ProcessesDifferError(
            f"the {processes()} processes differ in {', '.join(differing)}: give each the same "
            "model, exits and dataset, in the same order; the units are shared out for you"
        )


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _portable(error: Exception) -> Exception:
    """Return the error if it can travel to another process, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
