"""Onto a device: numbers of the host, without waiting for it, and whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError


def sent(values: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on ``device``, shaped as they are.

    A copy from ordinary memory makes the host wait until the GPU has done all that was asked of
    it before; one from page-locked memory takes its turn.
    """
    tensor = torch.as_tensor(values, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def move(model: Any, device: torch.device | str) -> None:
    """Move a model, a module or anything with a ``to``, to the device that a caller named.

    Raises
    ------
    InvalidArgumentError
        If there is no such device here.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError("device", device, f"a usable device ({reason})") from error
