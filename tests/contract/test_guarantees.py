"""Every public name of the ground floor that promises something is on trial, beside a wrong twin.

`__all__` falls into three parts: names simulated here; names whose trial is a test elsewhere, which
is named; and names that promise nothing about chance. A new public name fails the first test until
somebody says which it is.

The wrong twin is mostly the commonest mistake there is: every unit counted several times, as if the
tokens of a text were units. It fails the very limit that the right one keeps.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import adaptive.calibration as library
from adaptive.calibration import conformance

pytestmark = pytest.mark.statistical
TESTS = Path(__file__).parents[1]
N, RISK, DELTA, REPLICATES = 100, 0.1, 0.1, 4000


@pytest.fixture(autouse=True, scope="module")
def _no_forced_collection():
    """statsmodels collects garbage on every call: 70 ms each with a large heap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


def bernoulli(rng, level=RISK, n=N, replicates=REPLICATES):
    return (rng.random((n, replicates)) < level).astype(float)


def times(losses, copies):
    return np.repeat(losses, copies, axis=0)


def falsely_significant(log_p, *, copies, level=RISK):
    """Right and wrong use of a log p-value at its exact null."""

    def trial(rng):
        losses = bernoulli(rng, level)
        return [log_p(times(losses, c), level) <= math.log(DELTA) for c in (1, copies)]

    return trial


def missed(upper_bound, *, copies, level=RISK, replicates=REPLICATES):
    """Right and wrong use of an upper confidence bound."""

    def trial(rng):
        losses = bernoulli(rng, level, replicates=replicates)
        return [upper_bound(times(losses, c)) < level - 1e-12 for c in (1, copies)]

    return trial


def counted(function):
    """A p-value of totals, as one of losses [n, replicates]."""
    return lambda x, r: function(x.sum(axis=0).astype(int), x.shape[0], risk=r)


def bounded(function):
    return lambda x: function(x.sum(axis=0).astype(int), x.shape[0], delta=DELTA)


def by_test(kind):
    return lambda x, r: kind().log_p_values(x, risk=r, delta=DELTA, bound=1.0)


def ratio(rng):
    """The share of errors among the units that stopped; wrongly, over all units."""
    stopped = bernoulli(rng, 0.5).astype(bool)
    wrong = bernoulli(rng).astype(bool) & stopped
    right = library.ratio_log_p(wrong, stopped, risk=RISK)
    every = library.binomial_log_p(wrong.sum(axis=0), N, risk=RISK)
    return right <= math.log(DELTA), every <= math.log(DELTA)


def e_values(log_e, *, copies):
    def trial(rng):
        losses = bernoulli(rng)
        return [log_e(times(losses, c)) >= math.log(1 / DELTA) for c in (1, copies)]

    return trial


def one_bet(rng, bet):
    return library.constant_bet_log_wealth(bernoulli(rng), bet=bet, risk=RISK)


def averaged(rng):
    """Averages of e-values that depend on each other; wrongly, their product."""
    several = np.stack([one_bet(rng, 0.3)] * 8)
    right, wrong = library.average_e(several), library.multiply_e(several)
    return right >= math.log(1 / DELTA), wrong >= math.log(1 / DELTA)


def multiplied(rng):
    """The product of independent e-values; wrongly, the largest of many."""
    log_e = np.stack([one_bet(rng, 0.7) for _ in range(12)])
    right, wrong = library.multiply_e(log_e[:2]), log_e.max(axis=0)
    return right >= math.log(1 / DELTA), wrong >= math.log(1 / DELTA)


def to_p(rng):
    log_e = np.stack([one_bet(rng, 0.7) for _ in range(12)])
    right, wrong = library.e_to_log_p(log_e[0]), library.e_to_log_p(log_e.max(axis=0))
    return right <= math.log(DELTA), wrong <= math.log(DELTA)


