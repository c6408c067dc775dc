"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot

from adaptive import Certificate, InvalidArgumentError, control_risk
from adaptive._display_axes import save_figure
from adaptive.displays import ExitDepthDisplay, RiskPathDisplay, Walk


def _certificate(*, holds: bool = True, **changes: Any) -> Certificate:
    columns = [1, 2, 3] if holds else [1]
    evidence: dict[str, Any] = {
        "columns": columns,
        "certified": [1, 2] if holds else [],
        "log_p_values": [-9.0, -5.0, -0.1] if holds else [-0.1],
        "levels": [0.1] * len(columns),
        "means": {"wrong": [0.01, 0.03, 0.2] if holds else [0.3]},
        "mean_depth": {"0": 4.0, "1": 3.5, "2": 2.5, "3": 1.5},
        "upper_bound": {"wrong": 0.08} if holds else None,
        "milliseconds_per_token": {"0": 8.0, "1": 7.0, "2": 6.0} if holds else {},
    }
    fields: dict[str, Any] = {
        "holds": holds,
        "risk": 0.1,
        "delta": 0.1,
        "loss": "wrong",
        "unit": "prompt",
        "method": "star",
        "procedure": "fixed-sequence",
        "n": 80,
        "index": 2 if holds else None,
        "evidence": evidence,
        "bound": 1.0,
        "assumptions": (),
        "split": {},
    }
    return Certificate(**(fields | changes))


@pytest.fixture
def ax() -> Any:
    figure, found = pyplot.subplots()
    yield found
    pyplot.close(figure)


def test_a_display_reads_the_certificate() -> None:
    display = RiskPathDisplay.from_certificate(_certificate())
    walk = Walk(
        columns=(0, 1, 2, 3),
        means=(0.0, 0.01, 0.03, 0.2),
        certified=(True, True, True, False),
        depths=(4.0, 3.5, 2.5, 1.5),
        times=(8.0, 7.0, 6.0, None),
        item="token",
        steps="layers",
    )
    assert display == RiskPathDisplay(walk, loss="wrong", promise=0.1, index=2, bound=0.08)


def classified(**changes: Any) -> Certificate:
    """What `calibrate` writes for a cascade whose own error was tested, as member 1."""
    evidence = {
        "columns": [1, 2],
        "certified": [1, 2],
        "log_p_values": [-9.0, -5.0],
        "levels": [0.1, 0.1],
        "means": {"error": [0.04, 0.05]},
        "mean_depth": {"1": 2.0, "2": 1.25},
        "upper_bound": {"error": 0.08},
        "milliseconds_per_input": {"1": 3.0, "2": 6.0},
        "exit_layers": [1, 2],
        "exit_counts": {"1": [0, 80], "2": [60, 20]},
        "steps": "models",
        "full_computation_tested": True,
    }
    fields = {"loss": "error", "unit": "input", "evidence": evidence, "index": 2}
    return _certificate(**(fields | changes))


def test_a_classifier_is_shown_in_its_own_words(ax: Any) -> None:
    drawn = RiskPathDisplay.from_certificate(classified()).plot(ax)
    assert drawn.walk.columns == (1, 2)  # full computation was tested itself
    assert drawn.walk.means == (0.04, 0.05)
    assert ax.get_ylabel() == "risk: mean error"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["full", "2"]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"models per input", "time per input"} < set(texts)
    assert "failed" not in drawn.artists_
    costs = drawn.artists_["time"].axes
    assert costs.get_ylim()[1] > 2.0  # a member that is slower than full computation is in view


def test_the_depths_of_a_classifier_are_in_its_own_words(ax: Any) -> None:
    drawn = ExitDepthDisplay.from_certificate(classified()).plot(ax)
    assert (drawn.layers, drawn.counts) == ((1, 2), (60, 20))
    assert ax.get_xlabel() == "models behind an input"
    assert ax.get_title() == "80 inputs, 1.25 models on average"


