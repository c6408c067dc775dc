"""What stopping early costs a unit: token-level reductions and bounded losses between two texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adaptive._run import Run
from adaptive.calibration import InvalidArgumentError
from adaptive.calibration._validation import check_positive
from adaptive.policies import rouge_l_distance, token_f1_distance

Tokens = Sequence[int]
#: ``loss(early, full, reference)``; the reference is the unit's given continuation or ``None``.
SequenceLoss = Callable[[Tokens, Tokens, Tokens | None], float]
Reduction = Literal["mean", "any"]
LossName = Literal["disagreement", "departure", "token_f1", "rouge_l", "edit"]


def rouge_l_loss(early: Tokens, full: Tokens, reference: Tokens | None = None) -> float:
    """One minus ROUGE-L (F-measure of the longest common subsequence) against the full text.

    References
    ----------
    .. [1] Lin, "ROUGE: a package for automatic evaluation of summaries", ACL workshop 2004.

    Examples
    --------
    >>> rouge_l_loss([1, 2, 3, 4], [1, 3, 4, 5])
    0.25
    """
    return rouge_l_distance(early, full)


def token_f1_loss(early: Tokens, full: Tokens, reference: Tokens | None = None) -> float:
    """One minus the F-measure of the two texts as bags of tokens.

    Examples
    --------
    >>> token_f1_loss([1, 2, 2, 4], [2, 1, 5, 6])
    0.5
    """
    return token_f1_distance(early, full)


def edit_loss(early: Tokens, full: Tokens, reference: Tokens | None = None) -> float:
    """Levenshtein distance of the two texts over the longer one's length.

    Examples
    --------
    >>> edit_loss([1, 2, 3], [1, 3])
    0.3333333333333333
    """
    longest = max(len(early), len(full))
    if longest == 0:
        return 0.0
    row = np.arange(len(full) + 1)
    target = np.asarray(full)
    for i, token in enumerate(early, start=1):
        changed = np.minimum(row[:-1] + (target != token), row[1:] + 1)
        row = np.concatenate(([i], changed))
        # insertions run along the row: a running minimum of (value - position)
        row = np.minimum.accumulate(row - np.arange(row.size)) + np.arange(row.size)
    return float(row[-1]) / longest


_SEQUENCE: dict[str, SequenceLoss] = {
    "rouge_l": rouge_l_loss,
    "token_f1": token_f1_loss,
    "edit": edit_loss,
}


@dataclass(frozen=True)
class UnitLoss:
    """The loss of a calibration: its name, its type and how it is read off a run.

    Parameters
    ----------
    name : str
        What is averaged over units, in words.
    binary : bool
        Whether it is 0 or 1, which selects the exact test.
    bound : float
        Largest possible value.
    sequence : callable, optional
        For losses that compare the run's text with the full model's.
    """

    name: str
    binary: bool
    bound: float
    sequence: SequenceLoss | None = None

    def of(
        self,
        runs: Sequence[Run],
        full: Sequence[Tokens] | None,
        references: Sequence[Tokens | None],
    ) -> NDArray[np.float64]:
        """Loss of every unit, ``[n_units]``.

        Parameters
        ----------
        runs : sequence of Run
            Real generations.
        full : sequence of tokens, optional
            The full model's texts; needed by losses that compare texts.
        references : sequence
            Given continuations.
        """
        if self.sequence is None:
            wrong = [float(np.mean(run.agreement == 0)) for run in runs]
            return np.array([float(share > 0) for share in wrong] if self.binary else wrong)
        assert full is not None
        return np.array(
            [
                self.sequence(run.tokens, text, reference)
                for run, text, reference in zip(runs, full, references, strict=True)
            ],
            dtype=np.float64,
        )


_SHARE = UnitLoss("share of tokens that differ from the full model's choice", False, 1.0)
_DEPARTURE = UnitLoss("departure of the text from the full model's", True, 1.0)
#: Losses that a run and the full model's choices along it determine.
TOKEN_LOSSES = (_SHARE, _DEPARTURE)


def unit_loss(
    loss: LossName | SequenceLoss, *, bound: float | None, reduction: Reduction = "mean"
) -> UnitLoss:
    """Return the loss that a name or a callable stands for.

    Raises
    ------
    InvalidArgumentError
        If the name is unknown, or a callable comes without its bound.
    """
    if reduction not in get_args(Reduction):
        raise InvalidArgumentError("reduction", reduction, "'mean' or 'any'")
    if loss == "disagreement" and reduction == "any":
        loss = "departure"
    if reduction == "any" and loss != "departure":
        raise InvalidArgumentError("reduction", reduction, "'mean' for a loss between whole texts")
    if loss == "disagreement":
        return _SHARE
    if loss == "departure":
        return _DEPARTURE
    if isinstance(loss, str):
        if loss not in _SEQUENCE:
            raise InvalidArgumentError(
                "loss", loss, f"one of {', '.join(get_args(LossName))}, or a callable"
            )
        return UnitLoss(f"{loss} loss against the full model's text", False, 1.0, _SEQUENCE[loss])
    if not callable(loss):
        raise InvalidArgumentError(
            "loss", loss, f"one of {', '.join(get_args(LossName))}, or a callable"
        )
    if bound is None:
        raise InvalidArgumentError("bound", None, "the largest value your loss can take")
    largest = check_positive("bound", bound)
    return UnitLoss(f"{getattr(loss, '__name__', 'user')} loss", False, largest, loss)