def from_p(rng):
    """Two independent p-values as e-values, multiplied; wrongly by way of 1 / p."""
    p = rng.random((2, REPLICATES))
    right = library.multiply_e(library.p_to_log_e(p))
    return right >= math.log(1 / DELTA), -np.log(p).sum(axis=0) >= math.log(1 / DELTA)


def procedure(rule):
    """Five true hypotheses, independent; wrongly, each at the full delta."""

    def trial(rng):
        p = rng.random((1000, 5))
        right = [rule(row).any() for row in p]
        wrong = (p <= DELTA).any(axis=1)
        return right, wrong

    return trial


CHAIN = np.eye(5, k=1)


def walked(kind, **settings):
    """Five columns at the promise through the one door; wrongly, the best of five walks."""

    def trial(rng):
        right, wrong = [], []
        for _ in range(200):
            walks = [np.insert(bernoulli(rng, replicates=5), 0, 0.0, axis=1) for _ in range(5)]
            found = [
                library.control_risk(
                    w, risk=RISK, delta=DELTA, loss_type="binary", procedure=kind, **settings
                ).index
                is not None
                for w in walks
            ]
            right.append(found[0])
            wrong.append(any(found))
        return right, wrong

    return trial


def boundary(function):
    """A walk of fair steps under the boundary at all times; wrongly, a limit for one time."""

    def trial(rng):
        steps = np.where(rng.random((400, 2000)) < 0.5, 1.0, -1.0).cumsum(axis=0)
        time = np.arange(1.0, 401.0)
        right = (steps >= function(time)[:, None]).any(axis=0)
        fixed = np.sqrt(2.0 * time * math.log(1.0 / DELTA))[:, None]
        return right, (steps >= fixed).any(axis=0)

    return trial


def watched(rng):
    """An e-process looked at after every unit; wrongly, an exact test after every unit."""
    losses = bernoulli(rng, n=200, replicates=1000)
    process = library.MeanEProcess(level=RISK)
    right = [process.path(column)[0].max() >= math.log(1 / DELTA) for column in losses.T]
    n = np.arange(1, 201)[:, None]
    log_p = library.binomial_log_p(losses.cumsum(axis=0).astype(int), n, risk=RISK)
    return right, (log_p <= math.log(DELTA)).any(axis=0)


def thinned(rng):
    """Units kept in proportion to their weight are the target's; all units are not."""
    right, wrong = [], []
    for _ in range(1000):
        hard = rng.random(400) < 0.25
        losses = rng.random(400) < np.where(hard, 0.25, 0.05)  # 0.1 here, 0.2 where half are hard
        weights = np.where(hard, 2.0, 2.0 / 3.0)  # the loss there is 0.15
        kept = library.thin_by_weights(weights, max_weight=2.0, rng=rng)
        for found, used in ((right, losses[kept]), (wrong, losses)):
            found.append(library.binomial_log_p(int(used.sum()), used.size, risk=0.15))
    return [np.array(found) <= math.log(DELTA) for found in (right, wrong)]


def cut_from_data(rng):
    """A level from a split of its own; wrongly, the front and the test on the same units."""
    right, wrong = [], []
    for seed in range(150):
        losses = np.insert(bernoulli(rng, 1.02 * RISK, n=200, replicates=12), 0, 0.0, axis=1)
        costs = np.arange(13, 0, -1)
        settings = {"risk": RISK, "delta": DELTA, "loss_type": "binary"}
        split = library.control_risk_split(losses, costs=costs, rng=seed, **settings)
        order = np.argsort(losses[:, 1:].mean(axis=0)) + 1
        same = library.control_risk(losses[:, np.insert(order, 0, 0)], **settings)
        right.append(split.configuration is not None)
        wrong.append(same.index is not None)
    return right, wrong


