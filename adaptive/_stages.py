"""Classifiers that answer in stages: what the library asks of them, and three ways to be one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptive._code_fingerprint import code_fingerprint, estimator_fingerprint
from adaptive._fingerprint import model_fingerprint
from adaptive._rows import Batch, on_device, take_rows
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, UnsupportedError


@dataclass(frozen=True)
class StageOutput:
    """What one stage says of the rows that are still there.

    Parameters
    ----------
    logits : Tensor [rows, classes]
        Its answer; at least two classes, the same at every stage.
    hidden : Tensor [rows, width], optional
        State behind it, for scores that read one.
    probe : Tensor [rows], optional
        Logit of "this answer is the full model's", for :class:`~adaptive.policies.ProbeScore`.
    """

    logits: Tensor
    hidden: Tensor | None = None
    probe: Tensor | None = None


#: Stages of one batch: yields a stage's output, or None where it was not asked for; receives the
#: places of the rows to keep, int64 [kept], or None for all of them.
Steps = Generator[StageOutput | None, Tensor | None, None]


#: Dropout that attention applies without a module of its own.
_ATTENTION_RATES = ("attention_dropout", "attention_probs_dropout_prob")


class AbstractStages(abc.ABC):
    """A classifier whose answer comes in stages, the last of which is full computation."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """Precision it computes in, as a certificate records it."""

    @property
    def rowwise(self) -> bool:
        """Whether a row's answer is the same in any batch, so that batches matter to time alone.

        Said only of what promises it: the passes of networks depend on the batch by rounding.
        """
        return False

    @abc.abstractmethod
    def run(self, batch: Batch, *, asked: Sequence[int]) -> Steps:
        """Go through the stages of a prepared batch; the last one always has an output."""

    @abc.abstractmethod
    def units(self, inputs: Batch) -> Batch:
        """Put inputs into the form in which their rows are told apart and selected."""

    @abc.abstractmethod
    def prepared(self, inputs: Batch) -> Batch:
        """Turn inputs, or units, into what :meth:`run` takes."""

    @abc.abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Hash what tells it from others."""

    @property
    @abc.abstractmethod
    def steps(self) -> str:
        """What :meth:`depths` counts, in the plural."""

    @abc.abstractmethod
    def depths(self, stages: NDArray[np.int64]) -> NDArray[np.float64]:
        """Layers, or stages, that are run for an answer at each of ``stages``."""


@dataclass(frozen=True)
class FunctionStages(AbstractStages):
    """Any function of a batch that yields the logits of its stages one after another.

    Parameters
    ----------
    function : callable
        ``function(batch)`` returns an iterator. If it is a generator, ``keep = yield logits``
        gets the places (int64, a tensor, or an array if it yields arrays) of the rows to go on
        with, or None for all: the rows left out need not be computed any more. A function that
        ignores this computes all rows to the end.
    module : nn.Module, optional
        The module it belongs to.
    """

    function: Callable[[Batch], Iterable[Any]]
    module: nn.Module | None = None

    @property
    def dtype(self) -> str:
        """That of the module's first parameter."""
        first = None if self.module is None else next(self.module.parameters(), None)
        return "unknown" if first is None else str(first.dtype).removeprefix("torch.")

    def run(self, batch: Batch, *, asked: Sequence[int]) -> Steps:
        """Follow the iterator; select rows here if it does not leave them out itself."""
        iterator = iter(self.function(batch))
        chosen: Tensor | None = None  # wanted rows among those it computes; None is all
        computed, arrays = -1, False
        try:
            while True:
                try:
                    item = _step(iterator, chosen, arrays=arrays)
                except StopIteration:
                    return
                output, arrays = as_output(item), isinstance(item, np.ndarray)
                found = output.logits.shape[0]
                if chosen is not None and found == chosen.numel():
                    chosen = None
                elif computed >= 0 and found != computed:
                    raise InvalidArgumentError("model", f"{found} rows", _rows(computed, chosen))
                computed = found
                keep = yield output if chosen is None else _select(output, chosen)
                if keep is not None:
                    chosen = keep if chosen is None else chosen[keep]
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def units(self, inputs: Batch) -> Batch:
        """As they are."""
        return inputs

    def prepared(self, inputs: Batch) -> Batch:
        """Where the module is."""
        return _beside(self.module, inputs)

    def fingerprints(self) -> dict[str, str]:
        """Of the module's weights, or of the function's code and what it refers to."""
        if self.module is not None:
            code = code_fingerprint(type(self.module).stages)  # type: ignore[attr-defined]
            return {"model": model_fingerprint(self.module), "code": code}
        return {"model": code_fingerprint(self.function)}

    @property
    def steps(self) -> str:
        """What the function yields."""
        return "stages"

    def depths(self, stages: NDArray[np.int64]) -> NDArray[np.float64]:
        """Count of stages run."""
        return np.asarray(stages, dtype=np.float64) + 1.0


