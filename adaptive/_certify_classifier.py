"""The test of a classifier's path: its members answer the test split for real, safest first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive._classifier_bench import Answers, ClassifierBench
from adaptive._evidence import Facts, test_of, with_evidence
from adaptive._path import Path
from adaptive._progress import bar
from adaptive.calibration import control_risk
from adaptive.policies import Policy


def certify_classifier(
    bench: ClassifierBench, path: Path, facts: Facts, *, risk: float, delta: float, method: str
) -> Policy:
    """Walk the path on the test split and return the certified member that pays most.

    Parameters and outcome as :func:`~adaptive._certify.certify` has them.
    """
    settings = test_of(bench.loss, method) | {
        "risk": risk,
        "delta": delta,
        "groups": bench.split.test.groups,
        "rng": bench.seed,
        "loss": bench.loss.name,
        "unit": "input",
    }
    walk = _Walk(bench, path)
    first, knobs = walk.first, walk.knobs
    with bar(total=len(knobs), desc="testing", unit="member", progress=bench.progress) as shown:
        result = control_risk(
            walk.visit,
            n_columns=len(knobs),
            progress=lambda column, log_p: shown.update(1),
            **settings,
        )
    certificate = with_evidence(bench.completed(result.certificate, facts), walk.evidence())
    never = bench.family.member(math.inf)
    if result.index is None:
        return replace(never, certificate=certificate)
    columns = [first, *(int(j) for j in np.flatnonzero(result.certified) if j > first)]
    choice = bench.fastest([bench.family.member(knobs[j]) for j in columns[1:]])
    index = columns[choice.index]
    times = {str(j): round(1e3 * float(c), 6) for j, c in zip(columns, choice.seconds, strict=True)}
    certificate = replace(
        with_evidence(certificate, {"milliseconds_per_input": times}),
        cost=float(choice.seconds[choice.index]),
    )
    if index == first:
        note = (
            f"Members {columns[1:]} are certified, but none is faster than full computation "
            f"on this machine in batches of {bench.batch_size}, so full computation is used."
        )
        notes = (*certificate.notes, *([note] if columns[1:] else []))
        place = index if index else None
        certificate = replace(certificate, holds=index > 0, index=place, notes=notes)
    else:
        certificate = replace(certificate, index=index, knob=float(knobs[index]))
    if index and index != result.index:  # the bound is that of the last certified member
        pair = np.stack([np.zeros_like(walk.losses[index]), walk.losses[index]], axis=1)
        again = control_risk(pair, **settings).certificate.evidence["upper_bound"]
        certificate = with_evidence(certificate, {"upper_bound": again})
    member = never if index == first else bench.family.member(knobs[index])
    return replace(member, certificate=certificate)


class _Walk:
    """Members as the test visits them: each answers the test split once.

    Attributes
    ----------
    first : int
        Column of full computation. It is 1 where the loss is an error rate of its own, which is
        tested for full computation too; column 0 is then a copy that is never tested.
    knobs : tuple of float
        Of every column.
    losses : dict
        Of every column visited so far, ``[n_units]``.
    """

    def __init__(self, bench: ClassifierBench, path: Path) -> None:
        self._bench = bench
        self.first = 0 if bench.loss.relative else 1
        self.knobs = (*path.knobs[: self.first], *path.knobs)
        self.losses: dict[int, NDArray[np.float64]] = {}
        self._predicted = (*path.predicted[: self.first], *path.predicted)
        self._depth = bench.stages.depths(np.arange(len(bench.table.logits)))
        self._whole = bench.run(None)
        self._depths = {str(self.first): float(self._depth[-1])}
        self._counts: dict[str, list[int]] = {}

    def visit(self, column: int) -> NDArray[np.float64]:
        """Losses of a member; the upper bound reads the last certified one a second time."""
        if column not in self.losses:
            run = self._run(column)
            depth = self._depth
            self._depths[str(column)] = float(depth[run.stages].mean())
            self._counts[str(column)] = np.bincount(run.stages, minlength=len(depth)).tolist()
            labels = self._bench.split.test.labels
            self.losses[column] = self._bench.loss.of(run.logits, self._whole.logits, labels)
        return self.losses[column]

    def _run(self, column: int) -> Answers:
        if column == self.first:
            return self._whole
        return self._bench.run(self._bench.family.member(self.knobs[column]))

    def evidence(self) -> dict[str, Any]:
        """Say what the certificate keeps of the members and of those visited."""
        return {
            "mean_depth": self._depths,
            "exit_layers": [int(value) for value in self._depth],
            "exit_counts": self._counts,
            "steps": self._bench.stages.steps,
            "knobs": [str(knob) for knob in self.knobs],
            "predicted": [float(value) for value in self._predicted],
            "full_computation_tested": not self._bench.loss.relative,
        }