P_VALUES = {
    "binomial_log_p": falsely_significant(counted(library.binomial_log_p), copies=2),
    "hoeffding_log_p": falsely_significant(counted(library.hoeffding_log_p), copies=6, level=0.5),
    "kl_hoeffding_log_p": falsely_significant(counted(library.kl_hoeffding_log_p), copies=6),
    "bentkus_log_p": falsely_significant(counted(library.bentkus_log_p), copies=6),
    "hoeffding_bentkus_log_p": falsely_significant(
        counted(library.hoeffding_bentkus_log_p), copies=6
    ),
    "beta_mixture_log_p": falsely_significant(counted(library.beta_mixture_log_p), copies=8),
    "maurer_pontil_log_p": falsely_significant(
        lambda x, r: library.maurer_pontil_log_p(x, risk=r), copies=20, level=0.5
    ),
    "wsr_log_p": falsely_significant(
        lambda x, r: library.wsr_log_p(x, risk=r, delta=DELTA), copies=4
    ),
    "star_log_p": falsely_significant(
        lambda x, r: library.star_log_p(x, risk=r, delta=DELTA), copies=4
    ),
    "agrapa_log_p": falsely_significant(
        lambda x, r: library.agrapa_log_p(x, risk=r, delta=DELTA), copies=6
    ),
    "mixture_log_p": falsely_significant(lambda x, r: library.mixture_log_p(x, risk=r), copies=8),
    "LossHistogram": falsely_significant(
        lambda x, r: library.LossHistogram.of(x, bins=20).log_p_values(risk=r), copies=8
    ),
    "normal_log_p": falsely_significant(  # asymptotic: where its limit is near
        lambda x, r: library.normal_log_p(x, risk=r), copies=2, level=0.5
    ),
    "ExactBinomial": falsely_significant(by_test(library.ExactBinomial), copies=2),
    "KLHoeffding": falsely_significant(by_test(library.KLHoeffding), copies=6),
    "Bentkus": falsely_significant(by_test(library.Bentkus), copies=6),
    "HoeffdingBentkus": falsely_significant(by_test(library.HoeffdingBentkus), copies=6),
    "MaurerPontil": falsely_significant(by_test(library.MaurerPontil), copies=20, level=0.5),
    "BetaMixture": falsely_significant(by_test(library.BetaMixture), copies=8),
    "TargetBets": falsely_significant(by_test(library.TargetBets), copies=4),
    "PredictableBets": falsely_significant(by_test(library.PredictableBets), copies=4),
    "GrowthBets": falsely_significant(by_test(library.GrowthBets), copies=6),
    "MixtureBets": falsely_significant(by_test(library.MixtureBets), copies=8),
    "NormalApproximation": falsely_significant(
        by_test(library.NormalApproximation), copies=2, level=0.5
    ),
    "ratio_log_p": ratio,
}
BOUNDS = {
    "binomial_upper_bound": missed(bounded(library.binomial_upper_bound), copies=2),
    "hoeffding_upper_bound": missed(bounded(library.hoeffding_upper_bound), copies=6, level=0.5),
    "kl_hoeffding_upper_bound": missed(bounded(library.kl_hoeffding_upper_bound), copies=6),
    "bentkus_upper_bound": missed(bounded(library.bentkus_upper_bound), copies=6),
    "hoeffding_bentkus_upper_bound": missed(
        bounded(library.hoeffding_bentkus_upper_bound), copies=6
    ),
    "maurer_pontil_upper_bound": missed(
        lambda x: library.maurer_pontil_upper_bound(x, delta=DELTA), copies=20, level=0.5
    ),
    "wsr_upper_bound": missed(lambda x: library.wsr_upper_bound(x, delta=DELTA), copies=4),
    "agrapa_upper_bound": missed(
        lambda x: library.agrapa_upper_bound(x, delta=DELTA), copies=6, replicates=300
    ),
    "star_upper_bound": missed(
        lambda x: library.star_upper_bound(x, delta=DELTA), copies=4, replicates=300
    ),
    "mixture_upper_bound": missed(
        lambda x: library.mixture_upper_bound(x, delta=DELTA), copies=8, replicates=1000
    ),
    "normal_upper_bound": missed(  # asymptotic: where its limit is near
        lambda x: library.normal_upper_bound(x, delta=DELTA), copies=2, level=0.5
    ),
}
EVIDENCE = {
    "constant_bet_log_wealth": e_values(
        lambda x: library.constant_bet_log_wealth(x, bet=0.3, risk=RISK), copies=8
    ),
    "beta_mixture_log_wealth": e_values(
        lambda x: library.beta_mixture_log_wealth(x.sum(axis=0).astype(int), x.shape[0], risk=RISK),
        copies=8,
    ),
    "MeanEProcess": watched,
    "average_e": averaged,
    "multiply_e": multiplied,
    "e_to_log_p": to_p,
    "p_to_log_e": from_p,
    "normal_mixture_boundary": boundary(
        lambda v: library.normal_mixture_boundary(v, delta=DELTA, best_at=50.0)
    ),
    "gamma_exponential_boundary": boundary(
        lambda v: library.gamma_exponential_boundary(v, delta=DELTA, scale=1.0, best_at=50.0)
    ),
}
PROCEDURES = {
    "bonferroni": procedure(lambda p: library.bonferroni(p, delta=DELTA)),
    "holm": procedure(lambda p: library.holm(p, delta=DELTA)),
    "fixed_sequence": procedure(lambda p: library.fixed_sequence(p, delta=DELTA)),
    "graphical": procedure(
        lambda p: library.graphical(p, delta=DELTA, weights=np.full(5, 0.2), transitions=CHAIN)
    ),
    "Bonferroni": walked(library.Bonferroni()),
    "Holm": walked(library.Holm()),
    "FixedSequence": walked(library.FixedSequence((1, 3))),
    "UpperBoundWalk": walked(library.UpperBoundWalk()),
    "Graph": walked(library.Graph.of([0, 0.2, 0.2, 0.2, 0.2, 0.2], np.zeros((6, 6)))),
    "control_risk_split": cut_from_data,
    "thin_by_weights": thinned,
}
TRIALS = P_VALUES | BOUNDS | EVIDENCE | PROCEDURES