def test_gains_are_in_view(ax: Any) -> None:
    evidence = _certificate().evidence | {"means": {"wrong": [-0.04, 0.03, 0.2]}}
    RiskPathDisplay.from_certificate(_certificate(evidence=evidence)).plot(ax)
    assert ax.get_ylim()[0] < -0.04


def test_arrays_have_risks_and_no_costs(ax: Any) -> None:
    """`control_risk` knows no depths; members beyond the first failure were not visited."""
    losses = [[0.0, 0.0, 0.0]] * 50 + [[0.0, 0.0, 1.0]] * 10
    result = control_risk(losses, risk=0.1, loss_type="binary")
    drawn = RiskPathDisplay.from_certificate(result.certificate).plot(ax)
    assert drawn.walk.certified == (True, True, False)
    assert drawn.artists_["failed"].get_xdata() == [2]
    assert ax.figure.axes == [ax]


def test_nothing_certified_is_shown_without_a_star(ax: Any) -> None:
    display = RiskPathDisplay.from_certificate(_certificate(holds=False))
    assert display.index is None
    assert display.bound is None
    assert display.walk.columns == (0, 1)
    display.plot(ax)
    assert not ax.containers


def test_certified_but_not_used_is_shown_without_a_star() -> None:
    """Members were certified, none was faster: the certificate does not hold, bounds stay."""
    held = _certificate()
    display = RiskPathDisplay.from_certificate(_certificate(index=None, evidence=held.evidence))
    assert display.index is None
    with_bound = _certificate(holds=False, evidence=held.evidence)
    assert RiskPathDisplay.from_certificate(with_bound).bound is None


def test_a_certificate_without_visits_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`certificate` must be the certificate of a"):
        RiskPathDisplay.from_certificate(_certificate(evidence={}))
    several = {"a": 0.1, "b": 0.1}
    with pytest.raises(InvalidArgumentError, match="several risks"):
        RiskPathDisplay.from_certificate(_certificate(risk=several))


def test_plot_draws_on_the_axes_given(ax: Any) -> None:
    display = RiskPathDisplay.from_certificate(_certificate())
    drawn = display.plot(ax)
    assert drawn.ax_ is ax
    assert drawn.figure_ is ax.figure
    assert drawn == display
    assert display.ax_ is None  # nothing is kept on the display that was asked
    assert set(drawn.artists_) == {"risk", "failed", "promise", "certified", "depth", "time"}
    line, failed, promise = ax.get_lines()[:3]
    assert failed.get_xdata() == [3]
    assert line.get_ydata().tolist() == [0.0, 0.01, 0.03, 0.2]
    assert set(promise.get_ydata()) == {0.1}
    (other,) = (axes for axes in ax.figure.axes if axes is not ax)
    assert ax.get_zorder() > other.get_zorder()  # nothing lies over the star
    depth, time = other.get_lines()
    assert depth.get_ydata().tolist() == [1.0, 0.875, 0.625, 0.375]  # of full computation
    assert time.get_xdata().tolist() == [0, 1, 2]  # the last member was not timed
    assert time.get_ydata().tolist() == [1.0, 0.875, 0.75]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["full", "1", "2", "3"]
    (star,) = ax.containers
    (segment,) = star.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.03, 0.08])  # from the mean to its bound
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[2] == "promise 0.1"
    assert "in use, with its upper bound" in texts


def test_plot_makes_axes_of_its_own() -> None:
    found = RiskPathDisplay.from_certificate(_certificate()).plot()
    assert found.ax_.get_ylabel() == "risk: mean wrong"
    pyplot.close(found.figure_)


def test_members_that_were_not_timed_have_no_times() -> None:
    display = RiskPathDisplay.from_certificate(_certificate(holds=False))
    assert display.walk.times == ()
    drawn = display.plot()
    assert "time" not in drawn.artists_
    pyplot.close(drawn.figure_)


def test_figures_are_written_whole_or_not_at_all(
    ax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plot.png"
    save_figure(ax, target)
    before = target.read_bytes()
    assert before.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]

    def fail(path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(ax.figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(ax, target)
    assert target.read_bytes() == before
