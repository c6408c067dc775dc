"""What the displays share: axes, colours, whole files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adaptive.calibration._extras import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Display = TypeVar("Display")
#: Okabe and Ito's colours, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
MARKERS = ("o", "s", "^", "D", "v", "P")


def axes(ax: Axes | None, *, width: float = 6.4, height: float = 4.0) -> Axes:
    """Return the axes given, or new ones on a figure of their own.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    made: Axes = optional("matplotlib.pyplot").subplots(
        figsize=(width, height), layout="constrained"
    )[1]
    return made


def drawn(display: Display, ax: Axes, artists: dict[str, Any]) -> Display:
    """Return a display that keeps its axes, figure and artists."""
    return replace(display, ax_=ax, figure_=ax.figure, artists_=artists)  # type: ignore[type-var]


def depth_colours(count: int) -> list[tuple[int, int, int]]:
    """Red, green and blue of every stage: light for early, dark for full depth.

    Evenly spaced between five anchors of a scale whose lightness falls all the way, so that the
    order survives any colour vision and a black-and-white print.
    """
    anchors = [(255, 237, 160), (178, 213, 140), (86, 180, 180), (47, 110, 170), (40, 40, 100)]
    found = []
    for stage in range(count):
        place = (len(anchors) - 1) * (stage / (count - 1) if count > 1 else 1.0)
        low = min(int(place), len(anchors) - 2)
        part = place - low
        mixed = [
            round(a + part * (b - a)) for a, b in zip(anchors[low], anchors[low + 1], strict=True)
        ]
        found.append((mixed[0], mixed[1], mixed[2]))
    return found


def ink_on(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on a colour (sRGB weights of ITU-R BT.709)."""
    red, green, blue = colour
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 120 else "#ffffff"


def save_figure(ax: Axes, path: Path) -> None:
    """Write a figure whole or not at all."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure = ax.get_figure()
    assert figure is not None
    figure.savefig(partial, dpi=150)  # type: ignore[union-attr]
    partial.replace(path)
