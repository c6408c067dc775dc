"""Testing again: whether losses reproduce a certificate's evidence and decision."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from adaptive.calibration._certificate import Certificate
from adaptive.calibration._errors import InvalidArgumentError, UnsupportedError
from adaptive.calibration._examination import Examiner, Settings
from adaptive.calibration._losses import LossColumns, Losses, loss_columns
from adaptive.calibration._methods import TESTS
from adaptive.calibration._procedures import procedure_of
from adaptive.calibration._validation import group_codes


def verify_certificate(
    certificate: Certificate, losses: Losses, *, groups: ArrayLike | None
) -> bool:
    """Return whether the losses reproduce the certificate's evidence and decision.

    Raises
    ------
    UnsupportedError
        If the certificate names a test that this library does not have.
    """
    if "groups" in certificate.evidence:
        return _verify_groups(certificate, losses, groups)
    sources = _recorded_sources(certificate, losses)
    if groups is not None:
        sources = tuple(source.cluster(groups) for source in sources)
    return _verify_one(certificate, sources)


def _verify_groups(certificate: Certificate, losses: Losses, groups: ArrayLike | None) -> bool:
    if groups is None:
        raise InvalidArgumentError("groups", None, "given: the certificate is per group")
    labels = np.asarray(groups)
    codes, names = group_codes(labels, labels.size)
    recorded = certificate.evidence["groups"]
    if {str(name) for name in names} != set(recorded):
        return False
    parts = {name: Certificate.from_dict(values) for name, values in recorded.items()}
    agreed = all(
        _verify_one(part, tuple(s.within(codes == g) for s in _recorded_sources(part, losses)))
        for g, part in enumerate(parts[str(name)] for name in names)
    )
    shared = set.intersection(*(set(part.evidence["certified"]) for part in parts.values()))
    return agreed and certificate.index == (max(shared) if shared else None)


def _recorded_sources(certificate: Certificate, losses: Losses) -> tuple[LossColumns, ...]:
    recorded = certificate.evidence["losses"]
    facts = {
        key: {entry["name"]: entry[key] for entry in recorded}
        for key in ("risk", "bound", "loss_type")
    }
    table = losses if isinstance(losses, Mapping) else {recorded[0]["name"]: losses}
    count = certificate.evidence["n_columns"]
    return loss_columns(table, n_columns=count, name="", **facts)


def _verify_one(certificate: Certificate, sources: tuple[LossColumns, ...]) -> bool:
    evidence = certificate.evidence
    known = {test.name: test for test in TESTS}
    missing = [e["test"] for e in evidence["losses"] if e["test"] not in known]
    if missing:
        raise UnsupportedError(f"cannot verify: this library has no test named {missing[0]!r}")
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
    if list(again.visited) != evidence["columns"] or list(again.rejected) != evidence["certified"]:
        return False
    found = [examiner.visits[j].log_p for j in again.visited]
    # a cheaper certified column, or full computation, may have been preferred for its cost
    allowed = certificate.index is None or certificate.index in again.rejected
    return bool(np.allclose(found, evidence["log_p_values"], rtol=1e-6, atol=1e-9)) and (
        allowed and certificate.holds == (certificate.index is not None)
    )
