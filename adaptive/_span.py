"""What the layers of one run share: slots, tables of the rotation, what queries may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from adaptive._reach import Reach
from adaptive._tokens import Layout


class Apart(NamedTuple):
    """Single tokens of a run: rows of all that are written, and how those with queries are laid."""

    rows: Tensor
    layout: Layout


class Window(NamedTuple):
    """Successive slots that only the device knows, for runs of one shape wherever they are.

    Parameters
    ----------
    slots : Tensor, int64 [n]
        Ascending; those below 0 hold nothing.
    tables, reach : dict
        See :class:`Span`.
    """

    slots: Tensor
    tables: dict[str | None, tuple[Tensor, Tensor]]
    reach: dict[int | None, Reach]


@dataclass(frozen=True)
class Span:
    """Tokens that one run covers, and what its layers share.

    Keys and values are written for all of them, queries asked for those behind the first ``late``:
    these, ``waiting`` and normalised without gain, have stopped. Tables and reach are found under a
    layer's ``rope`` and ``window``. Single tokens of some rows run as one row: ``apart`` then says
    where each belongs.
    """

    late: int
    tables: dict[str | None, tuple[Tensor, Tensor]]
    reach: dict[int | None, Reach]
    waiting: Tensor | None
    apart: Apart | None = None
