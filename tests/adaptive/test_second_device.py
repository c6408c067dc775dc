"""Runs the tests on the stand-in for a second device, which is registered for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parents[1] / "second_device"


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made of Python",
)
def test_what_a_gpu_asks_is_met_on_a_second_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)],
        cwd=TESTS.parents[1],
        env=os.environ | {"ADAPTIVE_SECOND_DEVICE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
