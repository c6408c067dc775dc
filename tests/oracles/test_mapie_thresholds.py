"""The same decision as MAPIE on the job both can do; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mapie")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_risk_curve.py"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("n_units", "n_thresholds"), [(500, 50), (5000, 100)])
def test_certified_thresholds_agree(n_units, n_thresholds):
    spec = importlib.util.spec_from_file_location("bench_risk_curve", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    ours, theirs = script.ours(n_units, n_thresholds)(), script.mapie(n_units, n_thresholds)()
    assert ours.size > 0
    np.testing.assert_allclose(ours, theirs)
