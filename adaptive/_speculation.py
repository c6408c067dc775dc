"""Drafts in ``verify`` mode: how they are drawn, and which of them the full model lets stand."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptive._choose import AbstractNoise, Chooser

SpeculationMode = Literal["coupled", "rejection"]
#: Probabilities are drawn from as multiples of this: float32 ones from 2**-36 on are exact.
_GRAIN = 2.0**-60


@dataclass(frozen=True)
class Draft:
    """Tokens drafted at one place, one per row.

    Parameters
    ----------
    tokens : Tensor, int64 [batch]
    probability : Tensor, float32 [batch], optional
        Of each token under the distribution it was drawn from.
    logits : Tensor [batch, vocabulary], optional
        Raw logits of that distribution, in the model's precision.
    """

    tokens: Tensor
    probability: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """What the full model says of the drafts at one place.

    Parameters
    ----------
    kept : Tensor, bool [batch]
        Whether the draft stands.
    agreement : Tensor, int8 [batch]
        Label of the token that stands there in the end.
    scores : Tensor, float32 [batch, vocabulary]
        The full model's logits after the processors.
    instead : callable
        Tokens, int64 ``[batch]``, for rows whose draft does not stand; asked only if there are.
    """

    kept: Tensor
    agreement: Tensor
    scores: Tensor
    instead: Callable[[], Tensor]


class AbstractSpeculation(abc.ABC):
    """Draws drafts, and judges them once the full model's logits at their place are known.

    Both calls get the text before the draft (int64 ``[batch, length]``), raw logits ``[batch,
    vocabulary]`` and the draft's index among the generated tokens.
    """

    @abc.abstractmethod
    def draft(self, prefix: Tensor, logits: Tensor, index: int) -> Draft:
        """Draw one token per row from an early readout."""

    @abc.abstractmethod
    def judge(
        self, prefix: Tensor, logits: Tensor, index: int, *, draft: Draft, full: Tensor
    ) -> Verdict:
        """Hold drafts against the full model; ``full`` (bool ``[batch]``) are its own draws."""


class Coupled(AbstractSpeculation):
    """The full model chooses too, by the same noise: a draft stands if it is that choice.

    Greedy decoding is the case without noise.

    Parameters
    ----------
    chooser : Chooser
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser

    def draft(self, prefix: Tensor, logits: Tensor, index: int) -> Draft:
        """See :class:`AbstractSpeculation`."""
        return Draft(self._chooser(prefix, logits, index)[0])

    def judge(
        self, prefix: Tensor, logits: Tensor, index: int, *, draft: Draft, full: Tensor
    ) -> Verdict:
        """See :class:`AbstractSpeculation`."""
        chosen, scores = self._chooser(prefix, logits, index)
        kept = chosen == draft.tokens
        return Verdict(kept, torch.ones_like(kept, dtype=torch.int8), scores, lambda: chosen)


class Rejection(AbstractSpeculation):
    """Rejection sampling: the text follows the full model's distribution, more drafts stand.

    With ``q`` the early and ``p`` the full distribution after the same text, both behind the
    processors, a draft ``x ~ q`` stands with probability ``min(1, p(x) / q(x))``; else the token
    is drawn from ``max(p - q, 0)``, normalised. The token's distribution is ``p``, and a draft
    stands with probability ``1 - d``, ``d`` the total variation distance of ``p`` and ``q``
    (Leviathan et al. 2023, theorem 3.5 and appendix A.1; Chen et al. 2023, theorem 1).

    Parameters
    ----------
    chooser : Chooser
    noise : AbstractNoise
        The chooser's.

    Notes
    -----
    *Rows that are cut back together.* The three uniform draws behind a token belong to its place
    in its row and are the same when the place is drafted again. So the token that stands there
    in the end is a function of the row's text before it and of these draws, whichever other
    drafts were taken back in between, in this row or in others. The draws of a place are
    independent of all that came before it: nothing is selected by what other rows do, and
    neither they nor the number of drafts change a token (up to near-ties).

    *Memory.* A pending draft keeps its raw logits in the model's precision. The processors run
    on them once more if the draft is rejected.

    *Precision.* Distributions are softmaxes in float32, as ``model.generate`` samples from, taken
    as multiples of 2**-60.

    References
    ----------
    .. [1] Leviathan, Kalman and Matias, "Fast inference from transformers via speculative
           decoding", ICML 2023. https://arxiv.org/abs/2211.17192
    .. [2] Chen, Borgeaud, Irving, Lespiau, Sifre and Jumper, "Accelerating large language model
           decoding with speculative sampling", 2023. https://arxiv.org/abs/2302.01318
    """

    def __init__(self, chooser: Chooser, noise: AbstractNoise) -> None:
        self._chooser, self._noise = chooser, noise

    def draft(self, prefix: Tensor, logits: Tensor, index: int) -> Draft:
        """See :class:`AbstractSpeculation`."""
        early = self._distribution(prefix, logits)
        tokens = drawn(early, self._noise.uniforms(index, early)[:, 0])
        return Draft(tokens, _of(early, tokens), logits)

    def judge(
        self, prefix: Tensor, logits: Tensor, index: int, *, draft: Draft, full: Tensor
    ) -> Verdict:
        """See :class:`AbstractSpeculation`."""
        assert draft.probability is not None
        scores = self._chooser.scores(prefix, logits)
        deep = torch.softmax(scores, dim=-1)
        uniforms = self._noise.uniforms(index, deep)
        # a second product with the head may round otherwise: the full model's draws just stand
        kept = full | (uniforms[:, 1] * draft.probability < _of(deep, draft.tokens))

        def instead() -> Tensor:
            assert draft.logits is not None
            left = (deep - self._distribution(prefix, draft.logits)).clamp(min=0)
            # p and q that differ by rounding alone leave nothing: then p is as good
            left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, deep)
            return drawn(left, uniforms[:, 2])

        return Verdict(kept, kept.to(torch.int8), scores, instead)

    def _distribution(self, prefix: Tensor, logits: Tensor) -> Tensor:
        return torch.softmax(self._chooser.scores(prefix, logits), dim=-1)


def drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one entry per row by the inverse of the cumulative weights.

    Weights are summed as integers: the same on every device, and an entry of weight 0 is never
    drawn.

    Parameters
    ----------
    weights : Tensor, float [batch, n]
        From 0 to 1, with a sum of at most 1 up to rounding and more than 0; need not be
        normalised.
    uniforms : Tensor, float64 [batch]
        In [0, 1).

    Returns
    -------
    Tensor, int64 [batch]
    """
    sums = (weights.double() / _GRAIN).to(torch.int64).cumsum(dim=-1)
    total = sums[:, -1:]
    target = (uniforms[:, None] * total).to(torch.int64).minimum(total - 1)
    return torch.searchsorted(sums, target, right=True)[:, 0]


def speculation_for(mode: SpeculationMode, chooser: Chooser) -> AbstractSpeculation:
    """Return the way of drafting that ``mode`` names."""
    if mode == "coupled":
        return Coupled(chooser)
    assert chooser.noise is not None
    return Rejection(chooser, chooser.noise)


def _of(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Probability of each row's token, ``[batch]``."""
    return probabilities.gather(-1, tokens[:, None])[:, 0]
