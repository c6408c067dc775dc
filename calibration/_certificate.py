"""The certificate: what is promised, for what, on what evidence; frozen, readable, portable."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from numpy.typing import ArrayLike

from adaptive.calibration._errors import CertificateError

SCHEMA_VERSION = 1
_PACKAGES = ("adaptive-control", "numpy", "scipy")


@dataclass(frozen=True)
class Verification:
    """Whether evidence was reproduced; true exactly if nothing differs.

    Parameters
    ----------
    differences : tuple of str
        One sentence per thing that differs, what was recorded and what was found.
    """

    differences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self:
            return "The evidence is reproduced, and the decision follows from it."
        return "Not reproduced:\n" + "\n".join(f"- {line}" for line in self.differences)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A statistical promise about one configuration, with all that is needed to check it.

    Parameters
    ----------
    holds : bool
        Whether a configuration beyond full computation is certified.
    risk, delta : float
        P(true risk <= risk) >= 1 - delta, over the draw of the calibration units. `risk` is a
        mapping from names to levels where several risks are promised at once. `delta` is 1 where
        the promise is an expectation over draws (conformal risk control) and has no confidence.
    loss, unit : str
        What is averaged, over what.
    method, procedure : str
        The test and the way of testing many configurations, as `control_risk` names them.
    n : int
        Independent units in the test.
    index : int or None
        Column that is certified for use; None is full computation.
    knob : float or None
        Value of the policy's knob at `index`, where there is one.
    cost : float or None
        Measured cost of `index`, where costs were given.
    evidence : dict
        Visited columns, their log p-values, levels and mean losses, as `verify` recomputes them.
        Procedures other than `control_risk` have a `"kind"`, a `"promise"` and a `"claim"` here.
    bound : float
        Declared upper bound of the loss (a mapping for several risks).
    assumptions, notes : tuple of str
        Sentences: what the guarantee rests on; what else a reader should know.
    split, fingerprints, decoding, versions : dict
        Seed and counts; hashes of data, model, exits; decoding settings; library versions.
    created : str
        ISO 8601 time.
    schema_version : int
        Version of this schema; others are refused when read.
    """

    holds: bool
    risk: float | dict[str, float]
    delta: float
    loss: str
    unit: str
    method: str
    procedure: str
    n: int
    index: int | None
    evidence: dict[str, Any]
    bound: float | dict[str, float]
    assumptions: tuple[str, ...]
    split: dict[str, Any]
    knob: float | None = None
    cost: float | None = None
    fingerprints: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    notes: tuple[str, ...] = ()
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema_version: int = SCHEMA_VERSION

    def __repr__(self) -> str:
        """Say the one line: evidence and hashes of hundreds of units are for `to_dict`."""
        return f"Certificate({self.summary})"

    def statement(self) -> str:
        """Return the promise as one paragraph of plain words, its limits included."""
        if not self.holds:
            return self._nothing()
        assumed = "; ".join(self.assumptions)
        drawn = f"the {self.n} calibration {self.unit}s"
        if self.evidence.get("kind") == "conformal":
            promise = (
                f"{self._claim()}, where the mean is over {drawn} and the next {self.unit} "
                f"together. It is an average over draws of the calibration {self.unit}s: a single "
                f"draw, this one included, may exceed the level, and no probability is given for "
                f"that."
            )
        else:
            about = (
                f"{self.unit}s on the whole"
                if "claim" in self.evidence
                else (f"the mean over {self.unit}s")
            )
            promise = (
                f"With probability at least {1 - self.delta:.6g} over the draw of {drawn}, "
                f"{self._claim()} on {self.unit}s drawn like them. The {self.delta:g} is the "
                f"chance that such a draw misleads the calibration; it is not a rate per "
                f"{self.unit}, and the promise is about {about}, not about each "
                f"one, nor about other traffic."
            )
        evidence = f"Evidence: {self.method} test, {self.procedure}."
        return " ".join([promise, evidence, f"Assumed: {assumed}.", *self.notes])

    def _nothing(self) -> str:
        tested = self.evidence.get("full_computation_tested", False)
        subject = "Nothing" if tested else "Nothing beyond full computation"
        without = "it has no certificate either" if tested else "its loss is zero by construction"
        sure = "" if self.evidence.get("kind") == "conformal" else f"delta = {self.delta:g}, "
        head = (
            f"{subject} is certified at {self._promise()} ({sure}{self.n} {self.unit}s, "
            f"{self.method} test, {self.procedure}). Full computation is used: {without}."
        )
        return " ".join([head, *self.notes])

    def _claim(self) -> str:
        if "claim" in self.evidence:
            return str(self.evidence["claim"])
        knob = "" if self.knob is None else f" (knob {self.knob:.6g})"
        return f"configuration {self.index}{knob} has {self._promise()}"

    @property
    def summary(self) -> str:
        """One line: the outcome, the promise, the evidence."""
        place = f"column {self.index}" if self.holds else "full computation (nothing certified)"
        expected = self.evidence.get("kind") == "conformal"
        sure = "in expectation" if expected else f"confidence {1 - self.delta:.6g}"
        return (
            f"{place}: {self._promise()}, {sure}, "
            f"n = {self.n} {self.unit}s, {self.method}, {self.procedure}"
        )

    def verify(
        self, losses: Any, *, groups: ArrayLike | None = None, scores: ArrayLike | None = None
    ) -> Verification:
        """Test the losses again and say what differs from this evidence and this decision.

        Parameters
        ----------
        losses : array_like, callable, Trace, or mapping of them
            What the procedure was given: the losses of the test split as `control_risk` takes
            them, units in the same order; or the trace, where they were read off one (a
            `RiskCurve`, a `DepartureCurve`, the scores and losses of `certify_halting`).
        groups : array_like, optional
            The groups that were given to `control_risk`.
        scores : array_like, optional
            The scores that were given to `certify_halting`, with losses as an array.

        Returns
        -------
        Verification
            True if every visited column's evidence is reproduced to 1e-6 relative, and the
            recorded decision follows from it; otherwise each difference in words.

        Raises
        ------
        UnsupportedError
            If there is no evidence, or it is of a kind or by a test that is not known here.
        """
        from adaptive.calibration._verifying import verify_certificate

        return verify_certificate(self, losses, groups=groups, scores=scores)

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as plain JSON-ready values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Return the certificate that `to_dict` wrote.

        Raises
        ------
        CertificateError
            If the schema version is unknown, or fields are missing or unknown.
        """
        if not isinstance(values, Mapping):
            raise CertificateError("a certificate must be a JSON object")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CertificateError(
                f"certificate schema version {version!r} is unknown; this library reads "
                f"version {SCHEMA_VERSION}"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(set(fields) - set(values))
        if unknown or missing:
            raise CertificateError(
                f"certificate fields do not fit: missing {missing}, unknown {unknown}"
            )
        lists = {name: tuple(values[name]) for name in ("assumptions", "notes")}
        return cls(**{**values, **lists})

    def to_json(self) -> str:
        """Return the certificate as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """Return the certificate that `to_json` wrote.

        Raises
        ------
        CertificateError
            If the text is not JSON or not a certificate of a known version.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CertificateError(f"a certificate must be JSON: {error}") from error
        return cls.from_dict(values)

    def __str__(self) -> str:
        return self.statement()

    def _promise(self) -> str:
        if "promise" in self.evidence:
            return str(self.evidence["promise"])
        if isinstance(self.risk, dict):
            return " and ".join(f"mean {name} <= {r:g}" for name, r in self.risk.items())
        return f"mean {self.loss} <= {self.risk:g}"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the evidence depends on."""
    return dict(_installed())


@functools.cache
def _installed() -> tuple[tuple[str, str], ...]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return tuple(versions.items())
