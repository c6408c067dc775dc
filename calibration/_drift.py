"""Drift of the scores or exit depths, without labels, at a level that holds on long streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptive.calibration._edetector import (
    Array,
    EDetectorState,
    Flags,
    advance,
    check_state,
    fresh_state,
    restarted,
    stream_flags,
)
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._mixture import mixture_upper_bound
from adaptive.calibration._probability import equal_mass_edges
from adaptive.calibration._state_io import pack_state, read_settings, unpack_state
from adaptive.calibration._unit_tables import (
    cut_points,
    set_aside,
    unit_codes,
    unit_shares,
    vector,
)
from adaptive.calibration._validation import (
    Rng,
    as_floats,
    check_count,
    check_number,
    check_probability,
)

_FRACTIONS = np.geomspace(0.02, 0.9, 6)


@dataclass(frozen=True)
class ScoreDrift:
    r"""Alarm when scores (or exit depths) no longer come from the calibration's law.

    A unit is summed up by features in [0, 1]: the share of its scores in each of J cells, their
    mean rank, and one minus it. Feature j has an upper confidence bound :math:`m_j` on its mean,
    from the calibration units, all valid at once with probability at least 1 - delta, and a
    Shiryaev-Roberts e-detector against "its mean is at most m_j" as in `RiskMonitor`. The
    evidence is their weighted mean: half for the two ranks, half for the cells.

    Parameters
    ----------
    edges : tuple of float [J - 1]
        Inner edges of the cells; a score on an edge belongs to the cell above.
    limits : tuple of float [J + 2]
        :math:`m_j`: cells, rank, reversed rank; 1 where nothing can be said.
    delta : float
        Probability that some limit is wrong.
    average_run_length : float
        A, above 1.
    warn : float
        Share of the threshold at which a warning is on.

    Notes
    -----
    P(false alarm within T units) <= T/A + delta, and the mean run length is at least A whenever
    the limits hold: for units drawn independently from the calibration's law, for every T. The
    limits are the finite-calibration slack: betting on conformal p-values against a fixed
    calibration set without one is sure to alarm in the end, because that set is not the law.

    An alarm says that inputs have moved, not that the promise is broken; and a change that leaves
    the law of the scores as it is cannot be seen without labels. Use it to raise audits (its
    warning as `warned` of `EvidenceAudits`), and a `RiskMonitor` for what is promised. To sum
    several drifts (scores at each exit, depths) into one promise: `combine_evidence`, with
    delta added up.

    References
    ----------
    Shin, Ramdas and Rinaldo (2024), doi:10.51387/23-NEJSDS51; on the missing slack, Shaer et al.
    (2026) and the note in docs/monitoring.md.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> drift = ScoreDrift.fit(rng.normal(size=2000), average_run_length=10_000)
    >>> state = drift.init()
    >>> while not drift.alarm(state)[0]:
    ...     state = drift.update(state, drift.features(rng.normal(size=1) - 1.0))
    >>> bool(state.units[0] < 100)
    True
    """

    edges: tuple[float, ...]
    limits: tuple[float, ...]
    delta: float
    average_run_length: float = 1e5
    warn: float = 0.1

    def __post_init__(self) -> None:
        for name in ("edges", "limits"):
            if not isinstance(getattr(self, name), tuple):
                raise InvalidTypeError(name, getattr(self, name), "a tuple of numbers")
        cut_points(self.edges)
        if len(self.limits) != len(self.edges) + 3:
            raise InvalidArgumentError("limits", self.limits, f"{len(self.edges) + 3} numbers")
        if not all(0.0 < check_number("limits", limit) <= 1.0 for limit in self.limits):
            raise InvalidArgumentError("limits", self.limits, "in (0, 1]")
        check_probability("delta", self.delta)
        if check_number("average_run_length", self.average_run_length) <= 1.0:
            raise InvalidArgumentError("average_run_length", self.average_run_length, "above 1")
        check_probability("warn", self.warn)

    @classmethod
    def fit(
        cls,
        scores: ArrayLike,
        unit_ids: ArrayLike | None = None,
        *,
        delta: float = 0.05,
        cells: int = 8,
        edges: ArrayLike | None = None,
        average_run_length: float = 1e5,
        warn: float = 0.1,
        rng: Rng = None,
    ) -> ScoreDrift:
        """Cells and limits from calibration units.

        Parameters
        ----------
        scores : array_like [n_tokens]
            Of calibration units; for exit depths the stage numbers, with ``edges=range(1, K)``.
        unit_ids : array_like [n_tokens], optional
            Which unit a score is of; every score its own unit if left out.
        delta, average_run_length, warn
            As in the class.
        cells : int
            At most so many, equally full, with edges from a fifth of the units set aside for it.
        edges : array_like, optional
            Edges fixed beforehand: nothing is set aside.
        rng : int, Generator or None
            Draws the fifth.
        """
        check_probability("delta", delta)
        check_count("cells", cells, least=2)
        s = vector("scores", scores)
        codes = unit_codes(unit_ids, s.size)
        if edges is None:
            aside = set_aside(codes, rng)
            cuts = _cuts(s[aside], cells)
            s, codes = s[~aside], np.unique(codes[~aside], return_inverse=True)[1]
        else:
            cuts = cut_points(edges)
        table = _features(s, codes, cuts)
        limits = mixture_upper_bound(table, delta=delta / table.shape[1])
        return cls(
            tuple(cuts.tolist()),
            tuple(limits.tolist()),
            float(delta),
            float(average_run_length),
            float(warn),
        )

    @property
    def threshold(self) -> float:
        """The average run length A."""
        return float(self.average_run_length)

    def features(self, scores: ArrayLike, unit_ids: ArrayLike | None = None) -> Array:
        """Features of units [n_units, J + 2].

        Parameters
        ----------
        scores : array_like [n_tokens]
        unit_ids : array_like [n_tokens], optional
            Units in order of first appearance; all scores are one unit's if left out.
        """
        s = vector("scores", scores)
        codes = np.zeros(s.size, np.intp) if unit_ids is None else unit_codes(unit_ids, s.size)
        return _features(s, codes, np.asarray(self.edges))

    def init(self, streams: int = 1) -> EDetectorState:
        """State before the first unit of every stream."""
        return fresh_state(streams, len(self.limits) * _FRACTIONS.size)

    def update(
        self, state: EDetectorState, features: ArrayLike, *, active: ArrayLike | None = None
    ) -> EDetectorState:
        """State after one more unit per stream.

        Parameters
        ----------
        state : EDetectorState
        features : array_like [n_streams, J + 2]
            From `features`; not read where not `active`.
        active : array_like of bool [n_streams], optional
            Streams that have a unit.
        """
        check_state(state, EDetectorState, len(self.limits) * _FRACTIONS.size)
        on = stream_flags("active", active, state.streams)
        table = as_floats("features", features)
        shape = (state.streams, len(self.limits))
        if table.shape != shape:
            raise InvalidArgumentError("features", f"shape {table.shape}", f"of shape {shape}")
        if not ((table >= 0.0) & (table <= 1.0))[on].all():
            raise InvalidArgumentError("features", features, "in [0, 1]")
        limits = np.asarray(self.limits)
        bets = np.where(limits < 1.0, 1.0 / limits, 0.0)[:, None] * _FRACTIONS
        gains = np.where(on[:, None], table - limits, 0.0)
        factors = (1.0 + gains[:, :, None] * bets).reshape(state.statistics.shape)
        moved = advance(state.statistics, factors, weight=1.0, threshold=self.threshold)
        statistics = np.where(on[:, None], moved, state.statistics)
        units = state.units + on
        after = EDetectorState(statistics, units, state.labelled, state.first_alarm)
        new = (self.evidence(after) >= self.threshold) & (state.first_alarm == 0) & on
        return EDetectorState(
            statistics, units, state.labelled, np.where(new, units, state.first_alarm)
        )

    def evidence(self, state: EDetectorState) -> Array:
        """Evidence for a drift [n_streams]; the alarm is on at `threshold`."""
        return np.asarray(np.add.reduce(state.statistics * self._weights(), axis=1))

    def contributions(self, state: EDetectorState) -> Array:
        """Each feature's part in the evidence [n_streams, J + 2]; the largest is the diagnosis."""
        parts = state.statistics * self._weights()
        return np.asarray(parts.reshape(state.streams, len(self.limits), -1).sum(axis=2))

    def alarm(self, state: EDetectorState) -> Flags:
        """Whether the alarm has ever been on [n_streams]; it stays on until `restart`."""
        return np.asarray(state.first_alarm > 0)

    def warning(self, state: EDetectorState) -> Flags:
        """Whether the evidence is at least `warn` times the threshold now [n_streams]."""
        return np.asarray(self.evidence(state) >= self.warn * self.threshold)

    def restart(self, state: EDetectorState, streams: ArrayLike) -> EDetectorState:
        """State in which the chosen streams begin anew, with a new promise."""
        return restarted(state, streams)

    def to_dict(self, state: EDetectorState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> EDetectorState:
        """State from `to_dict`; refuses one written by another drift or other settings."""
        return unpack_state(self, data, EDetectorState)

    def settings(self) -> dict[str, Any]:
        """JSON-ready settings; ``ScoreDrift.from_settings`` reads them."""
        return asdict(self)

    @classmethod
    def from_settings(cls, data: Mapping[str, Any]) -> ScoreDrift:
        """Detector from `settings`."""
        return cls(**read_settings(cls, data, tuples=("edges", "limits")))

    def _weights(self) -> Array:
        """Weight of every statistic [(J + 2) * n_bets]."""
        n_cells = len(self.limits) - 2
        shares = np.append(np.full(n_cells, 0.5 / n_cells), [0.25, 0.25])
        return np.repeat(shares, _FRACTIONS.size) / _FRACTIONS.size


def _cuts(scores: Array, cells: int) -> Array:
    """Edges of equally full cells; of a constant score: below it, at it, above it."""
    cuts = equal_mass_edges(scores, cells)
    return cuts if cuts.size else np.array([scores[0], np.nextafter(scores[0], np.inf)])


def _features(scores: Array, codes: Any, edges: Array) -> Array:
    """Cell shares, mean rank and its reverse [n_units, J + 2]."""
    cells = np.searchsorted(edges, scores, side="right")
    shares, _ = unit_shares(cells, scores, codes, edges.size + 1)
    rank = shares @ (np.arange(edges.size + 1) / max(edges.size, 1))
    rank = np.clip(rank, 0.0, 1.0)
    return np.column_stack([shares, rank, 1.0 - rank])
