"""Testing again: whether losses reproduce a certificate's evidence, and what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptive.calibration._certificate import Certificate, Verification
from adaptive.calibration._conformal import conformal_risk_control
from adaptive.calibration._curve_losses import columns_from
from adaptive.calibration._differences import compared, differences, unlike
from adaptive.calibration._errors import InvalidArgumentError, UnsupportedError
from adaptive.calibration._examination import Examiner, Settings
from adaptive.calibration._halting import certify_halting
from adaptive.calibration._losses import LossColumns, Losses, loss_columns
from adaptive.calibration._methods import TESTS
from adaptive.calibration._procedures import procedure_of
from adaptive.calibration._sequential_control import again_from
from adaptive.calibration._tail import control_tail, tail_from
from adaptive.calibration._trace import Trace
from adaptive.calibration._validation import group_codes, label_array

_BATCH = 256


def verify_certificate(
    certificate: Certificate,
    losses: Any,
    *,
    groups: ArrayLike | None,
    scores: ArrayLike | None,
) -> Verification:
    """Test again with the recorded settings; see `Certificate.verify`."""
    evidence = certificate.evidence
    if not evidence:
        raise UnsupportedError(f"nothing to verify: no test was run ({certificate.method})")
    kind = evidence.get("kind", "control")
    if kind == "halting":
        return compared(certificate, _halting_again(certificate, losses, scores))
    if scores is not None:
        raise InvalidArgumentError("scores", "an array", "left out: only halting needs them")
    if kind == "control" and certificate.method == "e-process":
        kind = "sequential"
    if kind == "control":
        return Verification(tuple(_control_differs(certificate, losses, groups)))
    if groups is not None:
        raise InvalidArgumentError("groups", "an array", f"left out for evidence of kind {kind!r}")
    again = {"conformal": _conformal_again, "tail": _tail_again, "sequential": _sequential_again}
    if kind not in again:
        raise UnsupportedError(f"cannot verify: this library has no evidence of kind {kind!r}")
    return compared(certificate, again[kind](certificate, losses))


def _control_differs(
    certificate: Certificate, losses: Any, groups: ArrayLike | None
) -> Iterator[str]:
    if groups is None and isinstance(losses, Trace):
        groups = losses.groups
    if "groups" in certificate.evidence:
        yield from _groups_differ(certificate, losses, groups)
        return
    sources = _recorded_sources(certificate, losses)
    if groups is not None:
        sources = tuple(source.cluster(groups) for source in sources)
    yield from _one_differs(certificate, sources)


def _groups_differ(
    certificate: Certificate, losses: Losses, groups: ArrayLike | None
) -> Iterator[str]:
    if groups is None:
        raise InvalidArgumentError("groups", None, "given: the certificate is per group")
    labels = label_array(groups)
    codes, names = group_codes(labels, labels.size)
    recorded = certificate.evidence["groups"]
    if {str(name) for name in names} != set(recorded):
        yield unlike("groups", sorted(recorded), sorted(map(str, names)))
        return
    parts = {name: Certificate.from_dict(values) for name, values in recorded.items()}
    for g, name in enumerate(map(str, names)):
        sources = (s.within(codes == g) for s in _recorded_sources(parts[name], losses))
        yield from (f"group {name}: {d}" for d in _one_differs(parts[name], tuple(sources)))
    shared = set.intersection(*(set(part.evidence["certified"]) for part in parts.values()))
    yield from differences("index", certificate.index, max(shared) if shared else None)


def _recorded_sources(certificate: Certificate, losses: Any) -> tuple[LossColumns, ...]:
    recorded = certificate.evidence["losses"]
    facts = {
        key: {entry["name"]: entry[key] for entry in recorded}
        for key in ("risk", "bound", "loss_type")
    }
    if isinstance(losses, Trace):
        losses = {entry["name"]: _from_trace(entry, losses) for entry in recorded}
    table = losses if isinstance(losses, Mapping) else {recorded[0]["name"]: losses}
    if set(table) != set(facts["risk"]):
        raise InvalidArgumentError("losses", sorted(table), f"named {sorted(facts['risk'])}")
    count = certificate.evidence["n_columns"]
    return loss_columns(table, n_columns=count, name="", **facts)


def _from_trace(entry: Mapping[str, Any], trace: Trace) -> Any:
    if "origin" not in entry:
        raise InvalidArgumentError(
            "losses", "a Trace", "the losses themselves: they were not read off a trace"
        )
    return columns_from(entry["origin"], trace)


def _one_differs(certificate: Certificate, sources: tuple[LossColumns, ...]) -> Iterator[str]:
    evidence = certificate.evidence
    known = {test.name: test for test in TESTS}
    missing = [e["test"] for e in evidence["losses"] if e["test"] not in known]
    if missing:
        raise UnsupportedError(f"cannot verify: this library has no test named {missing[0]!r}")
    first = evidence["columns"][0] if evidence["columns"] else 1
    found = {source.name: source.column(first).size for source in sources}
    if set(found.values()) != {certificate.n}:
        yield unlike("number of units", certificate.n, found)
        return
    settings = Settings(
        delta=certificate.delta,
        method="auto",
        procedure=procedure_of(certificate.procedure, **evidence["procedure"]),
        order_seed=certificate.split["order_seed"],
        unit=certificate.unit,
    )
    examiner = Examiner(sources, settings)
    examiner.tests = tuple(known[entry["test"]]() for entry in evidence["losses"])
    examiner.order = np.random.default_rng(settings.order_seed).permutation(certificate.n)
    again = settings.procedure.run(
        examiner.visit, n_columns=sources[0].n_columns, delta=settings.delta
    )
    recorded = dict(zip(evidence["columns"], evidence["log_p_values"], strict=True))
    for column in again.visited:
        if column in recorded:
            log_p = examiner.visits[column].log_p
            yield from differences(f"log p-value of column {column}", recorded[column], log_p)
    yield from differences("columns visited", evidence["columns"], list(again.visited))
    yield from differences("columns certified", evidence["certified"], list(again.rejected))
    single = len(sources) == 1
    for name in ("risk", "bound"):
        tested = {source.name: getattr(source, name) for source in sources}
        found_ = tested[sources[0].name] if single else tested
        yield from differences(f"{name} promised and tested", getattr(certificate, name), found_)
    # a cheaper certified column, or full computation, may have been preferred for its cost
    if certificate.index is not None and certificate.index not in again.rejected:
        yield f"column {certificate.index} is recorded as certified, and it is not"
    yield from differences("certificate holds", certificate.holds, certificate.index is not None)


def _conformal_again(certificate: Certificate, losses: Any) -> Certificate:
    return conformal_risk_control(
        losses,
        risk=float(certificate.risk),  # type: ignore[arg-type]
        bound=float(certificate.bound),  # type: ignore[arg-type]
        monotonise=certificate.evidence["monotonised"],
        loss=certificate.loss,
        unit=certificate.unit,
    ).certificate


def _tail_again(certificate: Certificate, losses: Any) -> Certificate:
    recorded = certificate.evidence["losses"][0]
    return control_tail(
        _from_trace(recorded, losses) if isinstance(losses, Trace) else losses,
        tail=tail_from(certificate.evidence["tail"]),
        risk=float(certificate.risk),  # type: ignore[arg-type]
        delta=certificate.delta,
        bound=float(certificate.bound),  # type: ignore[arg-type]
        n_columns=certificate.evidence["n_columns"],
        loss=certificate.loss,
        unit=certificate.unit,
    ).certificate


def _halting_again(certificate: Certificate, losses: Any, scores: ArrayLike | None) -> Certificate:
    if isinstance(losses, Trace):
        if certificate.loss not in losses.losses or losses.n_tokens != losses.n_units:
            names = ", ".join(map(repr, losses.losses))
            needed = f"one token per unit and a loss {certificate.loss!r}"
            raise InvalidArgumentError("losses", f"a Trace with losses {names}", needed)
        losses, scores = losses.losses[certificate.loss], losses.scores
    if scores is None:
        raise InvalidArgumentError("scores", None, "given with the losses, or a Trace of both")
    return certify_halting(
        scores,
        losses,
        thresholds=[float(text) for text in certificate.evidence["screened"]],
        risk=float(certificate.risk),  # type: ignore[arg-type]
        delta=certificate.delta,
        loss=certificate.loss,
        unit=certificate.unit,
    ).certificate


def _sequential_again(certificate: Certificate, losses: Any) -> Certificate:
    settings = certificate.evidence["settings"]
    columns = losses
    if not callable(losses):
        table = np.asarray(losses)
        if table.ndim != 2 or table.shape[0] < settings["max_units"]:
            needed = f"[at least {settings['max_units']} units, {settings['n_columns']}]"
            raise InvalidArgumentError("losses", f"shape {table.shape}", needed)
        columns = table.T.__getitem__

    def draw(column: int, first: int, last: int) -> ArrayLike:
        return np.asarray(columns(column))[first:last]

    return again_from(certificate, draw, batch=_BATCH)
