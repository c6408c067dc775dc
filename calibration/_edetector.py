r"""E-detectors: evidence that a change has happened, restarted at every unit, over many streams.

An e-factor L is a non-negative function of the next unit with mean at most 1, given the past, while
nothing has changed. For weights :math:`v_t` known beforehand the statistic

.. math:: M_t = L_t (M_{t-1} + v_t), \qquad M_0 = 0

bets a fresh :math:`v_t` on "the change begins at unit t", for every t at once, in O(1). With
:math:`v_t = 1` it is the Shiryaev-Roberts e-detector: M_t - t is a supermartingale, so that the
mean time to :math:`M_t \ge A` is at least A, and P(alarm within T units) is at most T/A. With
weights that sum to 1, M plus the weight not yet spent is a supermartingale from 1, and P(it ever
reaches 1/alpha) is at most alpha. A weighted mean over several bets keeps both.

Numerically: between alarms every statistic lies between the smallest factor times the smallest
weight and the ceiling, so nothing underflows or overflows however long the stream; no logarithms.

References
----------
Shin, Ramdas and Rinaldo (2024), E-detectors, doi:10.51387/23-NEJSDS51. Roberts (1966),
doi:10.1080/00401706.1966.10490374.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import as_floats, check_count

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
_CEILING = 1e9  # times the threshold, where the alarm has long been on
_LARGEST = 1e300


@dataclass(frozen=True, eq=False)
class EDetectorState:
    """State of an e-detector on many streams.

    Parameters
    ----------
    statistics : ndarray [n_streams, n_bets]
        One restarted statistic per bet.
    units : ndarray of int [n_streams]
        Units seen, with a label or without.
    labelled : ndarray of int [n_streams]
        Units seen with a label.
    first_alarm : ndarray of int [n_streams]
        Number of the unit at which the alarm was first on; 0 while it has not been.
    """

    statistics: Array
    units: NDArray[np.int64]
    labelled: NDArray[np.int64]
    first_alarm: NDArray[np.int64]

    @property
    def streams(self) -> int:
        """Number of streams."""
        return self.units.size


def fresh_state(streams: int, n_bets: int) -> EDetectorState:
    """State before the first unit."""
    check_count("streams", streams)
    counts = np.zeros(streams, np.int64)
    return EDetectorState(np.zeros((streams, n_bets)), counts, counts, counts)


def advance(statistics: Array, factors: Array, *, weight: float | Array, threshold: float) -> Array:
    """Return ``factors * (statistics + weight)`` [n_streams, n_bets], finite after an alarm."""
    with np.errstate(over="ignore"):
        return np.minimum(factors * (statistics + weight), min(_CEILING * threshold, _LARGEST))


def restarted(state: EDetectorState, streams: ArrayLike) -> EDetectorState:
    """State in which the chosen streams (mask or indices) are as before their first unit."""
    chosen = chosen_streams(streams, state.streams)
    fresh = EDetectorState(
        state.statistics.copy(), state.units.copy(), state.labelled.copy(), state.first_alarm.copy()
    )
    for array in (fresh.statistics, fresh.units, fresh.labelled, fresh.first_alarm):
        array[chosen] = 0
    return fresh


def chosen_streams(streams: ArrayLike, n_streams: int) -> Flags:
    """Return which streams a mask or indices choose [n_streams]."""
    wanted = np.atleast_1d(np.asarray(streams))
    chosen = np.zeros(n_streams, bool)
    if wanted.dtype == bool and wanted.shape == (n_streams,):
        return wanted
    if wanted.size == 0:
        return chosen
    if wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= n_streams:
        allowed = f"a mask of shape ({n_streams},) or indices from 0 to {n_streams - 1}"
        raise InvalidArgumentError("streams", streams, allowed)
    chosen[wanted] = True
    return chosen


def check_state(state: Any, kind: type[Any], n_statistics: int | None = None) -> None:
    """Raise unless `state` is of this kind, with so many statistics per stream."""
    if not isinstance(state, kind):
        raise InvalidTypeError("state", state, f"a {kind.__name__} from `init`")
    if n_statistics is not None and state.statistics.shape[1:] != (n_statistics,):
        found = f"{state.statistics.shape[1]} statistics per stream"
        allowed = f"from this detector's `init`, with {n_statistics} statistics per stream"
        raise InvalidArgumentError("state", found, allowed)


def combine_evidence(evidence: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    """Evidence of several e-detectors with the same promise as that of one of them.

    The weighted mean over the last axis of `RiskMonitor.evidence` values: an e-detector again,
    under any dependence between the streams, so one threshold and one promise cover layers,
    tenants, or a risk monitor together with a score drift. The largest term is the diagnosis.

    Parameters
    ----------
    evidence : array_like [..., n_detectors]
        Of detectors with the same threshold, which read the same units.
    weights : array_like [n_detectors], optional
        Non-negative, fixed beforehand; equal if left out.

    Returns
    -------
    ndarray [...]
    """
    values = as_floats("evidence", evidence)
    if values.ndim == 0 or values.size == 0 or not (np.isfinite(values) & (values >= 0.0)).all():
        raise InvalidArgumentError("evidence", evidence, "non-empty, finite and not negative")
    shares = np.ones(values.shape[-1]) if weights is None else as_floats("weights", weights)
    usable = (np.isfinite(shares) & (shares >= 0.0)).all() and shares.sum() > 0.0
    if shares.shape != values.shape[-1:] or not usable:
        allowed = f"{values.shape[-1]} finite numbers, not negative and not all 0"
        raise InvalidArgumentError("weights", weights, allowed)
    return np.asarray(values @ (shares / shares.sum()))


def stream_values(
    name: str, values: ArrayLike, streams: int, *, on: Flags, low: float, high: float
) -> Array:
    """Return `values` [n_streams] checked against [low, high] where `on`."""
    array = as_floats(name, values)
    if array.shape != (streams,):
        raise InvalidArgumentError(name, f"shape {array.shape}", f"of shape ({streams},)")
    with np.errstate(invalid="ignore"):
        wrong = on & ~((array >= low) & (array <= high))
    if wrong.any():
        stream = int(np.argmax(wrong))
        place = f"{array[stream]} at stream {stream}"
        raise InvalidArgumentError(name, place, f"in [{low:g}, {high:g}]")
    return array


def stream_flags(name: str, flags: ArrayLike | None, streams: int) -> Flags:
    """Return `flags` as booleans [n_streams], all true if left out."""
    if flags is None:
        return np.ones(streams, bool)
    array = np.asarray(flags)
    if array.shape != (streams,) or array.dtype != bool:
        got = f"shape {array.shape} of {array.dtype}"
        raise InvalidArgumentError(name, got, f"booleans of shape ({streams},)")
    return array
