"""What a certificate keeps of its calibration so that a monitor can be built from it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from adaptive._monitor_channels import Signs
from adaptive._run import Run
from adaptive.calibration import Certificate, CertificateError, ExpectedLossCurve

_SCHEMA = 1
_KEY = "monitor"
#: Most calibration units that are kept; a random part of more is as good for a sign.
_KEPT = 1000
#: Fewest units behind a curve.
_FEWEST = 10
#: Probability that the curve does not hold.
_DELTA = 0.05


@dataclass(frozen=True)
class Reference:
    """Test units under the certified member, as a monitor will see later units.

    Parameters
    ----------
    scores, depths : tuple of float
        Mean exit score (of units that were asked at all) and mean layers per token.
    curve : ExpectedLossCurve, optional
        Upper limit of a unit's expected loss given its mean exit score.
    """

    scores: tuple[float, ...] = ()
    depths: tuple[float, ...] = ()
    curve: ExpectedLossCurve | None = None

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        losses: NDArray[np.float64],
        *,
        exits: tuple[int, ...],
        layers: int,
        bound: float = 1.0,
        members: int = 1,
        clusters: NDArray[Any] | None = None,
    ) -> Self:
        """Sum up the runs of the certified member on the test split.

        Parameters
        ----------
        runs : sequence of Run
        losses : ndarray [n_units]
        exits : tuple of int
            Layers below each exit.
        layers : int
        bound : float
            Of the losses. Where some are negative no curve is kept.
        members : int
            Members that the certified one was chosen from on these units: curves of all of them
            are meant to hold at once.
        clusters : ndarray [n_units], optional
            Where units come in clusters, the curve counts clusters, and scores and depths, which
            are then no independent draws, are not kept.
        """
        seen = [unit_summary(run, exits=exits, layers=layers) for run in runs]
        asked = [i for i, (score, _) in enumerate(seen) if score is not None]
        scores = [score for score, _ in seen if score is not None]
        names = np.arange(len(runs)) if clusters is None else clusters
        curve = None
        if len(np.unique(names[asked])) >= _FEWEST and losses.min() >= 0.0:
            curve = ExpectedLossCurve.fit(
                scores,
                losses[asked],
                names[asked],
                confidence=1.0 - _DELTA / members,
                upper=bound,
                rng=0,
            )
        if clusters is not None:
            return cls(curve=curve)
        depths = tuple(depth for _, depth in seen[:_KEPT])
        return cls(tuple(scores[:_KEPT]), depths, curve)

    def signs(self, *, average_run_length: float) -> Signs:
        """Detectors that need no labels."""
        return Signs.fit(self.scores, self.depths, average_run_length=average_run_length)

    def to_evidence(self) -> dict[str, Any]:
        """Entry of a certificate's evidence."""
        kept = {
            "schema": _SCHEMA,
            "scores": [float(f"{score:.7g}") for score in self.scores],
            "depths": [float(f"{depth:.7g}") for depth in self.depths],
            "curve": None if self.curve is None else self.curve.to_dict(),
        }
        return {_KEY: json.loads(json.dumps(kept))}


def read_reference(certificate: Certificate) -> Reference:
    """Return what a certificate keeps for a monitor; nothing, if it was made without.

    Raises
    ------
    CertificateError
        If it was written by another version.
    """
    data = certificate.evidence.get(_KEY)
    if data is None:
        return Reference()
    if data.get("schema") != _SCHEMA:
        raise CertificateError(
            f"the certificate's monitor schema {data.get('schema')!r} is not readable by this "
            f"version (it reads {_SCHEMA})"
        )
    curve = data["curve"]
    return Reference(
        scores=tuple(data["scores"]),
        depths=tuple(data["depths"]),
        curve=None if curve is None else ExpectedLossCurve.from_dict(curve),
    )


def unit_summary(run: Run, *, exits: tuple[int, ...], layers: int) -> tuple[float | None, float]:
    """Mean exit score of a run (``None`` if no exit was asked) and its mean depth.

    The first token is read off the prompt at full depth and is not counted. A token that goes on at
    full depth after a withdrawal has a score that is not finite, or none.
    """
    scores = run.scores[np.isfinite(run.scores)]
    depth = np.array([*exits, layers], dtype=np.float64)[run.stages[1:]]
    return (
        float(scores.mean()) if scores.size else None,
        float(depth.mean()) if depth.size else float(layers),
    )
