"""Adaptive-computation control with statistical calibration.

A computation is a sequence of stages; a policy stops it early; a certificate says, with a stated
confidence and in finite samples, how often that makes a difference. The names below are handed on
lazily from three floors: the top one (models and generation), `adaptive.policies` (scores and
stopping rules on tensors) and `adaptive.calibration` (statistics on arrays, without torch).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive import calibration as calibration
    from adaptive import displays as displays
    from adaptive import policies as policies
    from adaptive._calibrate import calibrate as calibrate
    from adaptive._departure import first_departures as first_departures
    from adaptive._departure import flip_bound as flip_bound
    from adaptive._departure import path_losses as path_losses
    from adaptive._exits import Exits as Exits
    from adaptive._exits import NoExitsError as NoExitsError
    from adaptive._exits import attach_exits as attach_exits
    from adaptive._exits import detach_exits as detach_exits
    from adaptive._exits import get_exits as get_exits
    from adaptive._generate import generate as generate
    from adaptive._output import AdaptiveOutput as AdaptiveOutput
    from adaptive._predict import predict as predict
    from adaptive._trace_model import collect_trace as collect_trace
    from adaptive._train import ExitTraining as ExitTraining
    from adaptive._train import train_exits as train_exits
    from adaptive.calibration import AdaptiveError as AdaptiveError
    from adaptive.calibration import Certificate as Certificate
    from adaptive.calibration import CertificateMismatchError as CertificateMismatchError
    from adaptive.calibration import InvalidArgumentError as InvalidArgumentError
    from adaptive.calibration import Trace as Trace
    from adaptive.calibration import UnsupportedError as UnsupportedError
    from adaptive.calibration import control_risk as control_risk
    from adaptive.calibration import minimum_units as minimum_units
    from adaptive.calibration import plan_units as plan_units
    from adaptive.policies import Policy as Policy
    from adaptive.policies import Threshold as Threshold

    __version__: str

_HOMES = {
    "AdaptiveError": "adaptive.calibration",
    "AdaptiveOutput": "adaptive._output",
    "Certificate": "adaptive.calibration",
    "CertificateMismatchError": "adaptive.calibration",
    "ExitTraining": "adaptive._train",
    "Exits": "adaptive._exits",
    "InvalidArgumentError": "adaptive.calibration",
    "NoExitsError": "adaptive._exits",
    "Policy": "adaptive.policies",
    "Threshold": "adaptive.policies",
    "Trace": "adaptive.calibration",
    "UnsupportedError": "adaptive.calibration",
    "attach_exits": "adaptive._exits",
    "calibrate": "adaptive._calibrate",
    "collect_trace": "adaptive._trace_model",
    "control_risk": "adaptive.calibration",
    "path_losses": "adaptive._departure",
    "first_departures": "adaptive._departure",
    "flip_bound": "adaptive._departure",
    "detach_exits": "adaptive._exits",
    "generate": "adaptive._generate",
    "get_exits": "adaptive._exits",
    "minimum_units": "adaptive.calibration",
    "plan_units": "adaptive.calibration",
    "predict": "adaptive._predict",
    "train_exits": "adaptive._train",
}
_FLOORS = ("calibration", "displays", "policies")

# With a clone's root as working directory, Python takes this folder for the installed package:
# there the lower floors lie beside it, not in it.
_here = Path(__file__).resolve().parent
if not (_here / "calibration").is_dir():
    __path__.append(str(_here.parent))

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
