"""What a step in fixed shapes is cut into, and how a piece is carried out, compiled or not."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from adaptive.calibration import UnsupportedError

if TYPE_CHECKING:
    from adaptive._device_stack import DeviceStack
    from adaptive._families import Readout

#: Compiled forms that a piece may have; torch refuses more.
_FORMS = 64
#: Per model, of which every run has another executor but the same head, and kind of stack.
_forms: weakref.WeakKeyDictionary[
    Readout, dict[tuple[Hashable, ...], Callable[[DeviceStack], None]]
] = weakref.WeakKeyDictionary()
_count = itertools.count()


class Piece(NamedTuple):
    """Part of a token's way that needs no look at a value.

    Parameters
    ----------
    name : {"begin", "segment", "finish", "flush"}
    segment : int
        Which one, of ``"segment"``.
    alone : bool
        Whether the newest token passes it without a window of others.
    """

    name: Literal["begin", "segment", "finish", "flush"]
    segment: int = 0
    alone: bool = True


Perform = Callable[["DeviceStack", Piece], None]


def perform(stack: DeviceStack, piece: Piece) -> None:
    """Carry a piece out, operator by operator."""
    if piece.name == "segment":
        if not piece.alone:
            stack.look()
        stack.carry(piece.segment, alone=piece.alone)
        stack.ask(piece.segment)
    elif piece.name == "begin":
        stack.begin()
    elif piece.name == "finish":
        stack.finish()
    else:
        stack.flush()


def perform_compiled(stack: DeviceStack, piece: Piece) -> None:
    """Carry a piece out as one compiled function: what lies between the products is fused.

    So is the check behind a segment. Compiled when first needed, and again for another kind of
    model, policy or shapes.

    Raises
    ------
    UnsupportedError
        If it cannot be compiled.
    """
    try:
        _compiled(stack, piece)(stack)
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise UnsupportedError(
            "the policy's step cannot be compiled: a score or rule of your own may read a value "
            "on the host or branch on one, or the compiler's own tools are missing. Leave "
            "`compiled` out, or see what the docs ask of your own policies. The reason given: "
            f"{reason}"
        ) from error


def every(segments: int) -> list[Piece]:
    """All pieces of a step, in an order in which they may be carried out."""
    deeper = [
        Piece("segment", segment, alone)
        for segment in range(1, segments)
        for alone in (True, False)
    ]
    return [Piece("begin"), *deeper, Piece("finish"), Piece("flush")]


def _compiled(stack: DeviceStack, piece: Piece) -> Callable[[DeviceStack], None]:
    """Return a piece's compiled form, which it shares with other runs of this kind."""
    own = _forms.setdefault(stack.executor.readout, {})
    kind = (piece, *stack.kind)
    if kind not in own:

        def carried_out(stack: DeviceStack) -> None:
            perform(stack, piece)

        # What varies between calls of one code object is taken to vary ever after, widths of
        # weights too: every kind has a code object of its own, and only lengths vary.
        name = f"{piece.name}_{next(_count)}"
        carried_out.__code__ = carried_out.__code__.replace(co_name=name)
        settings: dict[str, Any] = {"fullgraph": True}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            settings["recompile_limit"] = _FORMS  # for scores and rules of one type that differ
        own[kind] = torch.compile(carried_out, **settings)
    return own[kind]
