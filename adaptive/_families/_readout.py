"""A model's own way from hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from adaptive._families._layer import plain_linear
from adaptive._families._registry import family_of
from adaptive._fingerprint import version_of
from adaptive._product import product
from adaptive._transfer import sent


class Readout:
    """A model's own way from the last layer's output to logits: norms, head, scale, soft-cap."""

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model)
        found = (attrgetter(path)(model) for path in family.norms)
        self._norms = [module for module in found if module is not None]
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        self._cap, self._factor, self._divisor = (
            None if name is None else getattr(model.config, name)
            for name in (family.softcap, family.factor, family.divisor)
        )
        self._over: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None
        self._version = version_of(self._head)

    @property
    def device(self) -> torch.device:
        """Where the head's weights are."""
        found: torch.device = self._head.weight.device
        return found

    def empty(self, batch: int) -> Tensor:
        """Logits ``[batch, vocabulary]`` that nobody has formed, all zero."""
        weight = self._head.weight
        shape = (batch, weight.shape[0])
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of hidden states ``[..., width]``."""
        return self._finished(self._logits(self._normed(hidden)))

    def among(self, hidden: Tensor, rows: list[int], *, into: Tensor | None = None) -> Tensor:
        """Logits ``[batch, vocabulary]`` of ``rows`` of ``hidden [batch, width]``.

        The others are what ``into`` has, which is written to; zero without it.
        """
        if len(rows) == hidden.shape[0]:
            return self(hidden)
        chosen = sent(rows, hidden.device)
        logits = self(hidden[chosen])
        if into is None:
            into = logits.new_zeros(hidden.shape[0], logits.shape[-1])
        return into.index_copy_(0, chosen, logits)

    def begin(self) -> None:
        """Start another run: the head may have been trained since the one before."""
        version = version_of(self._head)
        if version is None or version != self._version:
            self._over, self._version = None, version

    def over(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a readout over the ``kept`` rows of the head, gathered once."""
        if self._over is None or self._over[0] is not kept:
            self._over = (kept, self._gathered(kept))
        return self._over[1]

    def _gathered(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        if not self._plain:
            return lambda hidden: self(hidden)[..., kept]
        weight = self._head.weight[kept]
        bias = None if self._head.bias is None else self._head.bias[kept]
        return lambda hidden: self._finished(product(self._normed(hidden), weight, bias))

    def at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits ``[batch, n]`` of tokens ``ids [batch, n]`` for ``hidden [batch, width]``.

        Only those rows of the head are read, if it is a plain one.
        """
        if not self._plain:
            return self(hidden).gather(-1, ids)
        rows = self._head.weight[ids]
        logits = (rows @ self._normed(hidden)[..., None])[..., 0]
        if self._head.bias is not None:
            logits = logits + self._head.bias[ids]
        return self._finished(logits)

    @property
    def _plain(self) -> bool:
        """Whether the head is its weight and bias: not quantised, no adapter, nothing hooked in."""
        head = self._head
        return plain_linear(head) and not (
            head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
        )

    def _logits(self, states: Tensor) -> Tensor:
        head = self._head
        return product(states, head.weight, head.bias) if self._plain else head(states)

    def _normed(self, hidden: Tensor) -> Tensor:
        for norm in self._norms:
            hidden = norm(hidden)
        return hidden

    def _finished(self, logits: Tensor) -> Tensor:
        if self._factor is not None:
            logits = logits * self._factor
        if self._divisor is not None:
            logits = logits / self._divisor
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap
