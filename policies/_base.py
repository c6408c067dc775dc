"""The hook between a computation and a stopping rule: features in, one boolean per row out."""

from __future__ import annotations

import abc
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace

#: What a policy carries from one decision to the next: a flat mapping of device tensors.
State = dict[str, Tensor]

#: The features a loop can hand to a score or a rule that asks for them.
FEATURES = frozenset(
    {"probe", "hidden", "previous", "logits", "head", "pruned_logits", "answer", "noise"}
)

#: Rows of a head on request: token ids, int64 [batch, n], to their logits [batch, n].
Head = Callable[[Tensor], Tensor]

#: Who shares a decision: every row for itself, or all rows of a batch together.
Scope = Literal["row", "batch"]


@dataclass(frozen=True)
class Features:
    """What a policy may look at after one stage, for the whole batch.

    A field is ``None`` unless the score or the rule asked for it through its ``needs``; ``running``
    is the exception: a loop that keeps asking about rows that have stopped must set it.

    Parameters
    ----------
    stage : int
        Index of the exit, 0..K-2 (stage K-1 is full computation and is never asked).
    position : Tensor, int64 [batch]
        Number of tokens the row has generated before this one.
    probe : Tensor, float32 [batch], optional
        Logit of the exit's trained linear probe for "this exit agrees with the full model".
    hidden : Tensor [batch, width], optional
        Hidden state after the stage, before the final norm.
    previous : Tensor [batch, width], optional
        Hidden state at the exit before this one; ``None`` at the first exit.
    logits : Tensor [batch, vocabulary], optional
        Logits of the exit's readout.
    head : callable, optional
        Token ids, int64 [batch, n], to their logits in the exit's readout, [batch, n]: only those
        rows of the head are read. A loop may leave it out where it gives all logits.
    pruned_logits : Tensor [batch, kept], optional
        Logits of the exit's readout over its pruned vocabulary.
    answer : Tensor, int64 [batch], optional
        The likeliest token of the exit's readout, before any processor and without sampling.
    noise : Tensor, float32 [batch], optional
        One uniform draw in [0, 1) per unit and position, the same at every stage (`keyed_noise`).
    running : Tensor, bool [batch], optional
        Rows that this decision is about: neither stopped at an earlier stage of this token nor
        finished. ``None`` says all of them. The memory of other rows is left as it is.
    """

    stage: int
    position: Tensor
    probe: Tensor | None = None
    hidden: Tensor | None = None
    previous: Tensor | None = None
    logits: Tensor | None = None
    head: Head | None = None
    pruned_logits: Tensor | None = None
    answer: Tensor | None = None
    noise: Tensor | None = None
    running: Tensor | None = None


_OWN_MODULES: set[str] = set()


class _Record(abc.ABC):
    """JSON form shared by scores, rules and schedules: the class name and the dataclass fields.

    ``per_exit`` names the fields that hold one entry per exit, so that a policy which asks at
    more exits than that is refused when it is made, not in the loop.
    """

    _classes: ClassVar[dict[str, type[Any]]]
    per_exit: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _register(cls, subclass: type[Any]) -> None:
        """Remember a class by its name; a class of this package keeps its name for itself."""
        name, home = subclass.__name__, subclass.__module__
        known = cls._classes.get(name)
        if known is not None and known.__module__ != home and known.__module__ in _OWN_MODULES:
            raise InvalidArgumentError(
                "class name", name, f"another name: saved policies mean {known.__module__}.{name}"
            )
        if home.startswith(f"{__package__}."):
            _OWN_MODULES.add(home)
        cls._classes[name] = subclass

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: ``{"type": class name, **fields}``."""
        assert dataclasses.is_dataclass(self)
        return {"type": type(self).__name__} | {
            field.name: _plain(getattr(self, field.name), field.name)
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; the class must be defined or imported."""
        name = data.get("type")
        if name not in cls._classes:
            known = ", ".join(sorted(cls._classes))
            raise InvalidArgumentError(
                "type",
                name,
                f"one of {known} (import your own class first; on the command line with "
                "`adaptive --import FILE ...`)",
            )
        found = cls._classes[name]
        fields = {key: _restored(value) for key, value in data.items() if key != "type"}
        built: Self = found(**fields)
        return built


def _plain(value: Any, field: str) -> Any:
    """JSON cannot say infinity or tuple: write infinity as a string, records as their own form."""
    if isinstance(value, _Record):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item, field) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    if value is None or isinstance(value, str | int | dict):
        return value
    if isinstance(value, float) and value == value:
        return value
    raise InvalidTypeError(
        field, value, "made of numbers but NaN, strings, tuples, scores and rules to be saved"
    )


def tupled(value: Any) -> Any:
    """Return what a file would give back: tuples for lists, in records too."""
    if isinstance(value, list):
        return tuple(map(tupled, value))
    if isinstance(value, tuple):
        return value if not value or isinstance(value[0], float) else tuple(map(tupled, value))
    if not isinstance(value, _Record) or not dataclasses.is_dataclass(value):
        return value
    held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {name: new for name, old in held.items() if (new := tupled(old)) != old}
    return dataclasses.replace(value, **changed) if changed else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    if isinstance(value, dict) and "type" in value:
        for base in (AbstractScore, AbstractRule, AbstractSchedule):
            if value["type"] in base._classes:
                return base.from_dict(value)
    if isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    return value