@dataclass(frozen=True)
class CascadeStages(AbstractStages):
    """Classifiers from small to large; the next one sees the rows that the last passed on.

    Parameters
    ----------
    models : tuple
        Each a callable from a batch to logits (a module or function; an output with ``logits`` is
        taken apart), or an estimator with ``predict_proba`` whose classes are 0, 1, ...
    """

    models: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise InvalidArgumentError("model", f"{len(self.models)} models", "two models or more")
        for place, model in enumerate(self.models):
            _check_member(place, model)

    @property
    def dtype(self) -> str:
        """Each model's own."""
        return "unknown"

    @property
    def rowwise(self) -> bool:
        """Estimators answer row by row."""
        return all(hasattr(model, "predict_proba") for model in self.models)

    def run(self, batch: Batch, *, asked: Sequence[int]) -> Steps:
        """Ask one model after another."""
        last = len(self.models) - 1
        for place, model in enumerate(self.models):
            needed = place in asked or place == last
            keep = yield StageOutput(_answer(model, batch)) if needed else None
            if keep is not None:
                batch = take_rows(batch, keep)

    def units(self, inputs: Batch) -> Batch:
        """As they are."""
        return inputs

    def prepared(self, inputs: Batch) -> Batch:
        """As they are."""
        return inputs

    def fingerprints(self) -> dict[str, str]:
        """Of every model, in order."""
        return {"model": "-".join(_fingerprint_of(model) for model in self.models)}

    @property
    def steps(self) -> str:
        """Members of the cascade."""
        return "models"

    def depths(self, stages: NDArray[np.int64]) -> NDArray[np.float64]:
        """Count of models passed."""
        return np.asarray(stages, dtype=np.float64) + 1.0


def is_staged(model: object) -> bool:
    """Whether a model answers in stages by itself: a cascade, a ``stages`` method, a function."""
    if isinstance(model, AbstractStages | list | tuple):
        return True
    if callable(getattr(model, "stages", None)):
        return True
    return callable(model) and not isinstance(model, nn.Module | type)


def as_output(item: Any) -> StageOutput:
    """Check what a stage yielded.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        If it is not logits ``[rows, classes]`` of at least two classes, or a `StageOutput`.
    """
    output = item
    if isinstance(item, np.ndarray):
        output = StageOutput(torch.from_numpy(item))
    elif isinstance(item, Tensor):
        output = StageOutput(item)
    if not isinstance(output, StageOutput):
        raise InvalidTypeError("model", item, "one that yields logits or a StageOutput")
    shape = tuple(output.logits.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise InvalidArgumentError(
            "model",
            f"logits of shape {shape}",
            "one that yields logits [rows, classes] of at least two classes",
        )
    return output


def refuse_dropout(module: nn.Module) -> None:
    """Refuse a module whose next pass over the same batch could differ.

    Raises
    ------
    InvalidArgumentError
        If it is in training mode and drops out units.
    """
    rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout) and m.training]
    if module.training:
        config = getattr(module, "config", None)
        rates += [getattr(config, name, 0.0) or 0.0 for name in _ATTENTION_RATES]
    if any(rate > 0 for rate in rates):
        raise InvalidArgumentError(
            "model", "a model in training mode with dropout", "`model.eval()` before it is run"
        )


def _step(iterator: Iterator[Any], chosen: Tensor | None, *, arrays: bool) -> Any:
    if not isinstance(iterator, Generator):
        return next(iterator)
    # NumPy takes a tensor with one element for a number: who works on arrays is sent an array
    return iterator.send(chosen.numpy() if arrays and chosen is not None else chosen)


def _select(output: StageOutput, rows: Tensor) -> StageOutput:
    rows = rows.to(output.logits.device)
    return StageOutput(
        output.logits[rows],
        None if output.hidden is None else output.hidden[rows],
        None if output.probe is None else output.probe[rows],
    )


def _rows(computed: int, chosen: Tensor | None) -> str:
    kept = "" if chosen is None else f"the {chosen.numel()} rows it was told to keep, or "
    return f"one whose every stage yields {kept}all {computed} rows"


def _check_member(place: int, model: Any) -> None:
    classes = getattr(model, "classes_", None)
    if hasattr(model, "predict_proba"):
        if classes is None or not np.array_equal(classes, np.arange(len(classes))):
            raise InvalidArgumentError(
                "model",
                f"classes {classes} of model {place} of the cascade",
                "fitted on classes 0, 1, 2, ... (sklearn.preprocessing.LabelEncoder)",
            )
    elif not callable(model):
        raise InvalidTypeError("model", model, "a cascade of estimators or callables")
    if isinstance(model, nn.Module):
        refuse_dropout(model)


def _beside(model: Any, batch: Batch) -> Batch:
    """Tensors of a batch on the device of a module's first parameter."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return batch if first is None else on_device(batch, first.device)


def _answer(model: Any, batch: Batch) -> Tensor:
    """Logits of one model of a cascade; log-probabilities are logits too."""
    if hasattr(model, "predict_proba"):
        rows = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
        probability = np.asarray(model.predict_proba(rows), dtype=np.float64)
        tiny = np.finfo(np.float32).tiny
        return torch.from_numpy(np.log(np.maximum(probability, tiny)).astype(np.float32))
    found = model(_beside(model, batch))
    logits = getattr(found, "logits", found)
    return as_output(logits).logits.cpu()


def _fingerprint_of(model: Any) -> str:
    if isinstance(model, nn.Module):
        return model_fingerprint(model)
    if hasattr(model, "predict_proba"):
        return estimator_fingerprint(model)
    return code_fingerprint(model)


def staged(model: Any) -> AbstractStages:
    """Return the stages of a model that is staged by itself.

    Raises
    ------
    UnsupportedError
        If it is not.
    """
    if isinstance(model, AbstractStages):
        return model
    if isinstance(model, list | tuple):
        return CascadeStages(tuple(model))
    method = getattr(model, "stages", None)
    if callable(method):
        module = model if isinstance(model, nn.Module) else None
        if module is not None:
            refuse_dropout(module)
        return FunctionStages(method, module)
    if is_staged(model):
        return FunctionStages(model)
    raise UnsupportedError(
        f"{type(model).__name__} does not answer in stages: give it a method `stages(batch)` that "
        "yields the logits of one stage after another, or pass such a function, or a list of "
        "models from small to large"
    )
