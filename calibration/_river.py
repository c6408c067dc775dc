"""Detectors of the river library beside ours (extra ``river``)."""

from __future__ import annotations

from typing import Any

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._extras import optional

NAMES = {
    "ADWIN": "river.drift",
    "KSWIN": "river.drift",
    "PageHinkley": "river.drift",
    "DDM": "river.drift.binary",
    "EDDM": "river.drift.binary",
    "FHDDM": "river.drift.binary",
    "HDDMA": "river.drift.binary",
    "HDDMW": "river.drift.binary",
}


def river_detector(name: str, **settings: Any) -> Any:
    """Return a detector of `river` by its class name, for `try_detector` or for its own use.

    Parameters
    ----------
    name : str
        ADWIN, KSWIN, PageHinkley, DDM, EDDM, FHDDM, HDDMA or HDDMW. The last six want 0/1 losses.
    settings
        Passed on.

    Raises
    ------
    MissingExtraError
        If river is not installed: ``pip install 'adaptive-control[river]'``.

    Notes
    -----
    They estimate their reference from the stream itself and state no error for a whole run:
    choose settings by putting them on trial on quiet streams like yours.
    """
    if name not in NAMES:
        raise InvalidArgumentError("name", name, f"one of {', '.join(NAMES)}")
    return getattr(optional(NAMES[name]), name)(**settings)
