"""The one door: decisions, shapes, refusals and certificates of `control_risk`."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaptive.calibration import (
    Certificate,
    CertificateError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
    binomial_upper_bound,
    control_risk,
    minimum_units,
    plan_units,
)
from adaptive.calibration._planning import _search


def bernoulli(n=500, rates=(0.0, 0.01, 0.02, 0.2, 0.01), seed=1):
    return (np.random.default_rng(seed).random((n, len(rates))) < rates).astype(float)


def signed(n=500, columns=8, seed=2):
    draws = np.random.default_rng(seed).beta(0.3, 5.0, (n, columns))
    return draws - 0.02 * np.arange(columns)[::-1]


def test_last_passing_column_is_returned_and_later_ones_are_never_read():
    losses = bernoulli()
    asked = []

    def provider(column):
        asked.append(column)
        return losses[:, column]

    result = control_risk(provider, risk=0.05, loss_type="binary", n_columns=5)
    assert result.index == 2
    assert result.certified.tolist() == [True, True, True, False, False]
    assert result.visited == (1, 2, 3)
    assert set(asked) == {1, 2, 3}
    assert np.isnan(result.p_values[[0, 4]]).all()


def test_array_and_provider_agree():
    losses = signed()
    from_array = control_risk(losses, risk=0.05, rng=3)
    from_provider = control_risk(lambda j: losses[:, j], risk=0.05, rng=3, n_columns=8)
    np.testing.assert_array_equal(from_array.log_p_values, from_provider.log_p_values)


def test_method_is_chosen_from_declared_facts_only():
    losses = bernoulli()
    assert control_risk(losses, risk=0.05, loss_type="binary").certificate.method == "binomial"
    assert control_risk(losses, risk=0.05).certificate.method == "star"
    assert control_risk(bernoulli(25_000), risk=0.05).certificate.method == "wsr"


def test_the_order_of_units_comes_from_rng_alone():
    losses = signed()
    first = control_risk(losses, risk=0.05, rng=11)
    again = control_risk(losses, risk=0.05, rng=np.random.default_rng(11))
    other = control_risk(losses, risk=0.05, rng=12)
    np.testing.assert_array_equal(first.log_p_values, again.log_p_values)
    assert not np.array_equal(first.log_p_values, other.log_p_values)


def test_too_few_units_is_a_described_outcome():
    result = control_risk(bernoulli(30), risk=0.05, loss_type="binary")
    assert result.index is None
    assert not result.certificate.holds
    assert "needs 59" in result.certificate.statement()
    assert "Full computation is used" in str(result.certificate)


def test_chosen_is_cheapest_certified_or_none():
    losses = bernoulli(rates=(0, 0.001, 0.001, 0.001))
    assert control_risk(losses, risk=0.05, costs=[1.0, 0.9, 0.5, 0.7]).chosen == 2
    assert control_risk(losses, risk=0.05, costs=[1.0, 1.1, 1.2, 1.3]).chosen is None
    assert control_risk(losses, risk=0.05, costs=[1.0, 1.1, 1.2, 1.3]).index == 3


def test_starts_skip_columns_and_share_delta():
    losses = bernoulli(rates=(0, 0.2, 0.01, 0.01, 0.2, 0.01))
    single = control_risk(losses, risk=0.05, loss_type="binary", starts=(2,))
    assert single.certified.tolist() == [True, False, True, True, False, False]
    double = control_risk(losses, risk=0.05, loss_type="binary", starts=(2, 5))
    assert double.certified.tolist() == [True, False, True, True, False, True]
    assert double.levels[5] == pytest.approx(0.025)
    with pytest.raises(InvalidArgumentError, match="column 0 is not tested"):
        control_risk(losses, risk=0.05, starts=(0,))


def test_clusters_are_units():
    losses = np.repeat(bernoulli(100), 5, axis=0)
    groups = np.repeat(np.arange(100), 5)
    clustered = control_risk(losses, risk=0.05, groups=groups, loss_type="binary")
    alone = control_risk(losses[::5], risk=0.05, loss_type="bounded")
    assert clustered.certificate.n == 100
    assert clustered.certificate.unit == "cluster"
    np.testing.assert_array_equal(clustered.log_p_values, alone.log_p_values)


def test_per_group_holds_jointly():
    losses = bernoulli(1000, rates=(0, 0.001, 0.02, 0.02))
    groups = np.where(np.arange(1000) < 500, "en", "de")
    losses[500:, 3] = 1.0
    result = control_risk(
        losses, risk=0.05, delta=0.1, loss_type="binary", groups=groups, per_group=True
    )
    assert set(result.groups) == {"en", "de"}
    assert result.groups["en"].index == 3
    assert result.groups["de"].index == result.index == 2
    assert result.groups["de"].certificate.delta == pytest.approx(0.05)
    assert result.certificate.verify(losses, groups=groups)
    halves = np.split(losses[:, 2], 2)
    bounds = [float(binomial_upper_bound(half.sum(), 500, delta=0.05)) for half in halves]
    assert result.bounds[2] == min(max(bounds), 0.05)  # at the column in use, which "en" went past
    assert np.isnan(result.bounds[[0, 1, 3]]).all()
    np.testing.assert_array_equal(result.levels, [np.nan, 0.05, 0.05, 0.05])


def test_several_risks_need_every_test_to_pass():
    a, b = bernoulli(rates=(0, 0.01, 0.01, 0.01)), bernoulli(rates=(0, 0.01, 0.2, 0.01), seed=5)
    result = control_risk({"a": a, "b": b}, risk={"a": 0.05, "b": 0.06}, loss_type="binary")
    only_b = control_risk(b, risk=0.06, loss_type="binary")
    assert result.index == only_b.index == 1
    assert "mean a <= 0.05 and mean b <= 0.06" in result.certificate.statement()
    assert result.certificate.verify({"a": a, "b": b})


@pytest.mark.parametrize("method", ["auto", "wsr", "agrapa"])
def test_scaling_loss_bound_and_risk_together_changes_nothing(method):
    losses = signed()
    small = control_risk(losses, risk=0.05, method=method)
    large = control_risk(8 * losses, risk=0.4, bound=8.0, method=method)
    np.testing.assert_allclose(small.log_p_values, large.log_p_values, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"risk": 1.5}, r"`risk` must be in \(0, 1\), got 1.5"),
        ({"risk": "much"}, "`risk` must be a real number"),
        ({"delta": 0.0}, r"`delta` must be in \(0, 1\)"),
        ({"bound": 0.5}, "at most `bound` = 0.5, got 1 at unit"),
        ({"method": "magic"}, "`method` must be one of 'auto', 'binomial'"),
        ({"procedure": "magic"}, "`procedure` must be one of"),
        ({"costs": [1.0, 2.0]}, "`costs` must be"),
        ({"n_columns": 3}, "`n_columns` must be 5"),
        ({"groups": [0, 1]}, "`groups` must be"),
        ({"per_group": True}, "`groups` must be given"),
        ({"starts": (1, 1)}, "`starts` must be distinct"),
        ({"starts": (9,)}, "`starts` must be distinct positions below 5"),
    ],
)
def test_refusals_name_the_argument(change, text):
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=text):
        control_risk(bernoulli(), **{"risk": 0.05, **change})


@pytest.mark.parametrize(
    ("value", "settings", "text"),
    [
        (np.nan, {}, "finite numbers, got nan at unit 7, column 2"),
        (-np.inf, {}, "finite numbers, got -inf at unit 7, column 2"),
        (0.5, {"loss_type": "binary"}, "0 or 1 for a binary loss"),
        (1.5, {}, "at most `bound` = 1, got 1.5 at unit 7, column 2"),
        (-0.1, {"method": "binomial"}, r"at least 0 \(binomial test\)"),
    ],
)
def test_bad_losses_are_errors_never_a_silent_stop(value, settings, text):
    losses = bernoulli()
    losses[7, 2] = value
    with pytest.raises(InvalidArgumentError, match=text):
        control_risk(losses, risk=0.05, **settings)


def test_a_callable_needs_its_number_of_columns():
    with pytest.raises(InvalidArgumentError, match="`n_columns` must be given"):
        control_risk(lambda j: np.zeros(10), risk=0.05)


def test_a_provider_must_keep_its_units():
    with pytest.raises(InvalidArgumentError, match="100 units in each"):
        control_risk(lambda j: np.zeros(101 - j), risk=0.05, n_columns=3)


def test_certificate_round_trip_and_verification():
    losses = signed()
    result = control_risk(losses, risk=0.05, loss="harm", unit="prompt")
    read = Certificate.from_json(result.certificate.to_json())
    assert read == result.certificate
    assert read.verify(losses)
    changed = losses.copy()
    changed[:, 1] += 0.01
    assert not read.verify(changed)
    assert "mean of the positive part" in read.statement()
    assert "mean harm <= 0.05" in read.summary


def test_a_certificate_is_shown_in_one_line():
    certificate = control_risk(np.zeros((500, 3)), risk=0.05).certificate
    assert repr(certificate) == f"Certificate({certificate.summary})"
    assert len(repr(certificate)) < 300


def test_unknown_certificates_are_refused():
    values = control_risk(bernoulli(), risk=0.05).certificate.to_dict()
    with pytest.raises(CertificateError, match="schema version 99 is unknown"):
        Certificate.from_dict({**values, "schema_version": 99})
    with pytest.raises(CertificateError, match="unknown \\['extra'\\]"):
        Certificate.from_dict({**values, "extra": 1})
    del values["delta"]
    with pytest.raises(CertificateError, match="missing \\['delta'\\]"):
        Certificate.from_dict(values)
    with pytest.raises(CertificateError, match="must be JSON"):
        Certificate.from_json("{")


def test_result_reads_well():
    result = control_risk(bernoulli(), risk=0.05, loss_type="binary")
    assert repr(result).startswith("RiskControlResult(index=2, chosen=2, certified=3 of 5 columns")
    frame = result.to_frame()
    assert frame["certified"].sum() == 3
    assert frame.index.name == "column"


@pytest.mark.parametrize(
    ("risk", "expected"),
    [
        (0.01, (230, 299, 459)),
        (0.02, (114, 149, 228)),
        (0.05, (45, 59, 90)),
        (0.1, (22, 29, 44)),
    ],
)
def test_minimum_units_table(risk, expected):
    found = [minimum_units(risk, delta, loss_type="binary") for delta in (0.1, 0.05, 0.01)]
    assert tuple(found) == expected


@pytest.mark.parametrize("method", ["binomial", "star", "wsr", "agrapa"])
def test_minimum_units_is_where_zero_loss_begins_to_pass(method):
    least = minimum_units(0.05, 0.05, method=method)
    for n, passes in ((least - 1, False), (least, True)):
        result = control_risk(np.zeros((n, 2)), risk=0.05, delta=0.05, method=method)
        assert (result.index == 1) is passes


def test_a_power_out_of_reach_is_named_with_its_value():
    with pytest.raises(InvalidArgumentError, match=r"`power` must be reachable .*, got 0\.9"):
        _search(lambda n: False, 10_000_001, power=0.9)


def test_plan_units_against_a_known_answer():
    assert plan_units(0.05, 0.1, true_risk=0.02, loss_type="binary") == 258
    assert plan_units(0.05, 0.1, true_risk=0.02) > 258


@pytest.mark.parametrize("method", ["auto", "wsr", "hoeffding-bentkus", "mixture"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_tiny_and_degenerate_calibrations_are_decided(n, method):
    for value in (0.0, 0.5, 1.0):
        losses = np.full((n, 3), value)
        result = control_risk(losses, risk=0.5, delta=0.3, method=method)
        assert result.index in ((None, 2) if value == 0.0 else (None,))
        assert result.certificate.verify(losses)


def test_a_million_units_and_far_tails_keep_their_order():
    n = 1_000_000
    counts = {1: 0, 2: 1000, 3: 20_000}

    def losses(column):
        return np.arange(n) < counts[column]

    result = control_risk(losses, risk=0.05, loss_type="binary", n_columns=4)
    assert result.index == 3
    assert result.log_p_values[1] < result.log_p_values[2] < result.log_p_values[3] < -12_000
    assert (result.p_values[1:] == 0.0).all()


def test_booleans_and_numbers_give_the_same_evidence():
    losses = bernoulli()
    for kind in ("binary", "bounded"):
        numbers = control_risk(losses, risk=0.05, loss_type=kind)
        booleans = control_risk(losses.astype(bool), risk=0.05, loss_type=kind)
        np.testing.assert_array_equal(numbers.log_p_values, booleans.log_p_values)
        assert numbers.certificate.verify(losses.astype(bool))


def test_progress_is_told_of_every_visited_column():
    seen = []
    result = control_risk(
        bernoulli(), risk=0.05, loss_type="binary", progress=lambda j, p: seen.append((j, p))
    )
    assert [j for j, _ in seen] == list(result.visited)
    assert [p for _, p in seen] == [result.log_p_values[j] for j in result.visited]


@pytest.mark.parametrize("loss_type", ["binary", "bounded"])
def test_weak_evidence_says_how_many_units_would_do(loss_type):
    losses = np.zeros((200, 2))
    losses[:7, 1] = 1.0
    text = control_risk(losses, risk=0.05, loss_type=loss_type).certificate.statement()
    said = int(text.split("About ")[1].split()[0])
    assert "evidence is too weak" in text
    assert 200 < said < 2000
    more = np.tile(losses, (said // 200 + 2, 1))
    assert control_risk(more, risk=0.05, loss_type=loss_type).index == 1


def test_verification_names_what_it_cannot_do():
    losses = bernoulli()
    result = control_risk(losses, risk=0.05)
    values = result.certificate.to_dict()
    values["evidence"]["losses"][0]["test"] = "of the future"
    with pytest.raises(UnsupportedError, match="no test named 'of the future'"):
        Certificate.from_dict(values).verify(losses)
    assert f"number of units: {len(losses)} recorded" in str(result.certificate.verify(losses[:-1]))
    groups = np.arange(len(losses)) % 2
    joint = control_risk(losses, risk=0.05, groups=groups, per_group=True)
    with pytest.raises(InvalidArgumentError, match="the certificate is per group"):
        joint.certificate.verify(losses)
    assert not joint.certificate.verify(losses, groups=groups + 5)


def test_a_changed_decision_is_not_verified():
    losses = bernoulli()
    values = control_risk(losses, risk=0.05, loss_type="binary").certificate.to_dict()
    values["index"] = 3
    assert not Certificate.from_dict(values).verify(losses)


def test_mappings_of_callables_are_read_lazily():
    a, b = bernoulli(), bernoulli(seed=9)
    table = {"a": a, "b": b}
    lazy = {name: (lambda j, part=part: part[:, j]) for name, part in table.items()}
    eager = control_risk(table, risk=0.05, loss_type="binary")
    result = control_risk(lazy, risk=0.05, loss_type="binary", n_columns=5)
    np.testing.assert_array_equal(result.log_p_values, eager.log_p_values)
    with pytest.raises(InvalidArgumentError, match="given for each of"):
        control_risk(table, risk={"a": 0.05})
    with pytest.raises(InvalidArgumentError, match="same number of columns"):
        control_risk({"a": a, "b": b[:, :3]}, risk=0.05)
    with pytest.raises(InvalidTypeError, match="a single value for a single loss"):
        control_risk(a, risk={"a": 0.05})


def test_the_bound_of_a_certified_column_is_at_most_the_promise_and_covers():
    """The bound comes from another test, which may be the weaker one: then the promise is it."""
    n, risk, delta, rate, replicates = 200, 0.07, 0.05, 0.06, 400
    clipped = missed = 0
    for seed in range(replicates):
        rng = np.random.default_rng(seed)
        column = (rng.random(n) < 2 * rate) * rng.random(n)
        result = control_risk(
            np.stack([np.zeros(n), column], axis=1), risk=risk, delta=delta, rng=seed
        )
        if result.index is None:
            continue
        assert result.bounds[1] <= risk
        clipped += result.bounds[1] == risk
        missed += result.bounds[1] < rate
    assert clipped > 0
    assert missed <= stats.binom.ppf(0.999, replicates, delta)
