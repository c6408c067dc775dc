"""What differs between recorded evidence and evidence found again, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adaptive.calibration._certificate import Certificate, Verification


def compared(certificate: Certificate, again: Certificate) -> Verification:
    """Return what differs in evidence and decision from a certificate made again."""
    found: list[str] = []
    for name in ("n", "holds", "index"):
        found += differences(name, getattr(certificate, name), getattr(again, name))
    # "losses" says what was declared, and where the losses came from the first time
    recorded, new = ({**c.evidence, "losses": None} for c in (certificate, again))
    found += differences("evidence", recorded, new)
    return Verification(tuple(found))


def differences(name: str, recorded: Any, found: Any) -> Iterator[str]:
    """Yield what differs in plain values, floats to 1e-6 relative."""
    if isinstance(recorded, Mapping) and isinstance(found, Mapping):
        for key in sorted(recorded.keys() | found.keys()):
            yield from differences(f"{name}.{key}", recorded.get(key), found.get(key))
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for place, pair in enumerate(zip(recorded, found, strict=True)):
            yield from differences(f"{name}[{place}]", *pair)
    elif isinstance(recorded, float) and isinstance(found, float):
        if not math.isclose(recorded, found, rel_tol=1e-6, abs_tol=1e-9):
            yield unlike(name, recorded, found)
    elif recorded != found:
        yield unlike(name, recorded, found)


def unlike(name: str, recorded: Any, found: Any) -> str:
    """Return the sentence for one value that differs."""
    before, now = (f"{v:.9g}" if isinstance(v, float) else v for v in (recorded, found))
    return f"{name}: {before} recorded, {now} found"
