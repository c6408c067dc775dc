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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import check_count

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
_CEILING = 1e9  # times the threshold, where the alarm has long been on


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
    return np.minimum(factors * (statistics + weight), _CEILING * threshold)


def restarted(state: EDetectorState, streams: ArrayLike) -> EDetectorState:
    """State in which the chosen streams (mask or indices) are as before their first unit."""
    chosen = np.asarray(streams)
    fresh = EDetectorState(
        state.statistics.copy(), state.units.copy(), state.labelled.copy(), state.first_alarm.copy()
    )
    for array in (fresh.statistics, fresh.units, fresh.labelled, fresh.first_alarm):
        array[chosen] = 0
    return fresh


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
    values = np.asarray(evidence, dtype=np.float64)
    if values.ndim == 0 or values.size == 0 or np.isnan(values).any():
        raise InvalidArgumentError("evidence", evidence, "non-empty and without NaN")
    shares = np.ones(values.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != values.shape[-1:] or not (shares >= 0.0).all() or shares.sum() <= 0.0:
        raise InvalidArgumentError("weights", weights, f"{values.shape[-1]} non-negative numbers")
    return np.asarray(values @ (shares / shares.sum()))


def stream_values(
    name: str, values: ArrayLike, streams: int, *, on: Flags, low: float, high: float
) -> Array:
    """Return `values` [n_streams] checked against [low, high] where `on`."""
    array = np.asarray(values, dtype=np.float64)
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
