"""What calibrations of every kind of model share: the split, and the facts of a certificate."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit

from adaptive._distributed import from_first
from adaptive.calibration import Certificate, DeltaLedger, InvalidArgumentError

_log = logging.getLogger(__name__)
#: Shares of the units used to train exits (only if the model has none) and to choose the path.
TRAIN_SHARE, FIT_SHARE = 0.3, 0.3


class Parts(Protocol):
    """Units that can be split."""

    @property
    def groups(self) -> NDArray[Any] | None:
        """Cluster of each unit."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Name of each unit, by its content."""

    def __len__(self) -> int: ...

    def select(self, index: NDArray[np.intp], /) -> Self:
        """Return the units at these positions."""


UnitsT = TypeVar("UnitsT", bound=Parts)


@dataclass(frozen=True)
class Roles(Generic[UnitsT]):
    """Units by role, and how many were kept out of both."""

    fit: UnitsT
    test: UnitsT
    trained: int
    overlapping: int
    repeated: int

    def record(self, seed: int) -> dict[str, Any]:
        """Return what the certificate says of the split."""
        return {
            "seed": seed,
            "n_fit": len(self.fit),
            "n_test": len(self.test),
            "n_train_exits": self.trained,
            "removed_because_they_shaped_the_exits": self.overlapping,
            "removed_repetitions": self.repeated,
            "fit_units": list(self.fit.ids),
            "test_units": list(self.test.ids),
        }


@dataclass(frozen=True)
class Facts:
    """What the certificate records beside the statistics.

    Parameters
    ----------
    fingerprints, decoding, split : dict
        As in :class:`Certificate`.
    pool : str or None
        Named pool that units were drawn from.
    unit, noun : str
        What the test counts, and what one row of the dataset is called.
    """

    fingerprints: dict[str, Any]
    decoding: dict[str, Any]
    split: dict[str, Any]
    pool: str | None
    unit: str
    noun: str = "prompt"

    def completed(self, certificate: Certificate) -> Certificate:
        """Add to a certificate what only this floor knows."""
        assumptions = certificate.assumptions
        if self.pool is not None:
            drawn = f"{self.noun}s were drawn at random from the pool {self.pool!r}"
            assumptions = (*assumptions, drawn)
        return replace(
            certificate,
            assumptions=assumptions,
            split=certificate.split | self.split,
            fingerprints=certificate.fingerprints | self.fingerprints,
            decoding=self.decoding,
            versions=certificate.versions
            | {"torch": torch.__version__, "transformers": transformers.__version__},
        )

    def booked(self, ledger: DeltaLedger | None, delta: float, *, purpose: str) -> Facts:
        """Spend delta, if there is a ledger, and record what the account looks like then.

        Raises
        ------
        BudgetSpentError
            If the ledger has less than that left.
        """
        if ledger is None:
            return self

        def account() -> dict[str, Any]:
            entry = ledger.spend(delta, purpose=purpose, data=self.fingerprints["data"])
            return {"spent": ledger.spent(), "budget": ledger.budget, "entry": entry.created}

        return replace(self, split=self.split | {"ledger": from_first(account)})


class Loss(Protocol):
    """What every calibration asks of its loss: name, whether it is 0 or 1, largest value."""

    @property
    def name(self) -> str:
        """What is averaged over units, in words."""

    @property
    def binary(self) -> bool:
        """Whether it is 0 or 1, which selects the exact test."""

    @property
    def bound(self) -> float:
        """Largest possible value."""


def test_of(loss: Loss, method: str) -> dict[str, Any]:
    """Return the arguments of ``control_risk`` and ``minimum_units`` that follow from a loss."""
    return {
        "method": method,
        "loss_type": "binary" if loss.binary else "bounded",
        "bound": loss.bound,
    }


def none_run(
    loss: Loss,
    *,
    risk: float,
    delta: float,
    unit: str,
    n: int,
    why: str,
    evidence: dict[str, Any] | None = None,
) -> Certificate:
    """Return the certificate of a calibration that ended before its test, with the reason."""
    return Certificate(
        holds=False,
        risk=risk,
        delta=delta,
        loss=loss.name,
        unit=unit,
        method="none run",
        procedure="fixed-sequence",
        n=n,
        index=None,
        evidence=evidence or {},
        bound=loss.bound,
        assumptions=(),
        split={},
        notes=(why,),
    )


def with_evidence(certificate: Certificate, more: dict[str, Any]) -> Certificate:
    """Add entries to a certificate's evidence."""
    return replace(certificate, evidence=certificate.evidence | more)


def data_fingerprint(units: Parts) -> str:
    """Hash of all units, in whatever order they come."""
    return hashlib.sha256("".join(sorted(units.ids)).encode()).hexdigest()[:24]


def count_units(test: Parts) -> int:
    """Count what the test counts: clusters, if these units carry any."""
    return len(test) if test.groups is None else len(np.unique(test.groups))


def too_few(n: int, needed: int, *, noun: str, per_unit: int = 1) -> str:
    """Say that the test split is too small, and how many prompts or inputs would do.

    Parameters
    ----------
    n, needed : int
        Units in the test split, and units that the test needs.
    noun : str
        What the rows of the dataset are called.
    per_unit : int
        Rows that make one unit.
    """
    return (
        f"Too few units: the test split has {n}, and this promise needs at least {needed} in the "
        f"test even if every loss is zero (about {total_units(needed) * per_unit} {noun} in all)."
    )


def parted(units: UnitsT, share: float, rng: int) -> tuple[UnitsT, UnitsT]:
    """Part units at random, clusters kept together."""
    rows = np.arange(len(units))
    if units.groups is None:
        splitter = ShuffleSplit(n_splits=1, train_size=_share(share, len(units)), random_state=rng)
        first, second = next(splitter.split(rows))
    else:
        count = len(np.unique(units.groups))
        if count < 2:
            raise InvalidArgumentError("groups", "a single cluster", "at least two clusters")
        apart = GroupShuffleSplit(n_splits=1, train_size=_share(share, count), random_state=rng)
        first, second = next(apart.split(rows, groups=units.groups))
    return units.select(first), units.select(second)


def unshaped(units: UnitsT, shaped: Collection[str], *, noun: str) -> UnitsT:
    """Leave out the units that shaped the exits: they are no evidence about them.

    Raises
    ------
    InvalidArgumentError
        If fewer than 2 are left.
    """
    kept = np.array([i for i, name in enumerate(units.ids) if name not in shaped], dtype=np.intp)
    if kept.size < len(units):
        _log.info("%d %s shaped the exits and are left out", len(units) - kept.size, noun)
    if kept.size < 2:
        found = f"{kept.size} distinct {noun} that did not shape the exits"
        raise InvalidArgumentError("dataset", found, "at least 2")
    return units.select(kept)


def total_units(needed: int) -> int:
    """Units to bring so that the test split has enough."""
    return int(np.ceil(needed / (1 - FIT_SHARE))) + 1


def _share(share: float, count: int) -> int:
    """Return a share of a count, at least one and not all."""
    return min(max(1, int(share * count)), count - 1)
