"""The rules of a monitor from a policy's certificate: what is promised, and how it is watched."""

from __future__ import annotations

from adaptive._monitor_reference import read_reference
from adaptive._monitor_state import Rules
from adaptive.calibration import (
    AbstractAudits,
    AbstractRiskMonitor,
    Certificate,
    EvidenceAudits,
    ExpectedLossCurve,
    InvalidArgumentError,
    InvalidTypeError,
    LifetimeRiskMonitor,
    RecoveryTest,
    ScoreAudits,
    UniformAudits,
    UnsupportedError,
    corrected_range,
)
from adaptive.policies import Mode, Policy

#: Units between false warnings of each sign without labels, on average.
_SIGN_RUN_LENGTH = 1e4


def rules_for(
    policy: Policy,
    *,
    alpha: float,
    beta: float,
    detector: AbstractRiskMonitor | None,
    audits: AbstractAudits | None,
    curve_weight: float,
    tighten: int,
    probation: int,
    seed: int,
) -> Rules:
    """Return everything a monitor is told before the first unit.

    Parameters and errors as :meth:`~adaptive.monitoring.Monitor.for_policy` has them.
    """
    certificate, risk, bound = _promise(policy)
    if tighten and "knobs" not in certificate.evidence:
        raise InvalidArgumentError(
            "tighten", tighten, "0 for a certificate that names no members of a path"
        )
    reference = read_reference(certificate)
    audits = _audits(audits, policy.mode)
    if detector is None:
        lower, upper = _range(audits, reference.curve, bound)
        detector = LifetimeRiskMonitor(risk, alpha=alpha, lower=lower, upper=upper, warn=0.25)
    else:
        _check_detector(detector, risk, bound)
    low = 0.0 if isinstance(audits, ScoreAudits) else min(0.0, detector.lower)
    return Rules(
        member=certificate.index or 0,
        detector=detector,
        recovery=RecoveryTest(detector.bound, beta=beta, lower=low, upper=bound),
        audits=audits,
        curve=reference.curve,
        curve_weight=curve_weight,
        tighten=tighten,
        probation=probation,
        seed=seed,
        signs=reference.signs(average_run_length=_SIGN_RUN_LENGTH),
    )


def _promise(policy: Policy) -> tuple[Certificate, float, float]:
    """Return a policy's certificate, the risk it promises and the bound of the loss."""
    if not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    certificate = policy.certificate
    if certificate is None:
        raise InvalidArgumentError(
            "policy", "a policy without a certificate", "calibrated: there is no promise here"
        )
    if policy.mode == "verify":
        raise UnsupportedError("`verify` mode has no risk to watch: its text is the model's")
    if isinstance(certificate.risk, dict) or isinstance(certificate.bound, dict):
        raise UnsupportedError("a certificate of several risks cannot be monitored yet")
    return certificate, certificate.risk, certificate.bound


def _audits(audits: AbstractAudits | None, mode: Mode) -> AbstractAudits:
    """Return the audits asked for; by default all units where labels are free, else a part."""
    if audits is None:
        return UniformAudits(1.0) if mode == "exact" else EvidenceAudits(0.1, 0.5)
    if not isinstance(audits, AbstractAudits):
        allowed = "UniformAudits, EvidenceAudits or ScoreAudits"
        raise InvalidTypeError("audits", audits, allowed)
    return audits


def _check_detector(detector: AbstractRiskMonitor, risk: float, bound: float) -> None:
    """Refuse a detector that would watch over less than what is promised."""
    if not isinstance(detector, AbstractRiskMonitor):
        raise InvalidTypeError("detector", detector, "a RiskMonitor or LifetimeRiskMonitor")
    if detector.bound > risk or detector.upper < bound:
        raise InvalidArgumentError(
            "detector",
            detector,
            f"one with a bound of at most the {risk:g} promised, for losses up to {bound:g}",
        )


def _range(
    audits: AbstractAudits, curve: ExpectedLossCurve | None, bound: float
) -> tuple[float, float]:
    """Return the ends of what the detector is fed: losses, or, by score, their corrections."""
    if not isinstance(audits, ScoreAudits) or curve is None:
        return 0.0, bound
    expected = [*curve.values, curve.upper]  # the last where there is no score
    chances = audits.probabilities(len(expected), expected=expected)
    low, high = corrected_range(expected, chances, upper=bound)
    room = 1e-9 * (high - low)  # for the last bits
    return low - room, high + room
