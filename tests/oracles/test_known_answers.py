"""p-values and bounds against numbers computed elsewhere (50-digit arithmetic, other programs)."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive.calibration import (
    bentkus_log_p,
    beta_mixture_log_wealth,
    binomial_log_p,
    binomial_upper_bound,
    constant_bet_log_wealth,
    hoeffding_bentkus_log_p,
    hoeffding_bentkus_upper_bound,
    hoeffding_upper_bound,
    kl_hoeffding_log_p,
    maurer_pontil_upper_bound,
    star_log_p,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._betting import _wsr_bets
from adaptive.calibration._running import plain

INDEX = np.arange(1, 10_001)
A = 0.2 * ((37 * INDEX) % 101) / 101
B = ((29 * INDEX) % 97 < 5).astype(float)


@pytest.mark.parametrize(
    ("k", "n", "risk", "kl", "bentkus", "exact", "hb"),
    [
        (0, 100, 0.05, 0.00592052922033403, 0.0160936669944948, 0.00592052922033403, None),
        (1, 100, 0.05, 0.0842796382380957, 0.100797177491836, 0.0370812093273552, None),
        (0, 59, 0.05, 0.0484945252494232, 0.131821787, 0.0484945252494232, None),
        (0, 58, 0.05, 0.0510468686836034, 0.138759776, 0.0510468686836034, None),
        (30, 1000, 0.05, 0.007564450414883, 0.00347143051379348, 0.00127706791747984, None),
        (40, 1000, 0.05, 0.324099140747037, 0.21919293179287, 0.0806365732566912, None),
        (50, 1000, 0.05, 1.0, 1.46115542387954, 0.537529040801428, None),
        (80, 1000, 0.1, 0.0935639540348466, 0.0478732234118747, 0.0176115746758361, None),
        (150, 1000, 0.2, 2.29727283563962e-4, 7.18805645261915e-5, 2.64433819089831e-5, None),
        (400, 10_000, 0.05, 1.27872982958439e-5, 3.2812234902793e-6, 1.20709466396256e-6, None),
        (9500, 10**6, 0.01, 2.65266783666095e-6, 5.67543041488713e-7, 2.08787416943609e-7, None),
        (9000, 10**6, 0.01, 2.01217760074967e-23, 2.2698783847049e-24, 8.35041591692376e-25, None),
    ],
)
def test_p_values_from_counts(k, n, risk, kl, bentkus, exact, hb):
    hb = min(kl, bentkus, 1.0) if hb is None else hb
    rtol = 5e-9  # some reference values are printed with nine digits
    assert np.exp(kl_hoeffding_log_p(k, n, risk=risk)) == pytest.approx(kl, rel=rtol)
    assert np.exp(bentkus_log_p(k, n, risk=risk)) == pytest.approx(bentkus, rel=rtol)
    assert np.exp(binomial_log_p(k, n, risk=risk)) == pytest.approx(exact, rel=rtol)
    assert np.exp(hoeffding_bentkus_log_p(k, n, risk=risk)) == pytest.approx(hb, rel=rtol)


def test_a_total_that_is_no_integer():
    kl, bentkus = 0.0406415570605501, 0.0644534051372194
    assert np.exp(kl_hoeffding_log_p(3.37, 100, risk=0.1)) == pytest.approx(kl, rel=1e-12)
    assert np.exp(bentkus_log_p(3.37, 100, risk=0.1)) == pytest.approx(bentkus, rel=1e-12)
    assert np.exp(hoeffding_bentkus_log_p(3.37, 100, risk=0.1)) == pytest.approx(kl, rel=1e-12)


def test_a_count_is_a_count_and_not_a_rounded_up_mean():
    assert np.exp(binomial_log_p(7, 100, risk=0.1)) == pytest.approx(0.206050861804011, rel=1e-12)
    assert np.ceil(100 * 0.07) == 8  # what a count rebuilt from a mean would be
    assert np.exp(binomial_log_p(8, 100, risk=0.1)) == pytest.approx(0.320873888, rel=1e-8)


@pytest.mark.parametrize(
    ("k", "risk", "exact", "kl"),
    [
        (20_000, 0.05, -12148.330674, -12142.960691),
        (0, 0.05, -51293.294388, -51293.294388),
        (1000, 0.01, -6742.468643, -6738.200591),
    ],
)
def test_far_tails_keep_their_order(k, risk, exact, kl):
    assert binomial_log_p(k, 10**6, risk=risk) == pytest.approx(exact, abs=1e-6)
    assert kl_hoeffding_log_p(k, 10**6, risk=risk) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "n", "delta", "upper"),
    [
        (0, 100, 0.05, 0.029513049607039925),
        (1, 100, 0.05, 0.046559811453538935),
        (5, 100, 0.1, 0.09077146961407018),
        (40, 1000, 0.1, 0.04915681267762499),
        (40, 1000, 0.05, 0.051753401352160444),
        (20, 1000, 0.01, 0.03288615444920424),
        (0, 1, 0.1, 0.9),
        (7, 7, 0.1, 1.0),
    ],
)
def test_clopper_pearson(k, n, delta, upper):
    assert binomial_upper_bound(k, n, delta=delta) == pytest.approx(upper, rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "n", "delta", "upper"),
    [
        (0.04, 1000, 0.1, 0.0528083801),
        (0.04, 1000, 0.05, 0.0550337718),
        (0.0, 100, 0.05, 0.0295130496),
        (0.02, 10_000, 0.1, 0.0226778346),
        (0.1, 200, 0.1, 0.1457268713),
    ],
)
def test_hoeffding_bentkus_bound(mean, n, delta, upper):
    assert hoeffding_bentkus_upper_bound(round(mean * n), n, delta=delta) == pytest.approx(
        upper, abs=1e-10
    )


def test_simple_hoeffding_bound():
    assert hoeffding_upper_bound(40, 1000, delta=0.1) == pytest.approx(0.0739307021, abs=1e-10)


@pytest.mark.parametrize(
    ("losses", "n", "upper_10", "upper_05"),
    [
        (A, 100, 0.12548657280, 0.13252412371),
        (A, 1000, 0.10302250224, 0.10371930148),
        (A, 10_000, 0.10024748969, 0.10042282985),
        (B, 100, 0.04363178363, 0.05643351006),
        (B, 1000, 0.06764644815, 0.07132121289),
        (B, 10_000, 0.05626682027, 0.05698569478),
    ],
)
def test_wsr_bound(losses, n, upper_10, upper_05):
    assert wsr_upper_bound(losses[:n], delta=0.1)[0] == pytest.approx(upper_10, abs=1e-10)
    assert wsr_upper_bound(losses[:n], delta=0.05)[0] == pytest.approx(upper_05, abs=1e-10)


@pytest.mark.parametrize(
    ("losses", "risk", "log_wealth"),
    [
        (A[:100], 0.15, 4.6273488356),
        (A[:1000], 0.15, 45.9560951961),
        (B[:100], 0.1, 5.1419710121),
        (B[:1000], 0.1, 12.6950537776),
        ((A - B)[:200], 0.15, 13.4307577),
        ((A - B)[:200], 0.1, 5.7835910628),
    ],
)
def test_wsr_wealth(losses, risk, log_wealth):
    assert -wsr_log_p(losses, risk=risk, delta=0.1)[0] == pytest.approx(log_wealth, abs=3e-7)


@pytest.mark.parametrize(
    ("losses", "risk", "final", "peak_at"),
    [
        (A[:100], 0.15, 4.6273488356, 100),
        (A[:1000], 0.15, 45.9560951961, 1000),
        (B[:100], 0.1, -2.6684958422, 56),
        (B[:1000], 0.1, 12.6950537776, 1000),
        ((A - B)[:200], 0.1, 5.7549384078, None),
    ],
)
def test_wsr_wealth_at_the_end(losses, risk, final, peak_at):
    (_, bets), *_ = _wsr_bets([plain(losses[:, None])], 0.1)
    path = np.log(1.0 - bets[:, 0] * (losses - risk)).cumsum()
    assert path[-1] == pytest.approx(final, abs=1e-9)
    assert path.max() == pytest.approx(-wsr_log_p(losses, risk=risk, delta=0.1)[0], abs=1e-9)
    assert peak_at in (None, path.argmax() + 1)


def test_wsr_bounds_may_lie_below_the_mean():
    assert wsr_upper_bound(B[:100], delta=0.1)[0] < B[:100].mean()


def test_wsr_wealth_of_another_program():
    # confseq's negative capital process with the same bets
    assert np.exp(wsr_log_p(A[:1000], risk=0.15, delta=0.1))[0] == pytest.approx(
        1.10033e-20, rel=1e-5
    )


@pytest.mark.parametrize(
    ("losses", "upper"),
    [
        (np.zeros(10), 0.2589254118),
        (np.zeros(100), 0.0237975915),
        (np.ones(100), 1.0),
        (np.zeros(1), 1.0),
        (np.full(100, 0.5), 0.5236258166),
    ],
)
def test_wsr_bound_at_the_edges(losses, upper):
    assert wsr_upper_bound(losses, delta=0.1)[0] == pytest.approx(upper, abs=1e-10)


@pytest.mark.parametrize(
    ("losses", "risk", "log_wealth"),
    [
        (A[:100], 0.15, 2.3054484349),
        (A[:100], 0.11, 0.9449988289),
        (A[:1000], 0.11, 2.3034817554),
        (B[:100], 0.11, 2.3077671610),
        (B[:1000], 0.15, 2.3027868256),
    ],
)
def test_star_wealth_with_the_published_prior(losses, risk, log_wealth):
    found = -star_log_p(losses, risk=risk, delta=0.1, prior_units=1.0)[0]
    assert found == pytest.approx(log_wealth, abs=1e-10)


def test_star_wealth_at_the_end():
    """By the definition, unit by unit; its peak is the library's."""
    wealth, peak, spread = 0.0, 0.0, 0.11 * 0.89
    for t, loss in enumerate(A[:100], start=1):
        need = max(np.log(10.0) - wealth, 0.0)
        bet = min(np.sqrt(2.0 * t * need / ((100 - t + 1) * spread)), 1.0 / 0.89)
        wealth += np.log(1.0 - bet * (loss - 0.11))
        peak = max(peak, wealth)
        spread += (loss - 0.11) ** 2
    assert wealth == pytest.approx(0.9054465716, abs=1e-9)
    library = -star_log_p(A[:100], risk=0.11, delta=0.1, prior_units=1.0)[0]
    assert library == pytest.approx(peak, abs=1e-12)