_TAIL = "statistical/test_conformal_tail_sequential.py"
_WATCH = "statistical/test_monitoring.py"
_DRIFT = "statistical/test_monitoring_drift.py"
ELSEWHERE = {
    "control_risk": ("statistical/test_calibration_guarantee.py", "wrong_variants_are_caught"),
    "conformal_risk_control": (_TAIL, "conformal_control_keeps_the_expected_loss"),
    "exit_rate_rank": (_TAIL, "exit_rates_hold_with_probability_and_one_rank_more"),
    "exit_rate_threshold": (_TAIL, "exit_rates_hold_in_expectation_and_one_rank_more"),
    "consistency_threshold": (_TAIL, "departures_hold_in_expectation_and_one_rank_less"),
    "certify_halting": (_TAIL, "halting_holds_given_the_stop_and_a_marginal_test"),
    "berk_jones_levels": (_TAIL, "bands_hold_at_all_ranks_and_pointwise_levels_do_not"),
    "dkw_levels": (_TAIL, "bands_hold_at_all_ranks_and_pointwise_levels_do_not"),
    "quantile_rank": (_TAIL, "quantiles_are_covered_and_one_rank_less_does_not"),
    "Quantile": (_TAIL, "quantiles_are_covered_and_one_rank_less_does_not"),
    "ConditionalValueAtRisk": (_TAIL, "tail_means_are_covered_and_the_empirical_one_is_not"),
    "IntervalMean": (_TAIL, "tail_means_are_covered_and_the_empirical_one_is_not"),
    "control_tail": ("statistical/test_procedures_conform.py", "control_keeps_its_promise"),
    "shifted_losses": (_TAIL, "shifted_risk_is_tested_at_its_level_and_ignoring_the_shift"),
    "prediction_powered_losses": (_TAIL, "prediction_power_keeps_the_level_and_trusting"),
    "SPRT": (_TAIL, "sprt_error_rates_hold_and_swapped_boundaries_do_not"),
    "BettingSequence": (_TAIL, "sequences_hold_at_all_times_and_pointwise_limits_do_not"),
    "EmpiricalBernsteinSequence": (_TAIL, "sequences_hold_at_all_times_and_pointwise"),
    "control_sequentially": (_TAIL, "sequential_control_keeps_delta_and_the_failing_column"),
    "truncated_sprt": ("calibration/test_sequential.py", "truncated_error_rates_put_back"),
    "RiskMonitor": (_WATCH, "the_run_length_is_as_promised"),
    "LifetimeRiskMonitor": (_WATCH, "the_lifetime_form_keeps_alpha_and_needs_its_weights"),
    "ExpectedLossCurve": (_WATCH, "the_curve_is_above_the_truth_with_its_confidence"),
    "ScoreAudits": (_WATCH, "audits_by_score_need_their_correction_and_keep_the_promise"),
    "EvidenceAudits": (_WATCH, "audits_by_evidence_keep_the_promise_and_audits_by_loss_do_not"),
    "RecoveryTest": (_WATCH, "a_wrong_resume_has_its_probability"),
    "ScoreDrift": (_DRIFT, "the_slack_covers_the_calibration_and_a_mean_without_slack"),
    "SlowingDown": (_DRIFT, "slowing_down_keeps_its_run_length"),
    "RiskTracker": (_DRIFT, "tracking_keeps_its_average_whatever_comes"),
}
NO_PROMISE = set(
    """
    AbstractAudits AbstractProcedure AbstractRiskMonitor AbstractRiskTest AbstractStream
    AbstractTailRisk AdaptiveError BernoulliStream BetaCalibration BetaMixtureModel BetaStream
    BudgetSpentError BurstyStream Certificate CertificateError CertificateMismatchError ColumnRecord
    ConformalResult DeltaLedger DepartureCurve DetectionPlan DetectorTrial EDetectorState
    EProcessState EarlyWarningSignals HaltTimeResult Histogram InvalidArgumentError
    InvalidTypeError Isotonic LedgerEntry MissingExtraError MovingIndicatorState MovingIndicators
    OnlineMonitor OperatingCharacteristics Platt RampStream ReliabilityCurve RiskControlResult
    RiskCurve SPRTState SequentialResult SlowingDownState SplitControlResult TailResult Temperature
    Trace TrackingState TransformedLosses TruncatedSPRT UniformAudits UnsupportedError Verdict
    Verification audit_coins beta_from_likelihood beta_from_moments brier_score combine_evidence
    conformal_minimum_units corrected_losses corrected_range departure_curve early_warning_signals
    expected_calibration_error fit_beta_calibration fit_beta_mixture fit_histogram fit_isotonic
    fit_labelled_mixture fit_platt fit_temperature load_trace log_betainc marginal_thresholds
    maximise_beta_mixture mean_between minimum_units negative_log_likelihood
    no_crossing_probability pareto_front plan_detection plan_units read_trace_parquet
    reliability_curve risk_curve river_detector save_trace screen_halting simulate_fold simulate_ou
    stop_stages survivor_thresholds trace_from_arrow trace_to_arrow try_detector try_monitor
    tune_power verify_sequential write_trace_parquet
    """.split()
)


def test_every_public_name_is_on_trial_or_promises_nothing():
    parts = [set(TRIALS), set(ELSEWHERE), NO_PROMISE]
    assert set.union(*parts) == set(library.__all__)
    assert sum(map(len, parts)) == len(library.__all__)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_trials_elsewhere_exist(name):
    file, words = ELSEWHERE[name]
    text = (TESTS / file).read_text()
    assert f"def test_{words}" in text
    assert name in text


@pytest.mark.parametrize("name", TRIALS)
def test_the_promise_is_kept_and_its_wrong_twin_is_caught(name):
    right, wrong = (np.asarray(part) for part in TRIALS[name](np.random.default_rng(17)))
    limit = conformance.violation_limit(right.size, DELTA)
    assert np.count_nonzero(right) <= limit
    assert np.count_nonzero(wrong) > conformance.violation_limit(wrong.size, DELTA)
