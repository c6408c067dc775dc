"""What stopping a classification early costs: against the full model, or against the label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.calibration._validation import check_positive

ClassLossName = Literal["disagreement", "excess_error", "error"]
#: ``loss(early, full, labels)`` on logits float32 [rows, classes] and class indices int64 [rows] or
#: None; one value per row.
ClassLoss = Callable[[Tensor, Tensor, "NDArray[np.int64] | None"], Any]

_NAMES = {
    "disagreement": "disagreement with the full model",
    "excess_error": "excess error over the full model",
    "error": "error",
}


@dataclass(frozen=True)
class RowLoss:
    """The loss of a calibration.

    Parameters
    ----------
    name : str
        What is averaged over units, in words.
    kind : {"disagreement", "excess_error", "error"} or callable
    bound : float
        Largest possible value.
    """

    name: str
    kind: ClassLossName | ClassLoss
    bound: float = 1.0

    @property
    def binary(self) -> bool:
        """Whether it is 0 or 1, which selects the exact test."""
        return self.kind in ("disagreement", "error")

    @property
    def relative(self) -> bool:
        """Whether full computation has no loss by construction."""
        return self.kind != "error"

    @property
    def needs_labels(self) -> bool:
        """Whether it compares with labels."""
        return self.kind in ("excess_error", "error")

    def of(
        self, early: Tensor, full: Tensor, labels: NDArray[np.int64] | None
    ) -> NDArray[np.float64]:
        """Loss of every row, float64 [rows]; checked where it is the caller's."""
        if callable(self.kind):
            values = np.asarray(self.kind(early, full, labels), dtype=np.float64)
            if values.shape != (early.shape[0],):
                raise InvalidArgumentError(
                    "loss", f"values of shape {values.shape}", f"one per row, ({early.shape[0]},)"
                )
            return values
        answers, finals = (logits.argmax(dim=-1).cpu().numpy() for logits in (early, full))
        if self.kind == "disagreement":
            return (answers != finals).astype(np.float64)
        assert labels is not None
        wrong = (answers != labels).astype(np.float64)
        return wrong if self.kind == "error" else wrong - (finals != labels)


def row_loss(loss: ClassLossName | ClassLoss, *, bound: float | None) -> RowLoss:
    """Return the loss that a name or a callable stands for.

    Raises
    ------
    InvalidArgumentError
        If the name is unknown, or a callable comes without its bound.
    """
    if isinstance(loss, str):
        if loss not in _NAMES:
            raise InvalidArgumentError(
                "loss",
                loss,
                f"for a classifier one of {', '.join(get_args(ClassLossName))}, or a callable",
            )
        return RowLoss(_NAMES[loss], loss)
    if not callable(loss):
        raise InvalidArgumentError(
            "loss", loss, f"one of {', '.join(get_args(ClassLossName))}, or a callable"
        )
    if bound is None:
        raise InvalidArgumentError("bound", None, "the largest value your loss can take")
    largest = check_positive("bound", bound)
    return RowLoss(f"{getattr(loss, '__name__', 'user')} loss", loss, largest)
