"""The one door and hostile input: an error that names the argument, or the right answer."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from adaptive.calibration import (
    AdaptiveError,
    Certificate,
    FixedSequence,
    Graph,
    InvalidArgumentError,
    InvalidTypeError,
    MeanEProcess,
    Quantile,
    average_e,
    beta_mixture_log_p,
    binomial_log_p,
    conformal_risk_control,
    control_risk,
    control_risk_split,
    control_tail,
    hoeffding_bentkus_log_p,
    holm,
    mixture_log_p,
    pareto_front,
    prediction_powered_losses,
    ratio_log_p,
    screen_halting,
    shifted_losses,
    wsr_log_p,
)

N = 300
LOSSES = (np.random.default_rng(0).random((N, 4)) < [0.0, 0.01, 0.02, 0.3]).astype(float)
PLAIN = control_risk(LOSSES, risk=0.05)
RAGGED = [[0, 1], [0]]
MASKED = np.ma.masked_array(LOSSES, mask=LOSSES > 0)
NOT_NUMBERS = LOSSES.astype(object)
NOT_NUMBERS[3, 1] = "x"
MISSING = LOSSES.astype(object)
MISSING[3, 1] = None


@pytest.mark.parametrize(
    "losses",
    [
        LOSSES.astype(object),
        LOSSES.astype(np.float16),
        LOSSES.astype(np.float32),
        LOSSES.astype(np.longdouble),
        LOSSES.astype(">f8"),
        LOSSES.astype(bool),
        LOSSES.astype(int),
        LOSSES.astype(np.int8),
        LOSSES.astype(np.uint8),
        LOSSES.tolist(),
        tuple(map(tuple, LOSSES)),
        pd.DataFrame(LOSSES),
        np.asfortranarray(LOSSES),
        np.repeat(LOSSES, 2, axis=1)[:, ::2],
        LOSSES[::-1][::-1],
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_numbers_are_numbers_however_they_are_kept(losses):
    for kind in ("bounded", "binary"):
        found = control_risk(losses, risk=0.05, loss_type=kind)
        expected = control_risk(LOSSES, risk=0.05, loss_type=kind)
        np.testing.assert_array_equal(found.log_p_values, expected.log_p_values)
        assert found.certificate.verify(losses)


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (LOSSES + 0j, "real numbers, not of complex128"),
        (LOSSES.astype(str), "real numbers, not of <U"),
        (LOSSES.astype("datetime64[s]"), "not of datetime64"),
        (NOT_NUMBERS, "an array of real numbers"),
        (MISSING, "finite numbers, got nan at unit 3, column 1"),
        (RAGGED, "got rows of different lengths"),
        (MASKED, "without masked values"),
        ([[0, 10**400], [0, 0]], "an array of real numbers"),
        (np.where(LOSSES > 0, -1e200, 0.0), r"of size 1e\+150 at most, got -1e\+200 at unit"),
        (np.zeros((0, 4)), r"got shape \(0, 4\)"),
        (np.zeros((4, 1)), r"got shape \(4, 1\)"),
        (np.zeros(10), r"got shape \(10,\)"),
        (None, "`losses`"),
        (3.0, "`losses`"),
        (LOSSES.astype(np.uint8) * 255, "at most `bound` = 1, got 255"),
    ],
    ids=str,
)
def test_what_is_no_array_of_losses_is_refused(losses, text):
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=text) as caught:
        control_risk(losses, risk=0.05)
    assert caught.value.argument == "losses"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "bad",
    [RAGGED, LOSSES + 0j, (x for x in (1.0,)), "text"],
    ids=["ragged", "complex", "generator", "text"],
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: conformal_risk_control(x, risk=0.1), "losses"),
        (lambda x: control_tail(x, tail=Quantile(0.9), risk=0.1), "losses"),
        (lambda x: screen_halting(x, LOSSES, risk=0.1), "scores"),
        (lambda x: screen_halting(LOSSES, x, risk=0.1), "losses"),
        (lambda x: shifted_losses(LOSSES, weights=x, risk=0.1, max_weight=2.0), "weights"),
        (lambda x: prediction_powered_losses(x, proxy=LOSSES, proxy_plenty=LOSSES), "graded"),
        (lambda x: wsr_log_p(x, risk=0.1, delta=0.1), "losses"),
        (lambda x: mixture_log_p(x, risk=0.1), "losses"),
        (lambda x: binomial_log_p(x, 300, risk=0.1), "errors"),
        (lambda x: binomial_log_p(1, 300, risk=x), "risk"),
        (lambda x: ratio_log_p(x, LOSSES, risk=0.1), "errors"),
        (lambda x: hoeffding_bentkus_log_p(x, 300, risk=0.1), "total"),
        (lambda x: beta_mixture_log_p(x, 300, risk=0.1), "errors"),
        (lambda x: holm(x, delta=0.1), "p_values"),
        (lambda x: pareto_front(x), "objectives"),
        (lambda x: MeanEProcess(level=0.1).path(x), "values"),
        (lambda x: average_e(x), "log_e"),
        (lambda x: control_risk_split(x, costs=[4, 3, 2, 1], risk=0.1), "losses"),
        (lambda x: control_risk(LOSSES, risk=0.1).certificate.verify(x), "losses"),
    ],
)
def test_other_doors_name_what_is_no_array(call, name, bad):
    with pytest.raises((InvalidArgumentError, InvalidTypeError)) as caught:
        call(bad)
    assert caught.value.argument == name


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda j: LOSSES[: N - j, j], "299 units in each, got 298 units in column 2"),
        (lambda j: LOSSES[:, [j]], r"got shape \(300, 1\) for column 1"),
        (lambda j: 0.0, r"got shape \(\) for column 1"),
        (lambda j: None, "`losses`"),
        (lambda j: [], r"got shape \(0,\)"),
        (lambda j: RAGGED, "different lengths"),
        (lambda j: LOSSES[:, j] + 0j, "not of complex128"),
        (lambda j: (x for x in LOSSES[:, j]), "an array of real numbers"),
        (lambda j: np.where(np.arange(N) == 7, np.nan, 0.0), "nan at unit 7, column 1"),
    ],
)
def test_providers_that_answer_wrongly_are_named(answer, text):
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=text):
        control_risk(answer, risk=0.05, n_columns=4)


def test_a_providers_own_error_is_its_own():
    with pytest.raises(ZeroDivisionError):
        control_risk(lambda j: 1 / 0, risk=0.05, n_columns=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("risk", v) for v in (0, -0.1, 1, 2, np.nan, np.inf, "0.05", None, True, [0.05])),
        *(("risk", v) for v in (np.array(0.05), {"a": 0.05})),
        *(("delta", v) for v in (0, 1, -0.1, 1.5, np.nan, "x", None, True)),
        *(("bound", v) for v in (0, -1, np.nan, np.inf, "1", None, True)),
        *(("loss_type", v) for v in ("Binary", None, 1, ["binary"], b"binary", "")),
        *(("method", v) for v in ("STAR", None, 3, "", FixedSequence)),
        *(("procedure", v) for v in ("x", None, 3, FixedSequence, "graphical")),
        *(("starts", v) for v in ((), (0,), 1, None, (1.5,), ("a",), (-1,), (True,), (10**20,))),
        *(("starts", v) for v in ("1", (1, 1), (9,))),
        *(("costs", v) for v in ([4, 3, 2], [np.nan, 1, 1, 1], [np.inf] * 4, "abcd", ["a"] * 4)),
        *(("costs", v) for v in (5, [[4, 3, 2, 1]], {}, RAGGED)),
        *(("loss", v) for v in (None, 3, ["a"], b"x")),
        *(("unit", v) for v in (None, 3, ["a"], b"x")),
        *(("progress", v) for v in (3, "x")),
        *(("rng", v) for v in (1.5, "a", -1, True, [1, 2], np.random.RandomState(0))),
        *(("groups", v) for v in (np.zeros(5), np.zeros((N, 1)), 3, [], "abc", [None] * N)),
        *(("groups", v) for v in (np.full(N, np.nan), [pd.NA] * N, [[1]] * N, [{}] * N)),
        *(("n_columns", v) for v in (3, 4.0, "4", 9)),
        *(("per_group", v) for v in ("no", 1, None)),
    ],
    ids=lambda v: str(v)[:20],
)
def test_every_option_names_itself_when_wrong(name, value):
    with pytest.raises((InvalidArgumentError, InvalidTypeError)) as caught:
        control_risk(LOSSES, **{"risk": 0.05, name: value})
    assert caught.value.argument == name


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bound": 0.05}, r"`risk` must be in \(0, 0.05\)"),
        ({"bound": 0.01}, r"`risk` must be in \(0, 0.01\)"),
        ({"starts": (2,), "procedure": FixedSequence()}, "where `procedure` is an object"),
        ({"starts": (2,), "procedure": "holm"}, "left out for procedure 'holm'"),
        ({"starts": (1, 2), "procedure": "upper-bound"}, "a single column for upper bounds"),
        ({"method": "binomial", "bound": 2}, "1 for the exact binomial test"),
        ({"procedure": Graph((0,) * 4, ((0,) * 4,) * 4)}, "positive for some column but 0"),
        ({"procedure": Graph.of([0, 1.0], np.zeros((2, 2)))}, "4 non-negative numbers"),
        ({"per_group": True, "groups": np.array([1, "1"] * 150, dtype=object)}, "differ as text"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_named(settings, text):
    with pytest.raises(InvalidArgumentError, match=text):
        control_risk(LOSSES, **{"risk": 0.05, **settings})


@pytest.mark.parametrize(
    "groups",
    [
        [f"u{i // 3}" for i in range(N)],
        [(i // 3, "x") for i in range(N)],
        np.array([i // 3 if i % 2 else float(i // 3) for i in range(N)], dtype=object),
        pd.Series(np.arange(N) // 3, index=np.arange(N) + 5),
        pd.Categorical(np.arange(N) // 3),
        [10**30 + i // 3 for i in range(N)],
        (np.arange(N) // 3).astype("datetime64[D]"),
        np.array([["a", 1, ("b", 2)][i // 100] for i in range(N)], dtype=object),
    ],
    ids=lambda g: type(g).__name__,
)
def test_labels_are_any_hashable_things(groups):
    found = control_risk(LOSSES, risk=0.05, groups=groups)
    assert found.certificate.n in (3, 100)
    assert found.certificate.verify(LOSSES, groups=groups)


M = {"a": LOSSES, "b": LOSSES * 0.5}


@pytest.mark.parametrize(
    ("losses", "settings", "text"),
    [
        (M, {"risk": {"a": 0.05}}, r"`risk` must be given for each of \['a', 'b'\]"),
        (M, {"risk": {"a": 0.05, "b": 0.05, "c": 0.1}}, "`risk` must be given for each"),
        (M, {"bound": {"b": 1.0}}, "`bound` must be given for each"),
        (M, {"loss_type": "binary"}, "0 or 1 for a binary loss"),
        ({}, {}, "a non-empty mapping"),
        ({1: LOSSES}, {}, "`loss` must be a string"),
        ({"a": LOSSES, "b": LOSSES[:-1]}, {}, "300 units in each, got 299"),
        ({"a": LOSSES, "b": LOSSES[:, :3]}, {}, "the same number of columns"),
        ({"a": None}, {}, "`losses`"),
    ],
    ids=str,
)
def test_mappings_that_do_not_fit_are_named(losses, settings, text):
    with pytest.raises(AdaptiveError, match=text):
        control_risk(losses, **{"risk": 0.05, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"risk": np.float32(0.05)},
        {"delta": np.float16(0.1)},
        {"bound": np.float32(1.0)},
        {"bound": 1},
        {"starts": np.array([1, 3])},
        {"starts": range(1, 3)},
        {"costs": pd.Series([4, 3, 2, 1])},
        {"costs": [-1, -2, -3, -4]},
        {"costs": [1, 2, 3, 4]},
        {"rng": np.int64(3)},
        {"rng": 2**70},
        {"risk": 1e-320},
        {"risk": 1e-9},
        {"risk": 0.9999999999999999},
        {"delta": 5e-324},
        {"bound": 1e308},
        {"loss": "", "unit": ""},
    ],
    ids=str,
)
def test_unusual_settings_give_certificates_that_travel(settings):
    found = control_risk(LOSSES, **{"risk": 0.05, **settings})
    read = Certificate.from_dict(json.loads(found.certificate.to_json()))
    assert read == found.certificate
    assert read.verify(LOSSES)


def test_risks_beyond_reach_say_so():
    assert "too few by far" in control_risk(LOSSES, risk=1e-9).certificate.statement()


def test_costs_that_rise_leave_full_computation():
    result = control_risk(LOSSES, risk=0.05, costs=[1, 2, 3, 4])
    assert result.index == PLAIN.index == 2
    assert result.chosen is None


@pytest.mark.parametrize("method", ["star", "wsr", "agrapa", "mixture", "normal"])
def test_gains_without_measure_pass_and_are_recorded(method):
    losses = np.where(LOSSES > 0, -1e140, 0.01)
    result = control_risk(losses, risk=0.05, method=method)
    assert not np.isnan(result.log_p_values[1])
    assert Certificate.from_json(result.certificate.to_json()) == result.certificate
