"""Cost of each test in a fixed sequence, beside reading the columns and taking cumulative logs.

Every round measures NumPy first, `np.cumsum(np.log(column))` once for each column visited, then
each test; a ratio is of CPU times of one round. "test" is the test alone, "door" is `control_risk`
with its checks, its order of units, its fingerprints and, once, the upper bound of the returned
column. "by rows" is the same with columns that are not contiguous, as in an array that NumPy makes.
Run:

    python tests/benchmarks/bench_tests.py [n_units] [n_columns] [rounds]
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np

from adaptive.calibration import control_risk, minimum_units
from adaptive.calibration._methods import TESTS

RESULTS = pathlib.Path(__file__).parent / "results" / "tests.json"
RISK, DELTA = 0.1, 0.05


def seconds(call):
    before = time.process_time()
    call()
    return time.process_time() - before


def reading(losses):
    def read():
        for j in range(1, losses.shape[1]):
            np.cumsum(np.log(losses[:, j]))

    return seconds(read)


def alone(test, losses):
    def run():
        for j in range(1, losses.shape[1]):
            column = losses[:, [j]]
            test.log_p_values(column, risk=RISK, delta=DELTA, bound=1.0)

    return seconds(run)


def door(test, losses):
    found = []
    spent = seconds(lambda: found.append(control_risk(losses, risk=RISK, method=test)))
    assert len(found[0].visited) == losses.shape[1] - 1
    return spent


def measure(smooth, binary, rounds):
    rows_first = np.ascontiguousarray(smooth)
    found = {kind.name: {"test": [], "door": [], "by rows": []} for kind in TESTS}
    units = []
    for _ in range(rounds):
        unit, unit_by_rows = reading(smooth), reading(rows_first)
        units.append(unit / (smooth.shape[1] - 1))
        for kind in TESTS:
            zero_one = kind.name in ("binomial", "beta-mixture")
            losses = binary if zero_one else smooth
            row = found[kind.name]
            row["test"].append(alone(kind(), losses) / unit)
            row["door"].append(door(kind(), losses) / unit)
            by_rows = np.ascontiguousarray(binary) if zero_one else rows_first
            row["by rows"].append(door(kind(), by_rows) / unit_by_rows)
    return units, found


def main():
    n, count, rounds = (int(a) for a in (*sys.argv[1:], "100000", "60", "5")[:3])
    rng = np.random.default_rng(0)
    smooth = np.asfortranarray(rng.beta(0.3, 9.0, (n, count)))
    binary = np.asfortranarray((rng.random((n, count)) < 0.03).astype(float))
    units, found = measure(smooth, binary, rounds)
    middle = {
        name: {what: float(np.median(values)) for what, values in row.items()}
        for name, row in found.items()
    }
    print(f"{n:,} units, {count} columns; NumPy takes {1e3 * np.median(units):.3f} ms per column\n")
    print("| test | test | door | door, by rows | units needed at risk 0.05, delta 0.05 |")
    print("|---|---|---|---|---|")
    for kind in TESTS:
        row = middle[kind.name]
        least = "-" if kind.asymptotic else str(minimum_units(0.05, 0.05, method=kind()))
        figures = " | ".join(f"{row[what]:.1f}" for what in ("test", "door", "by rows"))
        print(f"| {kind.name} | {figures} | {least} |")
    shape = {"n_units": n, "n_columns": count, "rounds": rounds}
    record = {**shape, "milliseconds": 1e3 * float(np.median(units)), "rounds_of": found}
    RESULTS.write_text(json.dumps({**record, "median_ratio": middle}, indent=1) + "\n")


if __name__ == "__main__":
    main()
