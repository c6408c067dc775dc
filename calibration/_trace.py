"""The trace: what happened on the calibration units at every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._trace_checks import (
    frozen,
    joined_arrays,
    require_compatible,
    require_no_nan,
    rows_per_chunk,
    stage_costs,
    token_loss,
    token_rows,
    unit_groups,
    unit_indices,
    unit_lengths,
    unit_names,
    unit_weights,
)
from adaptive.calibration._validation import Rng, as_generator, group_codes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trace:
    """Scores, losses and costs of calibration units, ragged by unit; checked and read-only.

    Tokens of all units lie one after another: unit ``u`` owns ``lengths[u]`` consecutive rows. A
    problem without tokens (images, votes) has one row per unit. Losses are relative to full
    computation, whose own loss is zero by construction and is not stored.

    Parameters
    ----------
    scores : array_like [n_tokens, n_exits]
        Score at every exit, kept as float32, the precision in which rules compare. Higher means
        more settled. ``-inf`` says that an exit has no score (it then never stops). NaN and
        ``inf`` are refused: an infinite score would stop even at threshold ``inf``, which stands
        for full computation.
    losses : mapping of str to array_like [n_tokens, n_exits]
        Loss of stopping the token at each exit, finite. Boolean, integer, float32 and float64
        arrays keep their type.
    costs : array_like [n_exits + 1]
        Cumulative cost of each stage, positive and increasing; the last is full computation.
    cost_quantity : str
        What `costs` count, with its unit: ``"seconds"``, ``"bytes"``, ``"FLOPs"``.
    lengths : array_like of int [n_units], optional
        Tokens per unit, each at least 1, summing to ``n_tokens``; one per unit if left out.
    unit_ids : sequence of str, optional
        A distinct name per unit; ``"0"``, ``"1"``, ... if left out.
    groups : array_like [n_units], optional
        Cluster of each unit: units of one cluster are never split.
    weights : array_like [n_units], optional
        Weight of each unit, finite, non-negative, not all zero.
    columns : mapping of str to array_like [n_tokens, ...], optional
        Anything else per token, such as ``answers [n_tokens, n_exits]``.

    Raises
    ------
    InvalidArgumentError
        If shapes disagree, names repeat, or a value is not allowed.

    Notes
    -----
    Values of memory-mapped arrays were checked when they were saved and are not read again at
    construction. Nothing is copied that already has the right type.

    Examples
    --------
    >>> trace = Trace(
    ...     scores=[[0.2, 0.9], [0.8, 0.9], [0.1, 0.3]],
    ...     losses={"disagreement": [[True, False], [False, False], [True, True]]},
    ...     costs=[1.0, 2.0, 4.0],
    ...     cost_quantity="FLOPs",
    ...     lengths=[2, 1],
    ... )
    >>> trace
    Trace(2 units, 3 tokens, 2 exits; losses: disagreement; costs in FLOPs)
    """

    scores: NDArray[np.float32]
    losses: Mapping[str, NDArray[Any]]
    costs: NDArray[np.float64]
    cost_quantity: str
    lengths: NDArray[np.int64] = None  # type: ignore[assignment]
    unit_ids: tuple[str, ...] = None  # type: ignore[assignment]
    groups: NDArray[Any] | None = None
    weights: NDArray[np.float64] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scores = token_rows("scores", self.scores, None, np.float32)
        if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] == 0:
            raise InvalidArgumentError("scores", f"shape {scores.shape}", "[n_tokens, n_exits]")
        n_tokens, n_exits = scores.shape
        lengths = unit_lengths(self.lengths, n_tokens)
        losses = {
            name: token_loss(name, value, scores.shape) for name, value in self.losses.items()
        }
        if not losses:
            raise InvalidArgumentError("losses", "an empty mapping", "at least one named loss")
        columns = {
            name: token_rows(f"columns[{name!r}]", value, n_tokens, None)
            for name, value in self.columns.items()
        }
        require_no_nan("scores", scores, lowest=True)
        if not isinstance(self.cost_quantity, str) or not self.cost_quantity:
            raise InvalidTypeError("cost_quantity", self.cost_quantity, "a word such as 'seconds'")
        values = {
            "scores": frozen(scores),
            "losses": MappingProxyType(losses),
            "costs": stage_costs(self.costs, n_exits),
            "lengths": frozen(lengths),
            "unit_ids": unit_names(self.unit_ids, lengths.size),
            "groups": unit_groups(self.groups, lengths.size),
            "weights": unit_weights(self.weights, lengths.size),
            "columns": MappingProxyType(columns),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Trace({self.n_units} units, {self.n_tokens} tokens, {self.n_exits} exits; "
            f"losses: {', '.join(self.losses)}; costs in {self.cost_quantity})"
        )

    def __len__(self) -> int:
        return self.n_units

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _rebuilt, ({**values, "losses": {**self.losses}, "columns": {**self.columns}},)

    @property
    def n_units(self) -> int:
        """Number of units."""
        return int(self.lengths.size)

    @property
    def n_tokens(self) -> int:
        """Number of rows over all units."""
        return int(self.scores.shape[0])

    @property
    def n_exits(self) -> int:
        """Number of exits; stages are the exits and full computation after them."""
        return int(self.scores.shape[1])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """First row of each unit, and ``n_tokens`` at the end [n_units + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def unit_of_token(self) -> NDArray[np.int64]:
        """Index of the unit that owns each row [n_tokens]."""
        return np.repeat(np.arange(self.n_units), self.lengths)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Position of each row inside its unit, from 0 [n_tokens]."""
        return np.arange(self.n_tokens) - np.repeat(self.offsets[:-1], self.lengths)

    def select(self, units: ArrayLike) -> Self:
        """Trace of some units, in the order asked for.

        Parameters
        ----------
        units : array_like of int or bool [n_selected] or [n_units]
            Indices of units, each at most once, or a mask over units.

        Raises
        ------
        InvalidArgumentError
            If an index is out of range or repeated, or nothing is selected.
        """
        chosen = unit_indices(units, self.n_units)
        lengths = self.lengths[chosen]
        starts = self.offsets[:-1][chosen]
        shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        rows = np.arange(int(lengths.sum())) + shift
        return replace(
            self,
            scores=self.scores[rows],
            losses={name: loss[rows] for name, loss in self.losses.items()},
            lengths=lengths,
            unit_ids=tuple(self.unit_ids[unit] for unit in chosen),
            groups=None if self.groups is None else self.groups[chosen],
            weights=None if self.weights is None else self.weights[chosen],
            columns={name: column[rows] for name, column in self.columns.items()},
        )

    def split(self, fractions: Sequence[float], *, rng: Rng = None) -> tuple[Self, ...]:
        """Cut the units at random into disjoint parts that together hold every unit once.

        A trace with groups is cut between groups, and fractions then count groups.

        Parameters
        ----------
        fractions : sequence of float
            Share of each part, positive, summing to 1 (to 1e-9).
        rng : int, numpy.random.Generator or None
            Seed of the assignment; None is seed 0.

        Returns
        -------
        tuple of Trace
            One per fraction; part boundaries are the rounded cumulative shares, so sizes are
            exact. Units keep their order inside a part.

        Raises
        ------
        InvalidArgumentError
            If a fraction is not positive, they do not sum to 1, or a part would be empty.
        """
        shares = np.asarray(fractions, dtype=np.float64)
        if shares.ndim != 1 or not (shares > 0.0).all() or abs(shares.sum() - 1.0) > 1e-9:
            raise InvalidArgumentError("fractions", fractions, "positive and summing to 1")
        keys = np.arange(self.n_units) if self.groups is None else self.groups
        codes, names = group_codes(keys, self.n_units)
        bounds = np.rint(np.cumsum(shares) * names.size).astype(np.int64)
        sizes = np.diff(bounds, prepend=0)
        if (sizes < 1).any():
            noun = "units" if self.groups is None else "groups"
            raise InvalidArgumentError(
                "fractions",
                fractions,
                f"large enough that each part gets one of {names.size} {noun}",
            )
        part_of_name = np.repeat(np.arange(sizes.size), sizes)
        part_of_name = as_generator(rng).permutation(part_of_name)
        part = part_of_name[codes]
        return tuple(self.select(np.flatnonzero(part == index)) for index in range(sizes.size))

    @classmethod
    def concat(cls, traces: Sequence[Trace]) -> Self:
        """One trace of the units of several, in the order given.

        Raises
        ------
        InvalidArgumentError
            If `traces` is empty, or they differ in exits, names or shapes of losses and columns,
            costs, or in having groups or weights, or share a unit id.
        """
        if not traces:
            raise InvalidArgumentError("traces", traces, "at least one trace")
        first = traces[0]
        for index, other in enumerate(traces[1:], start=1):
            require_compatible(first, other, index)
        return cls(
            scores=np.concatenate([trace.scores for trace in traces]),
            losses={
                name: np.concatenate([trace.losses[name] for trace in traces])
                for name in first.losses
            },
            costs=first.costs,
            cost_quantity=first.cost_quantity,
            lengths=np.concatenate([trace.lengths for trace in traces]),
            unit_ids=tuple(name for trace in traces for name in trace.unit_ids),
            groups=joined_arrays([trace.groups for trace in traces]),
            weights=joined_arrays([trace.weights for trace in traces]),
            columns={
                name: np.concatenate([trace.columns[name] for trace in traces])
                for name in first.columns
            },
        )

    @classmethod
    def merge(cls, traces: Sequence[Trace]) -> Self:
        """Like `concat`, with units sorted by id.

        The result, and its fingerprint, do not depend on which process finished first.
        """
        joined = cls.concat(traces)
        return joined.select(sorted(range(joined.n_units), key=joined.unit_ids.__getitem__))

    def fingerprint(self) -> str:
        """SHA-256 of the content, hexadecimal.

        Covers every value, type, shape, name and the order of units: the same units in another
        order are another trace, because sequential tests read units in order. How the trace is
        stored (memory, file, directory) does not matter. Reads every value once.
        """
        digest = hashlib.sha256(b"adaptive trace 1")
        digest.update(repr((self.cost_quantity, self.unit_ids)).encode())
        for name, array in self.arrays():
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(repr((name, array.dtype.str, array.shape)).encode())
            for start in range(0, array.shape[0], rows_per_chunk(array)):
                piece = array[start : start + rows_per_chunk(array)]
                digest.update(np.ascontiguousarray(piece).tobytes())
        return digest.hexdigest()

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and array of everything stored, in a fixed order.

        An array of a mapping is named with a slash, as in ``"losses/disagreement"``.
        """
        for name in ("scores", "costs", "lengths", "groups", "weights"):
            value = getattr(self, name)
            if value is not None:
                yield name, value
        for kind in ("losses", "columns"):
            for name, value in sorted(getattr(self, kind).items()):
                yield f"{kind}/{name}", value

    def to_frame(self) -> pd.DataFrame:
        """One row per token: unit id, group, weight, position, then scores, losses, columns.

        Columns of a two-dimensional array carry the exit's number: ``score_0``, ``score_1``.
        """
        import pandas as pd

        unit = self.unit_of_token
        table: dict[str, Any] = {"unit_id": np.asarray(self.unit_ids, dtype=object)[unit]}
        for name, per_unit in (("group", self.groups), ("weight", self.weights)):
            if per_unit is not None:
                table[name] = per_unit[unit]
        table["position"] = self.positions
        for name, array in (("score", self.scores), *self.losses.items(), *self.columns.items()):
            flat = array.reshape(array.shape[0], -1)
            for index in range(flat.shape[1]):
                table[name if array.ndim == 1 else f"{name}_{index}"] = flat[:, index]
        return pd.DataFrame(table)

    def save(self, path: str | Path) -> None:
        """Write the trace; see `adaptive.calibration.save_trace`."""
        from adaptive.calibration._trace_io import save_trace

        save_trace(self, path)

    @staticmethod
    def load(path: str | Path, *, memory_map: bool = False) -> Trace:
        """Read a trace; see `adaptive.calibration.load_trace`."""
        from adaptive.calibration._trace_io import load_trace

        return load_trace(path, memory_map=memory_map)


def _rebuilt(fields: dict[str, Any]) -> Trace:
    """Make the trace again from its fields: what pickle and copy call."""
    return Trace(**fields)