@pytest.mark.parametrize(
    ("losses", "upper"),
    [
        (A[:100], 0.18466842269),
        (A[:1000], 0.11056293524),
        (B[:100], 0.17422264431),
        (B[:1000], 0.07387541113),
    ],
)
def test_maurer_pontil_bound(losses, upper):
    assert maurer_pontil_upper_bound(losses, delta=0.1)[0] == pytest.approx(upper, abs=1e-10)


@pytest.mark.parametrize(("bet", "log_e"), [(0.5, 2.430360423826), (1.0, 4.730441483847)])
def test_constant_bet(bet, log_e):
    found = constant_bet_log_wealth(A[:100], bet=bet, risk=0.15)[0]
    assert found == pytest.approx(log_e, abs=1e-11)


@pytest.mark.parametrize(
    ("k", "n", "risk", "log_e"),
    [
        (0, 100, 0.05, 3.504300815631),
        (1, 100, 0.05, 1.813040513393),
        (20, 1000, 0.05, 10.640808780092),
        (30, 1000, 0.05, 3.577110994305),
        (0, 45, 0.05, 1.376056192206),
    ],
)
def test_truncated_beta_mixture(k, n, risk, log_e):
    assert beta_mixture_log_wealth(k, n, risk=risk) == pytest.approx(log_e, abs=1e-10)


@pytest.mark.parametrize(
    ("points", "certified", "first_failing"),
    [(11, 0.014, 0.102), (21, 0.041, 0.105), (101, 0.053, 0.065)],
)
def test_violations_of_the_last_passing_and_of_the_first_failing_threshold(
    points, certified, first_failing
):
    """Risk 0.3 (1 - threshold) falls to the promise inside the grid; n = 100, both levels 0.1."""
    replicates = 20_000
    rng = np.random.default_rng(1)
    risks = 0.3 * np.linspace(0.0, 1.0, points)  # from the safest threshold on
    errors = np.zeros((replicates, points), dtype=int)
    for _ in range(100):  # one threshold for each unit, at which its loss begins
        errors += rng.random((replicates, 1)) < risks
    passed = np.cumprod(binomial_log_p(errors, 100, risk=0.1) <= np.log(0.1), axis=1)
    failing = passed.sum(axis=1)
    ours = risks[np.maximum(failing - 1, 0)] > 0.1 + 1e-12
    theirs = risks[np.minimum(failing, points - 1)] > 0.1 + 1e-12
    assert ours.mean() == pytest.approx(certified, abs=0.012)
    assert theirs.mean() == pytest.approx(first_failing, abs=0.012)
