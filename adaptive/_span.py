"""What the layers of one run share: slots, tables of the rotation, what queries may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from adaptive._tokens import Layout, Tokens


class Reach(NamedTuple):
    """What the queries of a run may see, for layers with the same window.

    Keys from slot ``low`` on; ``mask``, if there is one, is over these.
    """

    low: int
    mask: Tensor | None
    causal: bool


class Apart(NamedTuple):
    """Single tokens of a run: all that are written, and how those with queries are laid out."""

    written: Tokens
    layout: Layout
    stop: int


class Window(NamedTuple):
    """Successive slots that only the device knows, for runs of one shape wherever they are.

    Parameters
    ----------
    slots : Tensor, int64 [n]
        Ascending; those below 0 hold nothing.
    stop : int
        Keys below are read; more than any of ``slots``.
    tables, reach : dict
        See :class:`Span`.
    """

    slots: Tensor
    stop: int
    tables: dict[str | None, tuple[Tensor, Tensor]]
    reach: dict[int | None, Reach]


class Placed(NamedTuple):
    """Slots of a window that are written, int64 ``[n]``, and where the keys that are read end."""

    into: Tensor
    stop: int


@dataclass(frozen=True)
class Span:
    """Slots that one run covers, and what its layers share.

    Keys and values are written for ``first .. stop - 1``, queries asked for ``start .. stop - 1``;
    ``waiting``, normalised without gain, are the tokens in between that have stopped. Tables and
    reach are found under a layer's ``rope`` and ``window``. Single tokens of some rows run as one
    row, and a window's slots are tensors: ``place`` then says where each token belongs, and the
    three numbers count tokens.
    """

    first: int
    start: int
    stop: int
    tables: dict[str | None, tuple[Tensor, Tensor]]
    reach: dict[int | None, Reach]
    waiting: Tensor | None
    place: Apart | Placed | None = None
