"""The ledger: how much of a deployment's error probability its calibrations have spent."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.calibration._errors import (
    AdaptiveError,
    CertificateError,
    InvalidArgumentError,
)
from adaptive.calibration._validation import check_probability

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
_PATIENCE = 10.0


class BudgetSpentError(AdaptiveError, ValueError):
    """A calibration asked for more error probability than its deployment has left."""


@dataclass(frozen=True)
class LedgerEntry:
    """One calibration.

    Parameters
    ----------
    purpose : str
        What it was for.
    delta : float
        Error probability it spent, whether or not anything was certified.
    data : str
        Fingerprint of the units it looked at, or an empty string.
    created : str
        ISO 8601 time.
    """

    purpose: str
    delta: float
    data: str
    created: str


@dataclass(frozen=True)
class DeltaLedger:
    """Error probability spent by the calibrations of one deployment, kept in a JSON file.

    Every calibration may mislead with its own delta, and whoever calibrates again after looking
    at results takes another chance. If the deltas of all calibrations sum to at most `budget`,
    the chance that *any* of their certificates is wrong is at most `budget` (union bound), with
    no assumption about how they depend on each other.

    Parameters
    ----------
    path : pathlib.Path
        The file. Writers on one machine take turns through a lock file beside it.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = DeltaLedger.create(Path(folder.name) / "ledger.json", budget=0.1)
    >>> ledger.spend(0.05, purpose="first release").delta
    0.05
    >>> round(ledger.left(), 12), round(ledger.next_share(), 12)
    (0.05, 0.015198177546)
    >>> folder.cleanup()
    """

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, budget: float) -> DeltaLedger:
        """Start a ledger with a total error probability, in (0, 1).

        Raises
        ------
        InvalidArgumentError
            If the file exists: a ledger is never started over silently.
        """
        target = Path(path)
        content = {
            "schema": "adaptive delta ledger",
            "schema_version": SCHEMA_VERSION,
            "budget": check_probability("budget", budget),
            "entries": [],
        }
        with _locked(target):
            if target.exists():
                raise InvalidArgumentError("path", str(target), "a file that does not exist yet")
            _write(target, content)
        return cls(target)

    @classmethod
    def open(cls, path: str | Path) -> DeltaLedger:
        """Open an existing ledger.

        Raises
        ------
        InvalidArgumentError
            If there is no such file.
        CertificateError
            If it is damaged or of an unknown schema version.
        """
        ledger = cls(Path(path))
        ledger._read()
        return ledger

    @property
    def budget(self) -> float:
        """Total error probability of the deployment."""
        return float(self._read()["budget"])

    def entries(self) -> tuple[LedgerEntry, ...]:
        """Every calibration so far, oldest first."""
        return tuple(LedgerEntry(**entry) for entry in self._read()["entries"])

    def spent(self) -> float:
        """Error probability spent so far."""
        return math.fsum(entry.delta for entry in self.entries())

    def left(self) -> float:
        """Error probability left, at least 0."""
        return max(0.0, self.budget - self.spent())

    def next_share(self) -> float:
        r"""Delta for the next calibration if there may be any number of them.

        :math:`\text{budget} \cdot 6 / (\pi k)^2` for the k-th calibration, which sums to the
        budget over all k; never more than what is left.
        """
        content = self._read()
        k = len(content["entries"]) + 1
        return min(self.left(), float(content["budget"]) * 6.0 / (math.pi * k) ** 2)

    def spend(self, delta: float, *, purpose: str, data: str = "") -> LedgerEntry:
        """Book a calibration, *before* its results are looked at.

        Parameters
        ----------
        delta : float
            In (0, 1).
        purpose : str
            What it is for.
        data : str
            Fingerprint of the units, such as `Trace.fingerprint`.

        Returns
        -------
        LedgerEntry

        Raises
        ------
        BudgetSpentError
            If `delta` is more than what is left; nothing is booked then.
        """
        check_probability("delta", delta)
        with _locked(self.path):
            content = self._read()
            spent = math.fsum(entry["delta"] for entry in content["entries"])
            if spent + delta > content["budget"] * (1.0 + 1e-12):
                raise BudgetSpentError(
                    f"this calibration asks for delta = {delta:g}, but of the deployment's budget "
                    f"{content['budget']:g} only {max(0.0, content['budget'] - spent):g} is left: "
                    f"use a smaller delta, or start a new deployment with fresh promises"
                )
            created = datetime.now(UTC).isoformat(timespec="seconds")
            entry = LedgerEntry(purpose, float(delta), data, created)
            content["entries"].append(asdict(entry))
            _write(self.path, content)
        return entry

    def to_frame(self) -> pd.DataFrame:
        """One row per calibration."""
        import pandas as pd

        columns = list(LedgerEntry.__annotations__)
        return pd.DataFrame([asdict(entry) for entry in self.entries()], columns=columns)

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            version = content["schema_version"]
        except FileNotFoundError as error:
            raise InvalidArgumentError("path", str(self.path), "an existing ledger") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CertificateError(f"{self.path} is not a ledger: {error!r}") from error
        if version != SCHEMA_VERSION:
            raise CertificateError(
                f"{self.path} is a ledger of schema version {version!r}; this release reads "
                f"version {SCHEMA_VERSION}"
            )
        return content


def _write(target: Path, content: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = target.with_name(target.name + ".lock")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                raise InvalidArgumentError(
                    "path", f"a lock held for {_PATIENCE:g} s: {lock}", "free; remove a stale lock"
                ) from None
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
