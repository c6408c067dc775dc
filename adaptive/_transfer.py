"""Numbers of the host on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(values: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on ``device``, shaped as they are.

    A copy from ordinary memory makes the host wait until the GPU has done all that was asked of
    it before; one from page-locked memory takes its turn.
    """
    tensor = torch.as_tensor(values, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
