"""From an examination to its certificate: evidence, assumptions, and why nothing was certified."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import special

from adaptive.calibration._certificate import Certificate
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._examination import Examiner
from adaptive.calibration._planning import minimum_units
from adaptive.calibration._testing import Tested


def certificate_of(
    examiner: Examiner,
    tested: Tested,
    bounds: Mapping[int, dict[str, float]],
    price: NDArray[np.float64] | None,
) -> Certificate:
    """Return the certificate of a finished examination; `bounds` are pointwise, per column."""
    sources, settings = examiner.sources, examiner.settings
    index = tested.rejected[-1] if tested.rejected else None
    names = [source.name for source in sources]
    single = len(sources) == 1
    visits = [examiner.visits[j] for j in tested.visited]
    tests = tuple(dict.fromkeys(test.name for test in examiner.tests))
    assumed = [
        sentence
        for source, test in zip(sources, examiner.tests, strict=True)
        for sentence in (*test.assumptions(source.bound), *source.assumptions)
    ]
    curve = sources[0].curve
    fingerprints = {"losses": {str(j): list(examiner.visits[j].digests) for j in tested.visited}}
    evidence = {
        "losses": [
            source.facts(test.name) for source, test in zip(sources, examiner.tests, strict=True)
        ],
        "n_columns": sources[0].n_columns,
        "procedure": settings.procedure.to_dict(),
        "columns": list(tested.visited),
        "certified": list(tested.rejected),
        "log_p_values": [visit.log_p for visit in visits],
        "levels": [tested.levels[j] for j in tested.visited],
        "means": {n: [visit.means[i] for visit in visits] for i, n in enumerate(names)},
        "positive_part_means": {
            n: [visit.positive_means[i] for visit in visits] for i, n in enumerate(names)
        },
        "upper_bound": None if index is None else bounds[index],
    }
    return Certificate(
        holds=index is not None,
        risk=sources[0].risk if single else {source.name: source.risk for source in sources},
        delta=settings.delta,
        loss=" and ".join(names),
        unit=settings.unit,
        method=" and ".join(tests),
        procedure=settings.procedure.name,
        n=examiner.n_units,
        index=index,
        cost=None if index is None or price is None else float(price[index]),
        evidence=evidence,
        bound=sources[0].bound if single else {source.name: source.bound for source in sources},
        assumptions=tuple(dict.fromkeys(assumed)),
        split={"order_seed": settings.order_seed, "n_test": examiner.n_units},
        knob=None if index is None or curve is None else float(curve.thresholds[index]),
        fingerprints=fingerprints
        if curve is None
        else fingerprints | {"trace": curve.trace.fingerprint()},
        notes=_notes(examiner, tested, index),
    )


def _notes(examiner: Examiner, tested: Tested, index: int | None) -> tuple[str, ...]:
    notes = [note for source in examiner.sources for note in source.notes]
    for i, (source, test) in enumerate(zip(examiner.sources, examiner.tests, strict=True)):
        if test.asymptotic:
            notes.append(f"The {test.name} test is asymptotic: no finite-sample guarantee.")
        if source.codes is not None:
            notes.append("The unit is the cluster: its loss is the mean over its members.")
        if index is None:
            notes.append(_why_not(examiner, tested, i))
        elif examiner.visits[index].positive_means[i] > examiner.visits[index].means[i]:
            notes.append(
                f"Negative values of {source.name} offset positive ones; the mean of the "
                f"positive part at column {index} was "
                f"{examiner.visits[index].positive_means[i]:.6g}."
            )
    return tuple(notes)


def _why_not(examiner: Examiner, tested: Tested, i: int) -> str:
    source, test, n = examiner.sources[i], examiner.tests[i], examiner.n_units
    if test.asymptotic:
        return f"The {test.name} test was not passed by column {tested.visited[0]}, the first."
    level = max(tested.levels.values())
    try:
        least = minimum_units(
            source.risk, level, method=test, loss_type=source.test_type, bound=source.bound
        )
    except InvalidArgumentError as error:
        return f"{n} {examiner.settings.unit}s are too few by far: {error}."
    if n < least:
        return (
            f"{n} {examiner.settings.unit}s are too few: with zero {source.name} on all of them "
            f"this test needs {least}."
        )
    first = tested.visited[0]
    mean = examiner.visits[first].means[i]
    if mean >= source.risk:
        return f"Column {first}, the first tested, has mean {source.name} {mean:.6g} itself."
    spread = float(examiner.read(i, first).std())
    z = special.ndtri(1.0 - level) + special.ndtri(0.9)
    units = max(least, math.ceil((z * spread / (source.risk - mean)) ** 2))
    return (
        f"Column {first}, the first tested, has mean {source.name} {mean:.6g}: below the promise, "
        f"but the evidence is too weak (p = {math.exp(examiner.visits[first].log_p):.3g}). About "
        f"{max(units, n + 1)} {examiner.settings.unit}s would do in nine of ten cases if this mean "
        f"and spread are the true ones; `plan_units` plans beforehand."
    )
