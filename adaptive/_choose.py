"""From logits to tokens: processors, then argmax or sampling with noise that can be read twice."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from adaptive._device import random_state, set_random_state


class AbstractNoise(abc.ABC):
    """Standard exponential noise per generated token; the same token always gets the same noise.

    A token is sampled as ``argmax(probabilities / noise)``, which is how torch draws from a
    categorical distribution. Reading the noise twice lets the full model's choice at a settled
    token be told apart from a mere second draw.

    Where drafts are accepted by rejection sampling, a token has three uniform draws instead:
    for the draft, for its acceptance and for what replaces it.
    """

    @abc.abstractmethod
    def at(self, index: int, like: Tensor) -> Tensor:
        """Noise for the token with this index among the generated ones, shaped as ``like``."""

    @abc.abstractmethod
    def uniforms(self, index: int, like: Tensor) -> Tensor:
        """Draw from [0, 1), float64 ``[batch, 3]``, for the token with this index; read twice too.

        ``like [batch, ...]`` gives rows and device. One index is asked for these or for :meth:`at`.
        """

    def release(self, index: int) -> None:
        """Say that tokens before ``index`` will not be asked for again."""
        return

    def set_aside(self, index: int) -> None:
        """Say that tokens before ``index`` will be asked for again at the end, if at all."""
        return

    def rewind(self, index: int) -> None:
        """Say that tokens from ``index`` on were never generated."""
        return


class KeyedNoise(AbstractNoise):
    """Noise that is a function of (seed, unit, token index, vocabulary entry) alone.

    A row gets the same noise whoever else is in the batch, on every device.

    Parameters
    ----------
    units : Tensor, int64 [batch]
        A number per row that stays with the unit.
    seed : int
    """

    def __init__(self, units: Tensor, seed: int) -> None:
        self._units = units.to(torch.int64)
        self._seed = seed

    def at(self, index: int, like: Tensor) -> Tensor:
        """See :class:`AbstractNoise`."""
        bits = self._bits(index, torch.arange(like.shape[-1], device=like.device))
        uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
        return (-uniform.log()).to(like.dtype)

    def uniforms(self, index: int, like: Tensor) -> Tensor:
        """See :class:`AbstractNoise`: as if of three entries in front of the vocabulary."""
        bits = self._bits(index, torch.arange(-3, 0, device=like.device))
        return bits.to(torch.float64) * 2.0**-53

    def _bits(self, index: int, entries: Tensor) -> Tensor:
        """Return 53 random bits per row and entry, int64 ``[batch, n]``."""
        self._units = self._units.to(entries.device)  # copied once: the host waits for a copy
        row = _mix(self._units + _mix_int(self._seed))
        token = _mix(row + index)[:, None]
        return _mix(token + entries[None, :]) >> 11 & (1 << 53) - 1


class StreamNoise(AbstractNoise):
    """Noise drawn from torch's global generator, token by token, as ``generate`` draws it.

    Same seed, same tokens as ``model.generate(do_sample=True)``. Drawn once per token index and
    kept until released, so that reading it again does not move the generator. Of what is set aside
    the generator's state is kept (5 kB on a CPU, 16 bytes on a GPU, whatever the vocabulary), from
    which it is drawn anew.
    """

    def __init__(self) -> None:
        self._drawn: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        self._device = torch.device("cpu")

    def at(self, index: int, like: Tensor) -> Tensor:
        """See :class:`AbstractNoise`."""
        return self._once(index, like.device, lambda: torch.empty_like(like).exponential_(1))

    def uniforms(self, index: int, like: Tensor) -> Tensor:
        """See :class:`AbstractNoise`."""
        kind: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
        return self._once(index, like.device, lambda: torch.rand(like.shape[0], 3, **kind))

    def _once(self, index: int, device: torch.device, draw: Callable[[], Tensor]) -> Tensor:
        """Draw, the first time that this index is asked for; afterwards read the same."""
        if index in self._drawn:
            return self._drawn[index]
        now = random_state(device)
        if index in self._before:
            set_random_state(self._before[index], device)
            again = draw()
            set_random_state(now, device)
            return again
        self._device = device
        self._before[index] = now
        self._drawn[index] = draw()
        return self._drawn[index]

    def release(self, index: int) -> None:
        """See :class:`AbstractNoise`."""
        self.set_aside(index)
        self._before = {key: value for key, value in self._before.items() if key >= index}

    def set_aside(self, index: int) -> None:
        """See :class:`AbstractNoise`."""
        self._drawn = {key: value for key, value in self._drawn.items() if key >= index}

    def rewind(self, index: int) -> None:
        """See :class:`AbstractNoise`: the generator is where it was before those draws."""
        if index in self._before:
            set_random_state(self._before[index], self._device)


@dataclass(frozen=True)
class Chooser:
    """The configured way from raw logits to the next token.

    Parameters
    ----------
    processors : LogitsProcessorList
    noise : AbstractNoise, optional
        ``None`` for greedy decoding.
    """

    processors: LogitsProcessorList
    noise: AbstractNoise | None

    def __call__(self, prefix: Tensor, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Choose one token per row.

        Parameters
        ----------
        prefix : Tensor, int64 [batch, length]
        logits : Tensor [batch, vocabulary]
        index : int
            Number of tokens generated before this one.

        Returns
        -------
        tokens : Tensor, int64 [batch]
        scores : Tensor, float32 [batch, vocabulary]
            Logits after the processors.
        """
        scores = self.scores(prefix, logits)
        if self.noise is None:
            return scores.argmax(dim=-1), scores
        probabilities = torch.softmax(scores, dim=-1)
        return (probabilities / self.noise.at(index, probabilities)).argmax(dim=-1), scores

    def scores(self, prefix: Tensor, logits: Tensor) -> Tensor:
        """Logits after the processors, float32 ``[batch, vocabulary]``."""
        scores = logits.float()
        if self.processors:
            # a processor may write in place; the caller's logits stay what they were
            scores = self.processors(prefix, scores.clone())
        return scores

    @property
    def plain(self) -> bool:
        """Whether the choice is the likeliest token of the raw logits."""
        return not self.processors and self.noise is None

    def each(self, ids: Tensor, logits: Tensor, slots: Sequence[int], prompt: int) -> Tensor:
        """Choose at several slots, each after its own prefix of ``ids``.

        Parameters
        ----------
        ids : Tensor, int64 [batch, length]
        logits : Tensor [batch, n, vocabulary]
            Logits at the slots.
        slots : sequence of int, [n]
        prompt : int
            The prompt's length.

        Returns
        -------
        Tensor, int64 [batch, n]
        """
        if self.plain:
            return logits.argmax(dim=-1)
        chosen = [
            self(ids[:, : slot + 1], logits[:, place], slot + 1 - prompt)[0]
            for place, slot in enumerate(slots)
        ]
        return torch.stack(chosen, dim=1)


def _mix(values: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014) in wrapping int64 arithmetic."""
    values = values * -7046029254386353131
    values = (values ^ _shift(values, 30)) * -4658895280553007687
    values = (values ^ _shift(values, 27)) * -7723592293110705685
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts signed integers arithmetically."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    """Spread a seed over 64 bits, as a signed integer."""
    mixed = (value * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**64 - 1)
    return mixed - 2**64 if mixed >= 2**63 else mixed
