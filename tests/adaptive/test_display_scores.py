"""Reliability per exit, and the scores of agreeing and disagreeing tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptive import InvalidArgumentError, Trace
from adaptive.calibration import fit_beta_mixture
from adaptive.displays import ReliabilityDisplay, ScoreMixtureDisplay


def trace_of(*, units: int = 40, length: int = 25, seed: int = 0, **changes: Any) -> Trace:
    """Exit 0 is as good as its scores say, exit 1 is always right at scores of a half."""
    rng = np.random.default_rng(seed)
    n = units * length
    scores = rng.beta(2.0, 1.0, size=(n, 2))
    wrong = rng.random((n, 2)) > scores
    scores[:, 1], wrong[:, 1] = 0.5, False
    fields: dict[str, Any] = {
        "scores": scores,
        "losses": {"disagreement": wrong},
        "costs": [1.0, 2.0, 3.0],
        "cost_quantity": "layers",
        "lengths": [length] * units,
    }
    return Trace(**fields | changes)


def test_curves_are_the_shares_that_agree() -> None:
    trace = trace_of()
    display = ReliabilityDisplay.from_trace(trace)
    assert display.curves[0].error < 0.05
    assert display.curves[0].counts.tolist() == [100] * 10
    constant = display.curves[1]  # ties: one bin
    assert (constant.predicted.tolist(), constant.observed.tolist()) == ([0.5], [1.0])
    again = ReliabilityDisplay.from_trace(trace)
    assert np.array_equal(again.limits[0], display.limits[0])  # the seed decides


def test_limits_follow_units_not_tokens() -> None:
    """Tokens of a unit that are all alike carry one unit's worth of evidence."""
    scores = np.tile(np.array([[0.5]]), (1000, 1))
    alike = np.repeat(np.random.default_rng(1).random(40) < 0.5, 25)[:, None]
    mixed = np.tile([[True], [False]], (500, 1))

    def width(wrong: Any) -> float:
        trace = trace_of(scores=scores, losses={"disagreement": wrong}, costs=[1.0, 2.0])
        lower, upper = ReliabilityDisplay.from_trace(trace).limits[0]
        return float(upper[0] - lower[0])

    assert width(alike) > 5 * width(mixed)
    assert width(alike) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.25)


def test_exits_that_were_not_asked_have_no_curve() -> None:
    trace = trace_of()
    scores = trace.scores.copy()
    scores[:, 0] = -np.inf
    display = ReliabilityDisplay.from_trace(trace_of(scores=scores))
    assert list(display.curves) == [1]
    with pytest.raises(InvalidArgumentError, match="this one has none"):
        ScoreMixtureDisplay.from_trace(trace_of(scores=scores), exit=0)
    scores[:] = -np.inf
    with pytest.raises(InvalidArgumentError, match="a trace with scores"):
        ReliabilityDisplay.from_trace(trace_of(scores=scores))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"loss": "wrong"}, "`loss` must be one of disagreement, got 'wrong'"),
        ({"losses": {"disagreement": np.full((1000, 2), 0.5)}}, {}, "a loss of 0 and 1"),
        ({"scores": np.full((1000, 2), 1.5)}, {}, "scores in \\[0, 1\\], such as the probe's"),
        ({"scores": np.full((1000, 2), -0.5)}, {}, "scores in \\[-0.5, -0.5\\] at exit 0"),
    ],
)
def test_what_is_no_probability_of_agreement_is_refused(
    changes: Any, arguments: Any, message: str
) -> None:
    for make in (ReliabilityDisplay.from_trace, ScoreMixtureDisplay.from_trace):
        exit = {"exit": 0} if make == ScoreMixtureDisplay.from_trace else {}
        with pytest.raises(InvalidArgumentError, match=message):
            make(trace_of(**changes), **exit, **arguments)


def test_scores_are_parted_by_agreement() -> None:
    trace = trace_of()
    display = ScoreMixtureDisplay.from_trace(trace, exit=0)
    wrong = trace.losses["disagreement"][:, 0]
    assert np.array_equal(np.sort(display.agreeing), np.sort(trace.scores[~wrong, 0]))
    assert np.array_equal(np.sort(display.disagreeing), np.sort(trace.scores[wrong, 0]))
    assert display.mixture.weights == pytest.approx((wrong.mean(), 1 - wrong.mean()))
    with pytest.raises(InvalidArgumentError, match=r"`exit` must be in 0\.\.1, got 2"):
        ScoreMixtureDisplay.from_trace(trace, exit=2)


def test_an_exit_that_never_disagrees_is_shown() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    drawn = ScoreMixtureDisplay.from_trace(trace_of(), exit=1).plot()
    assert drawn.disagreeing.size == 0
    assert np.isfinite(drawn.ax_.get_ylim()).all()
    pyplot.close(drawn.figure_)


def test_plots_draw_what_the_displays_hold() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    trace = trace_of()
    reliability = ReliabilityDisplay.from_trace(trace).plot()
    for exit, curve in reliability.curves.items():
        line = reliability.artists_[exit]
        assert np.array_equal(line.get_xydata().T, [curve.predicted, curve.observed])
    pyplot.close(reliability.figure_)

    mixture = fit_beta_mixture(trace.scores[:, 0].astype(float))
    _, ax = pyplot.subplots()
    drawn = ScoreMixtureDisplay.from_trace(trace, exit=0, mixture=mixture).plot(ax)
    assert drawn.ax_ is ax
    assert drawn.mixture is mixture
    assert set(drawn.artists_) == {"disagree", "agree", "mixture_0", "mixture_1"}
    total = 0.0
    for name in ("disagree", "agree"):
        values, edges, _ = drawn.artists_[name].get_data()
        total += float(values @ np.diff(edges))
    assert total == pytest.approx(1.0)  # both histograms together are one density
    x, y = drawn.artists_["mixture_1"].get_data()
    expected = mixture.weights[1] * np.exp(mixture.log_densities(x)[1])
    assert np.allclose(y, expected)
    pyplot.close(ax.figure)
