"""Uniform noise keyed by unit and position: the same draw offline, online and in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_STRIDE = 0x2545F4914F6CDD1D  # odd, between the streams of successive seeds


def unit_keys(unit_ids: Sequence[str]) -> Tensor:
    """Return one int64 key per unit id, the same on every machine.

    Examples
    --------
    >>> bool((unit_keys(["a", "b"]) == unit_keys(["a", "b", "c"])[:2]).all())
    True
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in unit_ids)
    return torch.tensor(
        [int.from_bytes(digest, "little", signed=True) for digest in digests],
        dtype=torch.int64,
        device="cpu",
    )


def keyed_noise(keys: Tensor, position: Tensor, *, seed: int = 0) -> Tensor:
    """Uniform draws in [0, 1) that depend on (seed, unit, position) and on nothing else.

    Two rounds of the splitmix64 finaliser over a counter: integer arithmetic only, so every
    device gives the same bits, and a CUDA graph can capture it.

    Parameters
    ----------
    keys : Tensor, int64 [batch]
        Key of each row's unit (`unit_keys`).
    position : Tensor, int64 [batch]
        Number of tokens the row has generated before this one.
    seed : int
        Part of the frozen policy's decoding settings.

    Returns
    -------
    Tensor, float32 [batch]
        Multiples of 2**-24, so that the value is exact in float32 and never rounds up to 1.

    References
    ----------
    .. [1] Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Examples
    --------
    >>> keys, position = torch.tensor([3, 3, 4]), torch.tensor([0, 1, 0])
    >>> noise = keyed_noise(keys, position)
    >>> torch.equal(noise[:2], keyed_noise(keys[:2], position[:2]))
    True
    """
    start = (seed * _STRIDE + 2**63) % 2**64 - 2**63
    mixed = _mix(_mix(keys + start) + position * _GOLDEN)
    return _shift(mixed, 40).to(torch.float32) * 2.0**-24


def _mix(value: Tensor) -> Tensor:
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed integer tensor."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
