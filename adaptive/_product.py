"""Products of few states with large weights, in the form that reads the weights once on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Above this many rows ``F.linear`` is as fast.
_MOST = 64


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, formed transposed where that takes less time.

    Parameters
    ----------
    states : Tensor [..., width]
    weight : Tensor [rows, width]
    bias : Tensor [rows], optional

    Returns
    -------
    Tensor [..., rows]
        Contiguous.
    """
    count = states.numel() // states.shape[-1]
    filled = filled_up(count, weight)
    if not filled:
        return F.linear(states, weight, bias)
    columns = states.reshape(count, -1)
    if count < filled:
        columns = F.pad(columns, (0, 0, 0, filled - count))
    # what comes after is slow on a transposed tensor, attention most of all
    turned = torch.mm(weight, columns.T)[:, :count].T.contiguous()
    turned = turned if bias is None else turned + bias
    return turned.view(*states.shape[:-1], -1)


def filled_up(count: int, weight: Tensor) -> int:
    """Rows that a transposed product of ``count`` rows is filled up to; 0 if it is not transposed.

    For float32 on a CPU. A weight's rows are many: they are what a transposed product shares out
    among threads and cuts into tiles, and the states, which are few, are read by all. Tiles are of
    4 or 8 states. One thread, which has nobody to share with, gains with up to 8 rows.
    """
    if not 1 < count <= _MOST or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return 0
    if count <= 6:
        return max(4, count)
    filled = -(-count // 8) * 8
    # compiled code cannot ask for the number of threads
    alone = torch.compiler.is_compiling() or torch.get_num_threads() == 1
    return filled if filled == 8 or not alone else 0
