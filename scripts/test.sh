#!/usr/bin/env bash
# Set up a virtual environment, install the package as a user gets it, run the tests and notebooks.
#   VENV    where the environment is, or is made (default: .venv)
#   PYTHON  the interpreter that makes it (default: python3)
# Arguments go to pytest: `bash scripts/test.sh -m "not slow" tests/calibration`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
rm -rf build # left by an earlier build, it would carry deleted modules into the wheel
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt ".[test]"

# -P: the folder `adaptive/` must not be taken for the installed package.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/python" -P -m pytest -n 2 --dist worksteal "$@"
