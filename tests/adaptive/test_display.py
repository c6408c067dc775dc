"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot

from adaptive import Certificate, InvalidArgumentError, control_risk
from adaptive._display_axes import save_figure
from adaptive.displays import RiskPathDisplay


def _certificate(*, holds: bool = True, **changes: Any) -> Certificate:
    columns = [1, 2, 3] if holds else [1]
    evidence: dict[str, Any] = {
        "columns": columns,
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
    assert display == RiskPathDisplay(
        columns=(0, 1, 2, 3),
        risks=(0.0, 0.01, 0.03, 0.2),
        depths=(4.0, 3.5, 2.5, 1.5),
        promise=0.1,
        index=2,
        bound=0.08,
        times=(8.0, 7.0, 6.0, None),
    )


def test_nothing_certified_is_shown_without_a_star(ax: Any) -> None:
    display = RiskPathDisplay.from_certificate(_certificate(holds=False))
    assert display.index is None
    assert display.bound is None
    assert display.columns == (0, 1)
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
    bare = control_risk([[0.0, 0.0]] * 60, risk=0.1).certificate  # no depths: not of `calibrate`
    with pytest.raises(InvalidArgumentError, match="no visited members"):
        RiskPathDisplay.from_certificate(bare)


def test_plot_draws_on_the_axes_given(ax: Any) -> None:
    display = RiskPathDisplay.from_certificate(_certificate())
    drawn = display.plot(ax)
    assert drawn.ax_ is ax
    assert drawn.figure_ is ax.figure
    assert drawn == display
    assert display.ax_ is None  # nothing is kept on the display that was asked
    assert set(drawn.artists_) == {"risk", "promise", "certified", "depth", "time"}
    line, promise = ax.get_lines()[:2]
    assert line.get_ydata().tolist() == [0.0, 0.01, 0.03, 0.2]
    assert set(promise.get_ydata()) == {0.1}
    (other,) = (axes for axes in ax.figure.axes if axes is not ax)
    depth, time = other.get_lines()
    assert depth.get_ydata().tolist() == [1.0, 0.875, 0.625, 0.375]  # of full computation
    assert time.get_xdata().tolist() == [0, 1, 2]  # the last member was not timed
    assert time.get_ydata().tolist() == [1.0, 0.875, 0.75]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["full", "1", "2", "3"]
    (star,) = ax.containers
    (segment,) = star.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.03, 0.08])  # from the mean to its bound
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[1] == "promise 0.1"
    assert "certified, with its upper bound" in texts


def test_plot_makes_axes_of_its_own() -> None:
    found = RiskPathDisplay.from_certificate(_certificate()).plot()
    assert found.ax_.get_ylabel() == "risk"
    pyplot.close(found.figure_)


def test_members_that_were_not_timed_have_no_times() -> None:
    display = RiskPathDisplay.from_certificate(_certificate(holds=False))
    assert display.times == ()
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
