"""Cost of each test along a fixed sequence, beside reading the columns and taking cumulative logs.

Units of the table: the CPU time that NumPy needs to read one visited column once and take its
cumulative logs. "test" is the test alone; "door" is `control_risk` per visited column, with its
checks, order, fingerprints and (once) the upper bound of the returned column. Run:

    python tests/benchmarks/bench_tests.py [n_units] [n_columns]
"""

from __future__ import annotations

import sys
import time

import numpy as np

from adaptive.calibration import control_risk, minimum_units
from adaptive.calibration._methods import TESTS


def seconds(call, repeats=3):
    """Smallest CPU time of a few calls."""
    found = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        found.append(time.process_time() - before)
    return min(found)


def main():
    n, count = (int(a) for a in (*sys.argv[1:], "100000", "60")[:2])
    rng = np.random.default_rng(0)
    smooth = np.asfortranarray(rng.beta(0.3, 9.0, (n, count)))
    binary = np.asfortranarray((rng.random((n, count)) < 0.03).astype(float))

    def read():
        for j in range(1, count):
            np.cumsum(np.log1p(smooth[:, j]))

    unit = seconds(read) / (count - 1)
    print(f"{n:,} units, {count} columns; one reading with cumulative logs: {1e3 * unit:.3f} ms\n")
    print("| test | test alone | door | units needed at risk 0.05, delta 0.05 |")
    print("|---|---|---|---|")
    for kind in TESTS:
        test = kind()
        losses = binary if test.name in ("binomial", "beta-mixture") else smooth
        kwargs = {"risk": 0.1, "delta": 0.05, "bound": 1.0}

        def alone(losses=losses, test=test, kwargs=kwargs):
            for j in range(1, count):
                test.log_p_values(losses[:, [j]], **kwargs)

        def door(losses=losses, test=test):
            return control_risk(losses, risk=0.1, method=test)

        visited = len(door().visited)
        one, whole = seconds(alone, 2) / (count - 1), seconds(door, 2) / visited
        least = "-" if test.asymptotic else str(minimum_units(0.05, 0.05, method=test))
        print(f"| {test.name} | {one / unit:.1f} | {whole / unit:.1f} | {least} |", flush=True)


if __name__ == "__main__":
    main()
