"""Loss columns that come from a trace: what a certificate records of them, and how they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._risk_curve import (
    DepartureCurve,
    RiskCurve,
    stopped_departures,
    stopped_means,
)
from adaptive.calibration._trace import Trace

Curve = RiskCurve | DepartureCurve
Column = Callable[[int], NDArray[np.float64]]


def origin_of(curve: Curve) -> dict[str, Any]:
    """Return what is needed, beside the trace, to compute the curve's columns again.

    Raises
    ------
    InvalidArgumentError
        If the first threshold is not full computation, or units are weighted.
    """
    if curve.thresholds[0] != np.inf:
        raise InvalidArgumentError(
            "thresholds", f"{curve.thresholds[0]:g} first", "inf first: column 0 never stops"
        )
    if curve.trace.weights is not None:
        raise InvalidArgumentError(
            "trace", "weighted units", "unweighted; `shifted_losses` tests weighted ones"
        )
    return {
        "curve": "departures" if isinstance(curve, DepartureCurve) else "means",
        "loss": curve.loss,
        "warmup": curve.warmup,
        "thresholds": [str(float(threshold)) for threshold in curve.thresholds],
    }


def columns_from(origin: Mapping[str, Any], trace: Trace) -> Column:
    """Return the provider of the columns that `origin_of` described, for a trace."""
    if origin["loss"] not in trace.losses:
        names = ", ".join(map(repr, trace.losses))
        raise InvalidArgumentError("trace", f"losses {names}", f"with a loss {origin['loss']!r}")
    stopped = stopped_departures if origin["curve"] == "departures" else stopped_means

    def read(column: int) -> NDArray[np.float64]:
        threshold = float(origin["thresholds"][column])
        return stopped(trace, threshold, loss=origin["loss"], warmup=origin["warmup"])

    return read
