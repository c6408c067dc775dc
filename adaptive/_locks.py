"""One lock per model: threads that run it take turns where it is read or changed."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager

from torch import nn

_locks: weakref.WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = (
    weakref.WeakKeyDictionary()
)


def lock_of(model: nn.Module) -> AbstractContextManager[bool]:
    """Return a model's lock, which its thread may take again."""
    return _locks.setdefault(model, threading.RLock())
