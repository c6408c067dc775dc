"""Fingerprints of models that are functions or scikit-learn estimators."""

from __future__ import annotations

import hashlib
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import joblib
import numpy as np
from torch import Tensor, nn

from adaptive._fingerprint import model_fingerprint, tensors_fingerprint
from adaptive.calibration import UnsupportedError

_estimators: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = (
    weakref.WeakKeyDictionary()
)


def code_fingerprint(function: Callable[..., Any]) -> str:
    """Fingerprint of a function: its code, and the values it refers to by name.

    Weights of modules, arrays, tensors, numbers, texts and fitted estimators that the code reads
    from its closure, its module, its defaults or its object are covered; what these reach in turn
    by other ways is not.
    """
    digest = hashlib.sha256()
    for piece in _pieces(function):
        digest.update(piece.encode())
    return digest.hexdigest()[:24]


def estimator_fingerprint(estimator: Any) -> str:
    """Fingerprint of a fitted estimator, remembered until an attribute is replaced.

    Raises
    ------
    UnsupportedError
        If it cannot be pickled, and so not told from another.
    """
    version = tuple(sorted((name, id(value)) for name, value in vars(estimator).items()))
    known = _estimators.get(estimator)
    if known is None or known[0] != version:
        try:
            known = (version, str(joblib.hash(estimator))[:24])
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UnsupportedError(
                f"an estimator of type {type(estimator).__name__} cannot be pickled, so a "
                "certificate could not tell it from another: define its class in a module, or "
                "pass a function that returns its logits"
            ) from error
        _estimators[estimator] = known
    return known[1]


def _pieces(function: Any) -> Iterator[str]:
    inner = getattr(function, "func", None)
    if inner is not None and hasattr(function, "keywords"):  # functools.partial
        yield from _pieces(inner)
        for value in (*function.args, *function.keywords.values()):
            yield _described(value)
        return
    owner = getattr(function, "__self__", None)
    if owner is None and not hasattr(function, "__code__"):
        owner, function = function, type(function).__dict__.get("__call__")
    function = getattr(function, "__func__", function)
    if owner is not None:
        for name, value in sorted(getattr(owner, "__dict__", {}).items()):
            yield f"{name}={_described(value)}"
    code = getattr(function, "__code__", None)
    if code is None:
        yield repr(type(function))
        return
    yield _code(code)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield _described(value)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f"{name}={_described(cell.cell_contents)}"
    for name in code.co_names:
        if name in function.__globals__:
            yield f"{name}={_described(function.__globals__[name])}"


def _code(code: CodeType) -> str:
    """Instructions and constants; places in the file and names of files do not matter."""
    constants = [_constant(value) for value in code.co_consts]
    return f"{code.co_code.hex()}{constants}{code.co_names}{code.co_varnames}"


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    if isinstance(value, frozenset):  # in an order that differs from process to process
        return repr(sorted(map(repr, value)))
    return repr(value)


def _described(value: Any) -> str:
    if isinstance(value, nn.Module):
        return model_fingerprint(value)
    if isinstance(value, Tensor):
        return tensors_fingerprint([("", value)])
    if isinstance(value, np.ndarray) and value.dtype != object:
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    if isinstance(value, list | tuple):
        return repr([_described(item) for item in value])
    if isinstance(value, dict):
        return repr([(str(key), _described(item)) for key, item in value.items()])
    if hasattr(value, "get_params") and hasattr(value, "fit"):
        return estimator_fingerprint(value)
    if hasattr(value, "__code__"):
        return _code(value.__code__)
    return getattr(value, "__qualname__", type(value).__qualname__)
