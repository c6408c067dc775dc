"""The main job on the shipped model, in small."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from adaptive import InvalidArgumentError, _demo
from adaptive._demo import run_demo
from adaptive._display_axes import save_figure
from adaptive.examples import SHIPPED
from adaptive.policies import Policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHIPPED / "exits.safetensors").is_file(), reason="installed without the shipped model"
    ),
]


def test_more_prompts_than_there_are_is_said_of_the_option() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`units` must be at most .*, got 1000012"):
        run_demo(
            risk=0.2,
            delta=0.2,
            units=1_000_000,
            fresh=12,
            new_tokens=8,
            out=Path("never"),
            rng=0,
            progress=False,
            console=Console(file=StringIO()),
        )


def _no_title_lies_on_its_legend(ax: Axes) -> None:
    legend, title = ax.get_legend(), ax.title
    if legend is not None and title.get_text():
        assert not legend.get_window_extent().overlaps(title.get_window_extent())


def test_the_demo_keeps_its_promise_and_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[Axes] = []

    def noted(ax: Axes, path: Path) -> None:
        pictures.extend(ax.get_figure().axes)
        save_figure(ax, path)
        for own in pictures:
            _no_title_lies_on_its_legend(own)

    monkeypatch.setattr(_demo, "save_figure", noted)
    console = Console(width=160, record=True, file=StringIO())
    run_demo(
        risk=0.2,
        delta=0.2,
        units=60,
        fresh=12,
        new_tokens=8,
        out=tmp_path / "out",
        rng=0,
        progress=False,
        console=console,
    )
    text = console.export_text()
    for word in ("exact", "propagate", "promised risk", "tokens/s", "mean depth", "One completion"):
        assert word in text
    assert (tmp_path / "out" / "risk_path.png").stat().st_size > 10_000
    legends = [ax.get_legend() for ax in pictures if ax.get_legend() is not None]
    titles = [legend.get_title().get_text() for legend in legends]
    assert titles == ["exact mode", "propagate mode"]
    for mode in ("exact", "propagate"):
        policy = Policy.from_pretrained(tmp_path / "out" / mode)
        assert policy.mode == mode
        assert policy.certificate is not None
        assert policy.certificate.risk == 0.2
        assert "pool" in " ".join(policy.certificate.assumptions)
