"""Adaptive-computation control with statistical calibration.

A computation is a sequence of stages; a policy stops it early; a certificate says, with a stated
confidence and in finite samples, how often that makes a difference. The names below are handed on
lazily from three floors: the top one (models and generation), `adaptive.policies` (scores and
stopping rules on tensors) and `adaptive.calibration` (statistics on arrays, without torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive import calibration as calibration
    from adaptive import policies as policies
    from adaptive.calibration import AdaptiveError as AdaptiveError
    from adaptive.calibration import CertificateError as CertificateError
    from adaptive.calibration import CertificateMismatchError as CertificateMismatchError
    from adaptive.calibration import InvalidArgumentError as InvalidArgumentError
    from adaptive.calibration import UnsupportedError as UnsupportedError
    from adaptive.policies import Policy as Policy
    from adaptive.policies import ProbeScore as ProbeScore
    from adaptive.policies import Threshold as Threshold

    __version__: str

_HOMES = {
    "AdaptiveError": "adaptive.calibration",
    "CertificateError": "adaptive.calibration",
    "CertificateMismatchError": "adaptive.calibration",
    "InvalidArgumentError": "adaptive.calibration",
    "Policy": "adaptive.policies",
    "ProbeScore": "adaptive.policies",
    "Threshold": "adaptive.policies",
    "UnsupportedError": "adaptive.calibration",
}
_FLOORS = ("calibration", "policies")

__all__ = [*_HOMES, *_FLOORS, "__version__"]

if not TYPE_CHECKING:  # type checkers read the imports above, and then know every name

    def __getattr__(name: str) -> object:
        """Import the home of a public name when it is first asked for (PEP 562)."""
        value: object
        if name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        elif name in _FLOORS:
            return import_module(f"adaptive.{name}")
        elif name == "__version__":
            value = import_module("importlib.metadata").version("adaptive-control")
        else:
            raise AttributeError(f"module 'adaptive' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
