"""Every result has a certificate that travels, reads plainly and is verified by testing again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from adaptive.calibration import (
    Certificate,
    CertificateError,
    ConditionalValueAtRisk,
    IntervalMean,
    InvalidArgumentError,
    InvalidTypeError,
    Quantile,
    Trace,
    UnsupportedError,
    Verification,
    certify_halting,
    conformal_risk_control,
    control_risk,
    control_risk_split,
    control_sequentially,
    control_tail,
    departure_curve,
    prediction_powered_losses,
    risk_curve,
    shifted_losses,
)

RNG = np.random.default_rng(3)
N = 400
LOSSES = np.minimum.accumulate(RNG.random((N, 4))[:, ::-1], axis=1)[:, ::-1] * [0, 0.1, 0.2, 0.9]
LOSSES = np.maximum.accumulate(LOSSES, axis=1)
ERRORS = (RNG.random((N, 4)) < [0.0, 0.01, 0.02, 0.4]).astype(float)
SCORES = RNG.random((N, 3))
PROXY = np.minimum(1.0, ERRORS + (RNG.random(ERRORS.shape) < 0.05))
PLENTY = (RNG.random((4000, 4)) < [0.0, 0.05, 0.06, 0.4]).astype(float)
WEIGHTS = RNG.uniform(0.5, 1.5, N)
THRESHOLDS = np.array([np.inf, 0.95, 0.8, 0.2])


def shifted():
    return shifted_losses(ERRORS, weights=WEIGHTS, risk=0.1, max_weight=1.5)


def powered():
    return prediction_powered_losses(ERRORS, proxy=PROXY, proxy_plenty=PLENTY, power=0.5)


def trace_of(errors=ERRORS[:, 1:]):
    return Trace(
        scores=SCORES, losses={"error": errors}, costs=[1.0, 2.0, 3.0, 4.0], cost_quantity="FLOPs"
    )


def draw(column, first, last):
    return ERRORS[first:last, column]


TAILS = (Quantile(0.9), ConditionalValueAtRisk(0.8), IntervalMean(0.25, 0.75))
CASES = {
    "conformal": (conformal_risk_control(LOSSES, risk=0.2), (LOSSES,), {}),
    **{
        type(tail).__name__: (control_tail(LOSSES, tail=tail, risk=0.3), (LOSSES,), {})
        for tail in TAILS
    },
    "upper bounds": (control_risk(LOSSES, risk=0.2, procedure="upper-bound"), (LOSSES,), {}),
    "halting": (
        certify_halting(SCORES, ERRORS[:, 1:], thresholds=[0.9, 0.6, np.inf], risk=0.1, delta=0.1),
        (ERRORS[:, 1:],),
        {"scores": SCORES},
    ),
    "sequential": (
        control_sequentially(draw, n_columns=4, risk=0.1, max_units=N),
        (ERRORS,),
        {},
    ),
    "shifted": (control_risk(shifted(), risk=0.1), (shifted(),), {}),
    "powered": (control_risk(powered(), risk=0.2), (powered(),), {}),
    "curve": (
        control_risk(risk_curve(trace_of(), THRESHOLDS, loss="error"), risk=0.1),
        (trace_of(),),
        {},
    ),
    "departures": (
        control_risk(
            departure_curve(trace_of(), THRESHOLDS, loss="error"), risk=0.1, loss_type="binary"
        ),
        (trace_of(),),
        {},
    ),
    "split": (
        control_risk_split(ERRORS, costs=[4.0, 3.0, 2.0, 1.0], risk=0.1, loss_type="binary"),
        (ERRORS,),
        {},
    ),
}
case = pytest.mark.parametrize("name", CASES)


@case
def test_certificates_travel(name):
    certificate = CASES[name][0].certificate
    text = certificate.to_json()
    read = Certificate.from_json(text)
    assert read == certificate
    assert read.statement() == certificate.statement()
    values = json.loads(text)
    with pytest.raises(CertificateError, match="schema version 2 is unknown"):
        Certificate.from_dict({**values, "schema_version": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.risk = 1.0


@case
def test_certificates_are_verified_by_testing_again(name):
    result, losses, others = CASES[name]
    assert result.index if hasattr(result, "index") else True
    verify = (
        result.verify
        if name == "split"
        else Certificate.from_json(result.certificate.to_json()).verify
    )
    again = verify(*losses, **others)
    assert isinstance(again, Verification)
    assert again, str(again)
    assert "is reproduced" in str(again)


def changed(name, losses):
    if name in ("split", "halting"):
        return 1.0 - losses
    if isinstance(losses, Trace):
        return trace_of(1.0 - losses.losses["error"])
    if isinstance(losses, np.ndarray):
        return np.maximum.accumulate(np.minimum(1.0, losses + 0.3), axis=1)
    return dataclasses.replace(losses, losses=losses.losses - 0.1)


@case
def test_other_losses_are_not_and_it_says_what_differs(name):
    result, (losses,), others = CASES[name]
    verify = result.verify if name == "split" else result.certificate.verify
    again = verify(changed(name, losses), **others)
    assert not again
    assert all(" recorded, " in line or "is not" in line for line in again.differences)
    assert str(again).startswith("Not reproduced:\n- ")


@case
def test_a_forged_decision_is_not_verified(name):
    result, (losses,), others = CASES[name]
    if name == "split":
        pytest.skip("the certificate is that of the test split")
    certificate = result.certificate
    forged = dataclasses.replace(certificate, index=None, holds=False)
    if name not in ("upper bounds", "shifted", "powered", "curve", "departures"):
        assert not forged.verify(losses, **others)  # elsewhere costs may have spoken against it
    assert not dataclasses.replace(certificate, index=None).verify(losses, **others)
    lower = dataclasses.replace(certificate, risk=certificate.risk / 50)
    assert not lower.verify(losses, **others)


@case
def test_statements_are_one_paragraph_about_the_promise(name):
    result = CASES[name][0]
    certificate = result.certificate
    text = certificate.statement()
    assert "\n" not in text
    assert "  " not in text
    assert text.endswith(".")
    if name == "conformal":
        assert "no probability is given" in text
        assert "in expectation" in certificate.summary
    else:
        assert "not a rate per unit" in text
        assert "over the draw of the" in text
    if hasattr(result, "statement"):
        assert result.statement() == text


def test_statements_name_what_is_promised():
    said = {name: result.certificate.statement() for name, (result, _, _) in CASES.items()}
    assert "0.9-quantile of the loss at every certified column" in said["Quantile"]
    assert "mean of the worst 0.2 of losses" in said["ConditionalValueAtRisk"]
    assert "mean loss between quantiles 0.25 and 0.75" in said["IntervalMean"]
    assert "among units that stop by exit k" in said["halting"]
    assert "the traffic that the weights describe" in said["shifted"]
    assert "never exceed 1.5" in said["shifted"]
    assert "The mean is that of the graded loss" in said["powered"]
    assert "(knob 0.2)" in said["curve"]


def test_a_trace_is_known_again():
    certificate = CASES["curve"][0].certificate
    assert certificate.fingerprints["trace"] == trace_of().fingerprint()
    assert certificate.knob == pytest.approx(0.2)
    by_array = control_risk(LOSSES, risk=0.2).certificate
    with pytest.raises(InvalidArgumentError, match="they were not read off a trace"):
        by_array.verify(trace_of())
    other = Trace(scores=SCORES, losses={"x": ERRORS[:, 1:]}, costs=[1, 2, 3, 4], cost_quantity="s")
    with pytest.raises(InvalidArgumentError, match="with a loss 'error'"):
        certificate.verify(other)
    halting = CASES["halting"][0].certificate
    assert halting.verify(trace_of())
    with pytest.raises(InvalidArgumentError, match="a loss 'error'"):
        halting.verify(other)


def test_groups_of_a_trace_are_clusters_at_the_door_and_in_verification():
    groups = np.repeat(np.arange(N // 4), 4)
    trace = dataclasses.replace(trace_of(), groups=groups)
    result = control_risk(risk_curve(trace, THRESHOLDS, loss="error"), risk=0.1)
    assert result.certificate.n == N // 4
    assert result.certificate.unit == "cluster"
    assert result.certificate.verify(trace)
    assert not result.certificate.verify(trace_of())
    curve = risk_curve(trace, THRESHOLDS, loss="error")
    with pytest.raises(InvalidArgumentError, match="without groups"):
        control_tail(curve, tail=Quantile(0.9), risk=0.1)
    with pytest.raises(InvalidArgumentError, match="without groups"):
        control_risk_split(curve, costs=[4.0, 3.0, 2.0, 1.0], risk=0.1)


def test_curves_that_are_no_path_are_refused():
    with pytest.raises(InvalidArgumentError, match="inf first"):
        control_risk(risk_curve(trace_of(), [0.9, 0.5], loss="error"), risk=0.1)
    weighted = dataclasses.replace(trace_of(), weights=np.ones(N))
    with pytest.raises(InvalidArgumentError, match="unweighted"):
        control_risk(risk_curve(weighted, THRESHOLDS, loss="error"), risk=0.1)
    with pytest.raises(InvalidArgumentError, match="at least 2"):
        control_risk(risk_curve(trace_of(), [np.inf], loss="error"), risk=0.1)


def test_curves_and_transformed_losses_go_through_the_other_doors():
    curve = risk_curve(trace_of(), THRESHOLDS, loss="error")
    tail = control_tail(curve, tail=Quantile(0.9), risk=0.1)
    assert tail.certificate.verify(trace_of())
    by_hand = np.column_stack([curve.unit_losses(j) for j in range(4)])
    np.testing.assert_array_equal(
        tail.upper_bounds, control_tail(by_hand, tail=Quantile(0.9), risk=0.1).upper_bounds
    )
    costs = [4.0, 3.0, 2.0, 1.0]
    for losses, array, bound in (
        (curve, by_hand, 1.0),
        (shifted(), shifted().losses, shifted().bound),
    ):
        found = control_risk_split(losses, costs=costs, risk=0.1)
        plain = control_risk_split(array, costs=costs, risk=0.1, bound=bound)
        assert found.configuration == plain.configuration
        assert found.verify(losses)


def test_transformed_losses_bring_their_bound_and_their_promise():
    with pytest.raises(InvalidArgumentError, match="as the losses were made for"):
        control_risk(shifted(), risk=0.2)
    with pytest.raises(InvalidArgumentError, match="as transformed"):
        control_risk(shifted(), risk=0.1, bound=3.0)
    by_hand = control_risk(shifted().losses, risk=0.1, bound=shifted().bound)
    np.testing.assert_array_equal(by_hand.log_p_values, CASES["shifted"][0].log_p_values)
    with pytest.raises(InvalidTypeError, match="one loss, as it is"):
        control_tail(shifted(), tail=Quantile(0.9), risk=0.1)


def test_what_cannot_be_verified_is_named():
    certificate = CASES["Quantile"][0].certificate
    evidence = certificate.evidence
    unknown = dataclasses.replace(certificate, evidence={**evidence, "kind": "of the future"})
    with pytest.raises(UnsupportedError, match="no evidence of kind 'of the future'"):
        unknown.verify(LOSSES)
    tail = dataclasses.replace(certificate, evidence={**evidence, "tail": {"name": "Worst"}})
    with pytest.raises(UnsupportedError, match="no tail risk named 'Worst'"):
        tail.verify(LOSSES)
    with pytest.raises(UnsupportedError, match="no test was run"):
        dataclasses.replace(certificate, evidence={}).verify(LOSSES)
    with pytest.raises(InvalidArgumentError, match="only halting needs them"):
        certificate.verify(LOSSES, scores=SCORES)
    with pytest.raises(InvalidArgumentError, match="`groups` must be left out"):
        certificate.verify(LOSSES, groups=np.zeros(N))
    with pytest.raises(InvalidArgumentError, match="`scores` must be given"):
        CASES["halting"][0].certificate.verify(ERRORS[:, 1:])


def test_nothing_certified_says_why():
    conformal = conformal_risk_control(np.ones((5, 2)), risk=0.05).certificate
    assert not conformal.holds
    assert "fewer than 19 units" in conformal.statement()
    halting = certify_halting(
        SCORES, 1.0 - ERRORS[:, 1:], thresholds=[0.1, 0.1, 0.1], risk=0.05, delta=0.05
    ).certificate
    assert halting.statement().startswith("Nothing beyond full computation is certified at error")
    tail = control_tail(LOSSES[:5], tail=Quantile(0.9), risk=0.1).certificate
    assert "only bounded by 1" in tail.statement()
