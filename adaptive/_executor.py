"""Running parts of a model: the interface between the decode loop and the two tiers."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from adaptive._families import Readout
from adaptive._tokens import Tokens


class AbstractExecutor(abc.ABC):
    """Runs ranges of layers over ranges of positions and owns their keys and values.

    The loop decides what runs when; an executor only runs it. Positions are slots of the cache,
    the same for every row (left-padded prompts), ``start .. start + n - 1`` in every call, and a
    layer's slots are written in order.

    ``layers`` is the number of decoder layers, ``readout`` the way from the last layer's output
    ``[..., width]`` to logits ``[..., vocabulary]``.
    """

    layers: int
    readout: Readout

    @abc.abstractmethod
    def begin(
        self,
        *,
        batch_size: int,
        max_length: int,
        padding: Tensor | None,
        positions: Tensor,
        ahead: int | None = None,
    ) -> None:
        """Prepare empty keys and values for a batch.

        Parameters
        ----------
        batch_size, max_length : int
            Rows, and the most slots that will be used.
        padding : Tensor, bool [batch, prompt], optional
            True where a slot holds padding; ``None`` if none does.
        positions : Tensor, int64 [batch, max_length]
            Position id of every slot.
        ahead : int, optional
            Allows layers with a sliding window to keep no more than it and what this needs: runs
            of single tokens, or of waiting ones, have at most ``ahead + 1`` slots of a row, and at
            most ``ahead`` slots are forgotten by :meth:`truncate`.
        """

    @abc.abstractmethod
    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """Input of layer 0, ``[batch, n, width]``, for ``tokens`` int64 ``[batch, n]``."""

    @abc.abstractmethod
    def run(
        self,
        low: int,
        high: int,
        hidden: Tensor,
        start: int,
        *,
        frozen: Tensor | None = None,
        waiting: Tensor | None = None,
    ) -> Tensor:
        """Run layers ``low .. high - 1`` over ``hidden [batch, n, width]``, keep keys and values.

        Rows with ``frozen`` (bool ``[batch]``) keep their hidden state: every layer projects
        their keys and values from it, which is what ``propagate`` means. ``waiting [batch, m,
        width]`` are states of the ``m`` tokens before ``start``: as after :meth:`fill`, every
        layer's keys and values of these are projected from them.
        """

    @abc.abstractmethod
    def fill(self, low: int, high: int, hidden: Tensor, start: int) -> None:
        """Write keys and values of layers ``low .. high - 1``, all projected from ``hidden``."""

    @abc.abstractmethod
    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on, in every layer."""

    @abc.abstractmethod
    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values written so far, each ``[batch, heads, length, head width]``.

        Of a layer with a :meth:`kept_window`, at least those that the next token sees.
        """

    def kept_window(self, layer: int) -> int | None:
        """Width of the window of a layer that need not keep every slot; ``None`` if it does."""
        return None

    @abc.abstractmethod
    def end(self) -> None:
        """Release what :meth:`begin` allocated; the model is as it was before."""


class TokenExecutor(AbstractExecutor):
    """Also runs single tokens of some rows, each at a slot of its own."""

    @abc.abstractmethod
    def embed_tokens(self, ids: Tensor, tokens: Tokens) -> Tensor:
        """Input of layer 0, ``[n, width]``, for single tokens with these ``ids``, int64 ``[n]``."""

    @abc.abstractmethod
    def run_tokens(
        self,
        low: int,
        high: int,
        hidden: Tensor,
        tokens: Tokens,
        *,
        waiting: tuple[Tensor, Tokens] | None = None,
    ) -> Tensor:
        """Like :meth:`run` for single tokens, ``hidden [n, width]``, of some rows.

        All earlier slots of these rows must be there, or come before them in ``tokens``.
        ``waiting`` are other tokens and the states that all layers project their keys and values
        from, as after :meth:`fill_tokens`.
        """

    @abc.abstractmethod
    def fill_tokens(self, low: int, high: int, hidden: Tensor, tokens: Tokens) -> None:
        """Like :meth:`fill` for single tokens, ``hidden [n, width]``, of some rows."""


def attention_mask(
    padding: Tensor | None, *, start: int, count: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each of ``count`` queries from slot ``start`` on may see.

    Returns
    -------
    Tensor, bool [batch or 1, 1, count, start + count], or None
        ``None`` where a single query sees every key. Padding slots see themselves only, so that
        no row of the softmax is empty.
    """
    length = start + count
    if padding is None and count == 1 and (window is None or length <= window):
        return None
    queries = torch.arange(start, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    if padding is None:
        return allowed[None, None]
    hidden = torch.zeros(padding.shape[0], length, dtype=torch.bool, device=device)
    seen = min(length, padding.shape[1])
    hidden[:, :seen] = padding[:, :seen]
    return ((allowed[None] & ~hidden[:, None, :]) | (keys == queries)[None])[:, None]
