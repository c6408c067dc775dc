r"""After 1e8 updates nothing has underflowed, overflowed, become NaN or been forgotten.

Three parts. Many streams are run for real. Then the clock of a state is set to 1e8 units, and what
it does there is compared with logarithms, which cannot underflow: for factors L and weights v,

.. math:: \log M_t = \log L_t + \log(e^{\log M_{t-1}} + v_t).

Last, for streams whose losses repeat, the statistic after any number of units is known in closed
form; the state after 1e8 of them is put in, and the next update must leave it where it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive.calibration import (
    LifetimeRiskMonitor,
    MovingIndicators,
    RecoveryTest,
    RiskMonitor,
    ScoreDrift,
    SlowingDown,
)

AGE = 10**8
MONITORS = [RiskMonitor(0.05), LifetimeRiskMonitor(0.05), LifetimeRiskMonitor(0.1, alpha=1e-6)]
ids = ["run length", "lifetime", "lifetime, alpha 1e-6"]


def sound(state):
    """Whether all statistics are finite and, once begun, far above what underflows."""
    statistics = state.statistics[state.units > 0]
    return bool(np.isfinite(statistics).all() and (statistics >= 1e-30).all())


def in_logarithms(monitor, losses, *, units, log_statistics):
    """Log statistics after some losses, from some age on; nothing leaves the logarithms."""
    cap = 0.9 / (monitor.bound - monitor.lower)
    factors = np.log1p(np.minimum(monitor.bet_sizes, cap) * (losses[:, None] - monitor.bound))
    for age, row in enumerate(factors, start=units + 1):
        weight = 0.0 if isinstance(monitor, RiskMonitor) else -np.log(age) - np.log(age + 1.0)
        log_statistics = row + np.logaddexp(log_statistics, weight)
    return log_statistics


@pytest.mark.slow
@pytest.mark.parametrize("monitor", MONITORS[:2], ids=ids[:2])
def test_ten_thousand_streams_of_ten_thousand_losses(monitor):
    """1e8 updates: 0/1 at the bound, never a loss, always a loss, and the quietest but one."""
    rng = np.random.default_rng(1)
    state = monitor.init(10_000)
    for unit in range(10_000):
        losses = (rng.random(10_000) < monitor.bound).astype(float)
        losses[:10], losses[10:20], losses[20:30] = 0.0, 1.0, float(unit % 1000 == 0)
        state = monitor.update(state, losses)
        if unit % 100 == 99:
            assert sound(state)
    assert int(state.units.sum()) == AGE
    assert monitor.alarm(state)[10:20].all()
    assert not monitor.alarm(state)[:10].any()


@pytest.mark.slow
@pytest.mark.parametrize("monitor", MONITORS[:2], ids=ids[:2])
def test_one_long_stream_beside_logarithms(monitor):
    rng = np.random.default_rng(2)
    losses = (rng.random(50_000) < 0.8 * monitor.bound).astype(float)
    state = monitor.init()
    for loss in losses:
        state = monitor.update(state, [loss])
    start = np.full(monitor.bet_sizes.size, -np.inf)
    expected = in_logarithms(monitor, losses, units=0, log_statistics=start)
    np.testing.assert_allclose(np.log(state.statistics[0]), expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("monitor", MONITORS, ids=ids)
def test_a_state_of_a_hundred_million_units_beside_logarithms(monitor):
    """As old as that, quiet or in trouble, it moves as its logarithms do, and still alarms."""
    rng = np.random.default_rng(3)
    state = monitor.init()
    for loss in np.zeros(300):
        state = monitor.update(state, [loss])
    state = replace(state, units=state.units + AGE, labelled=state.labelled + AGE)
    began = np.log(state.statistics[0])
    losses = (rng.random(2000) < 0.5 * monitor.bound).astype(float)
    for loss in losses:
        state = monitor.update(state, [loss])
    expected = in_logarithms(monitor, losses, units=AGE + 300, log_statistics=began)
    np.testing.assert_allclose(np.log(state.statistics[0]), expected, rtol=0.0, atol=1e-9)
    assert sound(state)
    assert not monitor.alarm(state)[0]
    trouble = (rng.random(2000) < 6.0 * monitor.bound).astype(float)
    for loss in trouble:
        state = monitor.update(state, [loss])
    assert monitor.alarm(state)[0]


def test_a_hundred_million_units_without_a_loss_in_closed_form():
    r"""With one factor L below 1, :math:`M_n = L^n M_0 + L (1 - L^n) / (1 - L)`: a fixed point."""
    monitor = RiskMonitor(0.05)
    factors = 1.0 - monitor.bet_sizes * monitor.bound
    short = monitor.init()
    for _ in range(3000):
        short = monitor.update(short, [0.0])
    np.testing.assert_allclose(
        short.statistics[0], factors * (1.0 - factors**3000) / (1.0 - factors), rtol=1e-12
    )
    long = factors * (1.0 - factors**AGE) / (1.0 - factors)
    assert (long >= factors.min()).all()
    assert (factors**AGE == 0.0).all(), "what a product that never restarts is left with"
    state = replace(monitor.init(), statistics=long[None], units=np.array([AGE]))
    after = monitor.update(state, [0.0])
    np.testing.assert_allclose(after.statistics[0], long, rtol=1e-12)


@pytest.mark.parametrize(
    "detector",
    [
        RecoveryTest(0.05),
        ScoreDrift((0.0, 1.0), (0.5, 0.4, 0.3, 0.6, 0.6), 0.05),
        SlowingDown(2.0, 0.1),
    ],
    ids=lambda detector: type(detector).__name__,
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_other_detectors_stay_finite_at_any_age(detector, value):
    """The same value for ever, whichever way it pushes, and counters that have run far."""
    scores = isinstance(detector, ScoreDrift)
    put = detector.features([value * 2.0 - 0.5]) if scores else [value]
    state = detector.init()
    for age in (0, AGE, 2**53):
        if age:
            state = replace(state, units=np.full(1, age))
        for _ in range(3000):
            state = detector.update(state, put)
        assert np.isfinite(state.statistics).all()
        assert (state.statistics >= 0.0).all()
        assert np.isfinite(detector.evidence(state)).all()


def test_moving_indicators_forget_and_stay_finite():
    indicators = MovingIndicators(0.02)
    state = indicators.init()
    for value in (0.0, 1e3, -1e3, 0.0):
        for _ in range(3000):
            state = indicators.update(state, [value])
        assert np.isfinite(state.variance).all()
        assert np.isfinite(indicators.autocorrelation(state)).all()
