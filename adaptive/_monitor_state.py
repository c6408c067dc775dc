"""What a monitor is told before the first unit, where it stands, and what follows for units."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive._monitor_channels import Signs
from adaptive._monitor_records import JournalError, Status, Unit
from adaptive.calibration import (
    AbstractAudits,
    AbstractRiskMonitor,
    EDetectorState,
    ExpectedLossCurve,
    InvalidArgumentError,
    RecoveryTest,
    ScoreAudits,
)
from adaptive.calibration._validation import check_count, check_number

#: Fields of a state that are plain values.
_COUNTS = (
    "status",
    "epoch",
    "next_unit",
    "finished",
    "labelled",
    "outside",
    "loss_sum",
    "weight_sum",
    "remaining",
)


@dataclass(frozen=True)
class Rules:
    """Everything a monitor was told before the first unit.

    Parameters
    ----------
    member : int
        Certified member of the path.
    detector : AbstractRiskMonitor
        Evidence that the loss exceeds its bound, with its promise about false alarms.
    recovery : RecoveryTest
        Evidence that it is below the bound again, with its promise about wrong resumes.
    audits : AbstractAudits
        Chance that a unit gets a label.
    curve : ExpectedLossCurve, optional
        Upper limit of a unit's expected loss given its score.
    curve_weight : float
        Share of the alarm's evidence that comes from bets on the excess over the curve, in [0, 1].
    tighten : int
        Steps back towards safer members while a warning is on.
    probation : int
        Labelled units that probation lasts.
    seed : int
        Of the audit coins.
    signs : Signs
        Signs without labels, for warnings.
    awaited : int
        Most labels that are waited for; older ones are given up.
    """

    member: int
    detector: AbstractRiskMonitor
    recovery: RecoveryTest
    audits: AbstractAudits
    curve: ExpectedLossCurve | None = None
    curve_weight: float = 0.0
    tighten: int = 0
    probation: int = 50
    seed: int = 0
    signs: Signs = field(default_factory=Signs)
    awaited: int = 1000

    def __post_init__(self) -> None:
        if not 0.0 <= check_number("curve_weight", self.curve_weight) <= 1.0:
            raise InvalidArgumentError("curve_weight", self.curve_weight, "in [0, 1]")
        if self.curve is None and (self.curve_weight > 0 or isinstance(self.audits, ScoreAudits)):
            raise InvalidArgumentError(
                "policy",
                "a certificate without a curve of expected losses",
                "calibrated by this version on at least 10 test units, for bets against the curve "
                "or audits by score",
            )
        for name in ("tighten", "probation", "seed", "awaited"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that tell these rules from others."""
        kinds = {
            name: {"type": type(getattr(self, name)).__name__}
            for name in ("detector", "recovery", "audits")
        }
        return {
            name: kinds.get(name, {}) | value if name in kinds else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Plan:
    """What the units that begin now will run under, fixed by the past alone.

    Parameters
    ----------
    status : str
    epoch : int
    member : int
        Member of the path; 0 is full computation.
    warned : bool
        Whether audits are as frequent as a warning asks.
    """

    status: Status
    epoch: int
    member: int
    warned: bool


@dataclass(frozen=True)
class MonitorState:
    """Where a monitor stands.

    Parameters
    ----------
    status : {"ok", "warn", "fallback", "probation"}
    epoch : int
        Number of withdrawals and resumptions.
    next_unit : int
        Number of the next unit to begin.
    finished, labelled, outside : int
        Units so far: all, those with an observed loss of the policy's own, those outside.
    loss_sum, weight_sum : float
        Sums of those losses, and of ones, each over the chance that its unit would be audited: the
        ratio estimates the mean loss of all units of the policy, audited or not.
    remaining : int
        Labelled units that probation still lasts.
    awaiting : tuple of Unit
        Audited units whose labels have not come.
    promise : EDetectorState
        Evidence against the promise.
    curve : EDetectorState
        Evidence against the curve of expected losses.
    recovery : EDetectorState
        Evidence for recovery.
    signs : dict
        States of the signs without labels.
    """

    promise: EDetectorState
    curve: EDetectorState
    recovery: EDetectorState
    signs: dict[str, Any]
    status: Status = "ok"
    epoch: int = 0
    next_unit: int = 0
    finished: int = 0
    labelled: int = 0
    outside: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    remaining: int = 0
    awaiting: tuple[Unit, ...] = ()

    def to_dict(self, rules: Rules) -> dict[str, Any]:
        """JSON form, exact to the last bit."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {
            "promise": rules.detector.to_dict(self.promise),
            "curve": rules.detector.to_dict(self.curve),
            "recovery": rules.recovery.to_dict(self.recovery),
            "signs": rules.signs.to_dict(self.signs),
            "awaiting": [unit.to_dict() for unit in self.awaiting],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], rules: Rules) -> MonitorState:
        """Rebuild from :meth:`to_dict`, for a monitor with the same rules.

        Raises
        ------
        JournalError
            If fields are missing or detectors have other settings.
        """
        try:
            return cls(
                promise=rules.detector.from_dict(data["promise"]),
                curve=rules.detector.from_dict(data["curve"]),
                recovery=rules.recovery.from_dict(data["recovery"]),
                signs=rules.signs.from_dict(data["signs"]),
                awaiting=tuple(Unit.from_dict(unit) for unit in data["awaiting"]),
                **{name: data[name] for name in _COUNTS},
            )
        except (KeyError, TypeError, InvalidArgumentError) as error:
            raise JournalError(
                f"not a state of this monitor: {error}. If it is a snapshot, delete it: the "
                "journal alone is enough"
            ) from error


def first_state(rules: Rules) -> MonitorState:
    """State before the first unit."""
    return MonitorState(
        promise=rules.detector.init(),
        curve=rules.detector.init(),
        recovery=rules.recovery.init(),
        signs=rules.signs.init(),
    )
