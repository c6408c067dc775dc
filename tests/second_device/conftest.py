"""Tests on the stand-in for a second device; ``tests/adaptive/test_second_device.py`` runs them."""

from __future__ import annotations

import os

_ASKED = bool(os.environ.get("ADAPTIVE_SECOND_DEVICE"))
if _ASKED:
    # before anything is differentiated: torch counts its devices once
    import second_device  # noqa: F401

collect_ignore_glob = [] if _ASKED else ["*"]
