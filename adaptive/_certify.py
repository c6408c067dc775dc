"""The test of a path: its members write the test split for real, from the safest on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive._bench import Bench
from adaptive._evidence import Facts, test_of, with_evidence
from adaptive._families import layers_of
from adaptive._monitor_reference import Reference
from adaptive._path import Path
from adaptive._run import Run, exit_counts, mean_run_depth
from adaptive.calibration import Certificate, control_risk
from adaptive.policies import Policy


def certify(
    bench: Bench, path: Path, facts: Facts, *, risk: float, delta: float, method: str
) -> Policy:
    """Walk the path on the test split and return the certified member that pays most.

    Parameters
    ----------
    bench : Bench
    path : Path
        Frozen before the test split is read.
    facts : Facts
        What the certificate records beside the statistics.
    risk, delta : float
        The promise.
    method : str
        The test, as in :func:`adaptive.calibration.control_risk`.

    Returns
    -------
    Policy
        With its certificate. Full computation, if no member is certified or none is faster.
    """
    groups = bench.split.test.groups
    walk = _Walk(bench, path)
    settings = test_of(bench.loss, method) | {
        "risk": risk,
        "delta": delta,
        "groups": groups,
        "rng": bench.deployment.seed,
        "loss": bench.loss.name,
    }
    result = control_risk(walk.visit, n_columns=len(path.knobs), unit="prompt", **settings)
    certificate = facts.completed(replace(result.certificate, unit=facts.unit))
    certificate = with_evidence(certificate, walk.evidence())
    never = bench.family.member(path.knobs[0])
    if result.index is None:
        return replace(never, certificate=certificate)
    columns = [int(j) for j in np.flatnonzero(result.certified) if j > 0]
    choice = bench.fastest([bench.family.member(path.knobs[j]) for j in columns])
    certificate = _timed(certificate, columns, choice.seconds, choice.index)
    if choice.index == 0:
        return replace(never, certificate=_none_faster(certificate, columns, bench.family.mode))
    index = columns[choice.index - 1]
    knob = float(path.knobs[index])
    losses = walk.losses[index]
    if index != result.index:  # the certificate's bound is that of the last certified member
        pair = np.stack([np.zeros_like(losses), losses], axis=1)
        again = control_risk(pair, **settings).certificate.evidence["upper_bound"]
        certificate = with_evidence(certificate, {"upper_bound": again})
    reference = Reference.of(
        walk.runs[index],
        losses,
        exits=bench.exits.layers,
        layers=walk.layers,
        bound=bench.loss.bound,
        members=len(path.knobs) - 1,
        clusters=groups,
    )
    certificate = with_evidence(certificate, reference.to_evidence())
    certificate = replace(certificate, index=index, knob=knob)
    return replace(bench.family.member(knob), certificate=certificate)


class _Walk:
    """Members as the test visits them: each writes the test split once.

    Attributes
    ----------
    runs, losses : dict
        Of every column visited so far: its runs, and the losses ``[n_units]`` read off them.
    """

    def __init__(self, bench: Bench, path: Path) -> None:
        self._bench, self._path, self._test = bench, path, bench.split.test
        self._full = None if bench.loss.sequence is None else bench.full_texts(self._test)
        self.layers = len(layers_of(bench.model))
        self.runs: dict[int, tuple[Run, ...]] = {}
        self.losses: dict[int, NDArray[np.float64]] = {}

    def visit(self, column: int) -> NDArray[np.float64]:
        """Losses of a member; the upper bound reads the last certified one a second time."""
        if column not in self.losses:
            knobs = self._path.knobs
            member = self._bench.family.member(knobs[column])
            title = f"testing member {column} of {len(knobs) - 1}"
            self.runs[column] = self._bench.run(self._test, member, title)
            self.losses[column] = self._bench.loss.of(
                self.runs[column], self._full, self._test.references
            )
        return self.losses[column]

    def evidence(self) -> dict[str, Any]:
        """Say what the certificate keeps of the members and of those visited."""
        exits, layers = self._bench.exits.layers, self.layers
        depths = {str(j): mean_run_depth(runs, exits, layers) for j, runs in self.runs.items()}
        found = {
            "mean_depth": {"0": float(layers)} | depths,
            "exit_layers": [*exits, layers],
            "exit_counts": {str(j): exit_counts(runs, len(exits)) for j, runs in self.runs.items()},
            "knobs": [str(knob) for knob in self._path.knobs],
            "predicted": [float(value) for value in self._path.predicted],
        }
        schedule = self._bench.schedule
        return found if schedule is None else found | {"check_schedule": schedule}


def _timed(
    certificate: Certificate, columns: list[int], seconds: NDArray[np.float64], best: int
) -> Certificate:
    """Put the measured times of full depth and the certified members on record."""
    times = {
        str(j): round(1e3 * float(cost), 4) for j, cost in zip([0, *columns], seconds, strict=True)
    }
    certificate = with_evidence(certificate, {"milliseconds_per_token": times})
    return replace(certificate, cost=float(seconds[best]))


def _none_faster(certificate: Certificate, columns: list[int], mode: str) -> Certificate:
    """Withdraw the promise of an early exit where none is faster than full depth."""
    note = (
        f"Members {columns} are certified, but none is faster than full depth on this machine in "
        f"`{mode}` mode, so full computation is used."
    )
    return replace(certificate, holds=False, index=None, notes=(*certificate.notes, note))
