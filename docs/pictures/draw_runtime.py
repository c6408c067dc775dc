"""Draw the pictures of docs/runtime.md: python docs/pictures/draw_runtime.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

SEGMENTS = 3
#: Segments that each step of the example needs; step 0 is the prompt's, at full depth.
WANTED = (3, 1, 1, 2, 1, 1, 3, 1, 2, 1, 1)
#: Step of `verify` whose draft the full model would not have chosen.
WRONG = 4
AT_ONCE, LATER, PROJECTED, WAITING, TAKEN_BACK = "#2f6f9f", "#8fc1e3", "#f2c14e", "white", "#d1495b"
LABELS = {
    AT_ONCE: "computed in this step",
    LATER: "computed later, with other steps in one pass",
    PROJECTED: "keys and values projected from the exit's state",
    WAITING: "waiting in the inbox",
    TAKEN_BACK: "taken back",
}


@dataclass
class Picture:
    """Colour of each cell (step, segment), and the passes: (segment, first step, last step)."""

    cells: dict[tuple[int, int], str] = field(default_factory=dict)
    passes: list[tuple[int, int, int]] = field(default_factory=list)


def run(wanted: tuple[int, ...], owed: str) -> Picture:
    """Follow the scheduler: a segment that is needed first takes everything in its inbox."""
    picture = Picture()
    filled = [0] * SEGMENTS
    for step, depth in enumerate(wanted):
        for segment in range(depth):
            first = filled[segment]
            for other in range(first, step):
                picture.cells[other, segment] = owed
            picture.cells[step, segment] = AT_ONCE
            if first < step and owed == LATER:
                picture.passes.append((segment, first, step))
            filled[segment] = step + 1
    for segment in range(SEGMENTS):
        for step in range(filled[segment], len(wanted)):
            picture.cells[step, segment] = WAITING
    return picture


def verified(wanted: tuple[int, ...]) -> tuple[Picture, int]:
    """Settle at the last step of full depth, and take back the steps that read the wrong draft."""
    settled = max(step for step, depth in enumerate(wanted) if depth == SEGMENTS)
    picture = run(wanted[: settled + 1], LATER)
    for step in range(WRONG + 1, settled + 1):
        for segment in range(SEGMENTS):
            if (step, segment) in picture.cells:
                picture.cells[step, segment] = TAKEN_BACK
    return picture, settled


def draw(ax: Axes, picture: Picture, title: str, *, steps: int) -> None:
    """One panel: steps from left to right, segments from the bottom up."""
    for (step, segment), colour in picture.cells.items():
        ax.add_patch(
            Rectangle(
                (step + 0.06, segment + 0.06),
                0.88,
                0.88,
                facecolor=colour,
                edgecolor="#9aa5ab" if colour == WAITING else colour,
                linestyle=":" if colour == WAITING else "-",
            )
        )
    for segment, first, last in picture.passes:
        ax.plot([first + 0.2, last + 0.8], [segment + 0.5] * 2, color="#17364d", linewidth=1.6)
        ax.plot(last + 0.8, segment + 0.5, ">", color="#17364d", markersize=4)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlim(0, steps)
    ax.set_ylim(0, SEGMENTS)
    ax.set_yticks([0.5, 1.5, 2.5], ["layers 1-4", "layers 5-8", "layers 9-12"], fontsize=8)
    ax.set_xticks([t + 0.5 for t in range(steps)], [str(t) for t in range(steps)], fontsize=8)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def main() -> None:
    """Three modes on one text."""
    pyplot.rcParams |= {"svg.hashsalt": "adaptive", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(3, 1, figsize=(7.6, 6.6), layout="constrained")
    steps = len(WANTED)
    draw(axes[0], run(WANTED, LATER), "exact", steps=steps)
    draw(axes[1], run(WANTED, PROJECTED), "propagate", steps=steps)
    picture, settled = verified(WANTED)
    draw(axes[2], picture, "verify: drafts are checked when step 6 needs full depth", steps=steps)
    assert settled == 6
    axes[2].annotate(
        "at step 4 the full model\nchooses another token: that\none is kept, and the steps that\n"
        "read the draft are done again",
        xy=(7.0, 1.6),
        xytext=(7.4, 1.5),
        fontsize=8,
        va="center",
    )
    axes[2].set_xlabel("decoding step", fontsize=9)
    handles = [
        Patch(facecolor=colour, edgecolor="#9aa5ab", label=text) for colour, text in LABELS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(Path(__file__).with_name("modes.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
