"""What is asked of a device that may be of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def finish(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it; a CPU has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(*_named(device))


def follow(module: nn.Module, device: torch.device) -> None:
    """Move what belongs to a model to where the model was moved."""
    if any(parameter.device != device for parameter in module.parameters()):
        with torch.inference_mode(False):  # it outlives the call
            module.to(device)


def random_state(device: torch.device) -> Tensor:
    """State of torch's global generator of a device."""
    state: Tensor = _random(device).get_rng_state(*_named(device))
    return state


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put torch's global generator of a device where it was."""
    _random(device).set_rng_state(state, *_named(device))


def _random(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """How a device is named to the module of its kind; of these two there is one."""
    return () if device.type in ("cpu", "mps") else (device,)