class AbstractScore(_Record):
    """A scalar per row and stage, from the features of that stage; higher means more settled.

    A final subclass is a frozen dataclass. It names the features it reads in ``needs`` and must
    be capture-safe: no host synchronisation, no branch on tensor values, fixed shapes.

    ``across_tokens`` says that the memory outlives a token: a trace of such a score has to be
    collected in the order of the tokens. What such a memory holds may depend on the first asked
    stage only, which every token visits; otherwise a trace could not foretell the loop.

    ``upper`` is the largest value the score can take: a finite threshold above it would silently
    never stop, so a policy refuses it.

    ``first`` is the first asked exit, for scores that do there what they need at later exits; a
    policy refuses to ask such a score at other exits first.
    """

    _classes: ClassVar[dict[str, type[Any]]] = {}
    needs: ClassVar[frozenset[str]]
    across_tokens: ClassVar[bool] = False
    upper: ClassVar[float] = float("inf")
    first: ClassVar[int | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        AbstractScore._register(cls)

    @abc.abstractmethod
    def init(self, batch_size: int, *, device: torch.device) -> State:
        """State at the start of a sequence (empty for scores without memory)."""

    @abc.abstractmethod
    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        """Score of every row, float32 [batch], and the new state."""

    def needs_at(self, stage: int) -> frozenset[str]:
        """Features read at this exit (override when it is fewer than ``needs``)."""
        return frozenset(self.needs)

    def advance(self, state: State) -> State:
        """State after a token is finished (override when memory is kept within a token only)."""
        return state


class AbstractRule(_Record):
    """A stopping rule over the scores of successive stages, with one ordered knob.

    A final subclass is a frozen dataclass. The same ``decide`` runs offline over a trace and
    online in a generation loop, so it must be capture-safe (see :class:`AbstractScore`). A NaN
    score never stops. The knob is ordered downwards: larger is safer, ``inf`` never stops early.

    ``nested`` says whether a cheaper member of the path never stops later than a safer one on
    the same scores. Calibration does not need it; reports use it. ``scope`` says who shares a
    decision: a rule of scope "batch" depends on who else is in the batch, and what was shown for
    one composition of the batch says nothing about another. ``on_score`` says that the field
    ``threshold`` is compared with the score itself, whose range then bounds it.
    """

    _classes: ClassVar[dict[str, type[Any]]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[bool] = True
    scope: ClassVar[Scope] = "row"
    on_score: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        AbstractRule._register(cls)

    @abc.abstractmethod
    def init(self, batch_size: int, *, device: torch.device) -> State:
        """State at the start of a sequence; thresholds live here, as device tensors."""

    @abc.abstractmethod
    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Whether each row stops at this stage, bool [batch], and the new state."""

    def advance(self, state: State) -> State:
        """State after a token is finished (override when memory is kept within a token only)."""
        return state

    @abc.abstractmethod
    def with_knob(self, knob: float) -> Self:
        """Return the member of the family at this value of the knob."""

    @abc.abstractmethod
    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """At most ``size`` values of the knob, ordered from safest to cheapest.

        The first never stops early. ``trace`` must be the fit split, never the test split.
        """


class AbstractSchedule(_Record):
    """How a threshold varies with stage and position around one base value."""

    _classes: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        AbstractSchedule._register(cls)

    @abc.abstractmethod
    def tables(self, *, device: torch.device) -> State:
        """Device tensors that :meth:`threshold` reads."""

    @abc.abstractmethod
    def threshold(self, base: Tensor, features: Features, tables: State) -> Tensor:
        """Threshold in force, broadcastable to [batch]; NaN (never) wherever ``base`` is NaN."""


def needed(value: Tensor | None, name: str) -> Tensor:
    """Return the feature, or say which one the loop failed to provide."""
    if value is None:
        raise InvalidArgumentError(name, None, f"given: the policy reads the feature `{name}`")
    return value


def part(state: State, name: str) -> State:
    """Return the entries of a component's own state inside a larger one."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def named(state: State, name: str) -> State:
    """Return a component's state under its name, to be merged into a larger one."""
    return {f"{name}.{key}": value for key, value in state.items()}


def held(state: State, before: State, running: Tensor | None) -> State:
    """Return ``state`` with the memory of rows that are not running put back to ``before``."""
    if running is None:
        return state
    return {
        key: value
        if value is before[key]
        else torch.where(running.view(-1, *[1] * (value.dim() - 1)), value, before[key])
        for key, value in state.items()
    }


def parts_of(record: _Record) -> Iterator[_Record]:
    """Yield a score, rule or schedule and everything it is made of."""
    yield record
    if dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            inner = getattr(record, field.name)
            for one in inner if isinstance(inner, tuple | list) else (inner,):
                if isinstance(one, type) and issubclass(one, _Record):
                    raise InvalidTypeError(field.name, one, f"an instance: {one.__name__}(...)")
                if isinstance(one, _Record):
                    yield from parts_of(one)


def check_exits(record: _Record, stages: tuple[int, ...]) -> None:
    """Raise if a part holds entries for fewer exits, or counts fewer, than it is asked at."""
    for one in parts_of(record):
        for name in one.per_exit:
            held = getattr(one, name)
            counts = isinstance(held, int)
            count, least = (held, len(stages)) if counts else (len(held), stages[-1] + 1)
            if count < least:
                expected = f"for at least {least} exits: {type(one).__name__} is asked at {stages}"
                raise InvalidArgumentError(name, count, expected)


def check_stage(stages: Sequence[int]) -> tuple[int, ...]:
    """Return exit indices as a tuple, or say that they are not ascending."""
    try:
        found = tuple(map(operator.index, stages))
    except TypeError as error:
        raise InvalidTypeError("stages", stages, "a tuple of exit indices") from error
    if len(found) == 0 or any(b <= a for a, b in pairwise(found)) or found[0] < 0:
        raise InvalidArgumentError(
            "stages", stages, "a non-empty, strictly ascending tuple of exit indices >= 0"
        )
    return found
