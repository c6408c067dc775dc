"""Where tokens stopped: a histogram of depths, and a text coloured by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from adaptive._display_axes import axes, depth_colours, drawn, ink_on
from adaptive._display_walk import Walk
from adaptive.calibration import Certificate, InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adaptive._output import AdaptiveOutput


@dataclass(frozen=True)
class ExitDepthDisplay:
    """How many tokens, or inputs of a classifier, stopped at which depth.

    Parameters
    ----------
    layers : tuple of int [n_exits + 1]
        Number of layers behind a token at every exit, and at full depth.
    counts : tuple of int [n_exits + 1]
        Tokens that stopped there.
    item, steps : str
        What is counted (token or input), and in what depths are (layers, stages or models).

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; the artist is named bars.

    Examples
    --------
    >>> ExitDepthDisplay((4, 8, 12), (50, 30, 20)).mean_depth
    6.8
    """

    layers: tuple[int, ...]
    counts: tuple[int, ...]
    item: str = "token"
    steps: str = "layers"
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.layers))
        if not self.layers or not rising:
            raise InvalidArgumentError("layers", self.layers, "ascending depths, at least one")
        if len(self.counts) != len(self.layers) or min(self.counts) < 0 or not sum(self.counts):
            raise InvalidArgumentError(
                "counts", self.counts, f"{len(self.layers)} counts, not all zero"
            )

    @property
    def mean_depth(self) -> float:
        """Mean number of layers behind a token."""
        return float(np.average(self.layers, weights=self.counts))

    @classmethod
    def from_output(cls, output: AdaptiveOutput, model: PreTrainedModel) -> Self:
        """Count the tokens of a generation.

        The first token of each text comes from the prompt's own full pass and is not counted.
        """
        return cls.from_stages(_stages(output)[:, 1:], layers=depths_of(model))

    @classmethod
    def from_stages(
        cls, stages: Any, *, layers: Sequence[int], item: str = "token", steps: str = "layers"
    ) -> Self:
        """Count stages, such as the ``exit_stages`` of a prediction.

        Parameters
        ----------
        stages : array_like of int
            Exit of each token, of any shape; ``len(layers) - 1`` is full depth, negative is
            padding.
        layers : sequence of int
            Depth of every exit, and full depth.
        item, steps : str
            As for the class.
        """
        flat = np.asarray(stages, dtype=np.int64).ravel()
        kept = flat[flat >= 0]
        if kept.size and kept.max() >= len(layers):
            raise InvalidArgumentError(
                "stages", f"stage {kept.max()}", f"below {len(layers)}, the number of depths"
            )
        counts = np.bincount(kept, minlength=len(layers))
        return cls(tuple(layers), tuple(int(count) for count in counts), item, steps)

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> Self:
        """Read the depths of the certified member's test run off a calibration's certificate.

        Without a certified member, those of the last member tested.
        """
        evidence = certificate.evidence
        if not evidence.get("exit_counts"):
            raise InvalidArgumentError(
                "certificate",
                "no counts of exits",
                "the certificate of a calibration that tested members",
            )
        walk = Walk.of(certificate)
        last = certificate.index if certificate.holds else walk.columns[-1]
        counts = tuple(int(count) for count in evidence["exit_counts"][str(last)])
        return cls(tuple(evidence["exit_layers"]), counts, walk.item, walk.steps)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the share of tokens at every depth.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).
        """
        ax = axes(ax)
        total = sum(self.counts)
        shares = [count / total for count in self.counts]
        colours = [tuple(c / 255 for c in colour) for colour in depth_colours(len(self.layers))]
        bars = ax.bar(
            range(len(self.layers)), shares, color=colours, edgecolor="0.25", linewidth=0.8
        )
        ax.bar_label(bars, labels=[_percent(share) for share in shares], padding=2)
        names = [str(layers) for layers in self.layers]
        ax.set_xticks(range(len(names)), [*names[:-1], f"{names[-1]}\n(full)"])
        article = "an" if self.item[:1] in "aeiou" else "a"
        ax.set(xlabel=f"{self.steps} behind {article} {self.item}", ylabel=f"share of {self.item}s")
        ax.set_ylim(0, 1.15 * max(shares))
        ax.set_title(
            f"{total:,} {self.item}s, {self.mean_depth:.3g} {self.steps} on average",
            fontsize="medium",
        )
        return drawn(self, ax, {"bars": bars})


@dataclass(frozen=True)
class TokenDepthDisplay:
    """A generated text, each token in the colour of its depth; for notebooks, pages, terminals.

    A notebook shows it as it is; ``rich.print(display)`` shows it in a terminal; `to_html` gives
    it to a page.

    Parameters
    ----------
    prompt : str
    tokens : tuple of str
        Pieces of the generated text.
    stages : tuple of int
        Exit of each piece; ``len(layers) - 1`` is full depth.
    layers : tuple of int [n_exits + 1]
        Depth of every exit, and full depth.
    scores : tuple of float
        Score at the last stage asked, NaN where none was; may be empty.
    """

    prompt: str
    tokens: tuple[str, ...]
    stages: tuple[int, ...]
    layers: tuple[int, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.tokens):
            raise InvalidArgumentError(
                "stages", f"{len(self.stages)} stages", f"one per token, {len(self.tokens)}"
            )
        if self.stages and not 0 <= min(self.stages) <= max(self.stages) < len(self.layers):
            raise InvalidArgumentError("stages", self.stages, f"in 0..{len(self.layers) - 1}")
        if self.scores and len(self.scores) != len(self.tokens):
            raise InvalidArgumentError(
                "scores",
                f"{len(self.scores)} scores",
                f"one per token, {len(self.tokens)}, or none",
            )

    @classmethod
    def from_output(
        cls,
        output: AdaptiveOutput,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        row: int = 0,
    ) -> Self:
        """Show one row of a generation."""
        stages = _stages(output)
        if not -len(stages) <= row < len(stages):
            raise InvalidArgumentError("row", row, f"one of the {len(stages)} rows")
        own = stages[row][stages[row] >= 0]
        ids = output.sequences[row].tolist()
        start = len(ids) - stages.shape[1]
        scores = output.exit_scores
        return cls(
            prompt=tokenizer.decode(ids[:start], skip_special_tokens=True),
            tokens=pieces(tokenizer, ids[:start], ids[start : start + own.size]),
            stages=tuple(int(stage) for stage in own),
            layers=depths_of(model),
            scores=() if scores is None else tuple(scores[row, : own.size].tolist()),
        )

    def to_html(self) -> str:
        """Return a self-contained HTML fragment; text is escaped."""
        colours = depth_colours(len(self.layers))
        marks = []
        for place, (token, stage) in enumerate(zip(self.tokens, self.stages, strict=True)):
            title = f"layer {self.layers[stage]} of {self.layers[-1]}"
            if self.scores and self.scores[place] == self.scores[place]:
                title += f", score {self.scores[place]:.3f}"
            marks.append(_mark(token, colours[stage], title))
        legend = " ".join(
            _mark(f"\u00a0{layers}\u00a0", colour, f"{layers} layers")
            for layers, colour in zip(self.layers, colours, strict=True)
        )
        return (
            '<div class="adaptive-tokens" style="line-height:1.7">'
            f'<div style="margin-bottom:.5em">layers behind a token: {legend}</div>'
            '<div style="white-space:pre-wrap;font-family:monospace;overflow-wrap:anywhere">'
            f'<span style="opacity:.65">{escape(self.prompt)}</span>{"".join(marks)}</div></div>'
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich__(self) -> Text:
        """Text for rich's console, with a legend in front."""
        from rich.text import Text

        styles = [
            f"{ink_on(colour)} on rgb({','.join(map(str, colour))})"
            for colour in depth_colours(len(self.layers))
        ]
        text = Text("layers behind a token: ")
        for layers, style in zip(self.layers, styles, strict=True):
            text.append(f" {layers} ", style=style).append(" ")
        text.append("\n\n").append(self.prompt, style="dim")
        for token, stage in zip(self.tokens, self.stages, strict=True):
            text.append(token, style=styles[stage])
        return text


def depths_of(model: PreTrainedModel) -> tuple[int, ...]:
    """Layers below every exit of a model, and all of them."""
    from adaptive._exits import require_exits
    from adaptive._families import layers_of

    return (*require_exits(model).layers, len(layers_of(model)))


def pieces(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]
) -> tuple[str, ...]:
    """Text that each token adds behind what came before it.

    A character that takes several tokens belongs to the last of them. What came before decides
    about white space in front of the first token.
    """
    context = list(before[-4:])

    def text(count: int) -> str:
        decoded = tokenizer.decode(
            [*context, *tokens[:count]],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(decoded, str)
        return decoded

    done, found = len(text(0)), []
    for count in range(1, len(tokens) + 1):
        now = text(count)
        complete = not now.endswith("\ufffd") or count == len(tokens)
        found.append(now[done:] if complete else "")
        done = max(done, len(now)) if complete else done
    return tuple(found)


def _stages(output: AdaptiveOutput) -> Any:
    if getattr(output, "exit_stages", None) is None:
        raise InvalidArgumentError(
            "output",
            f"a {type(output).__name__} without exits",
            "what `generate(..., return_dict_in_generate=True)` returns under a policy",
        )
    assert output.exit_stages is not None
    return output.exit_stages.cpu().numpy()


def _mark(text: str, colour: Sequence[int], title: str) -> str:
    red, green, blue = colour
    return (
        f'<span style="background:rgb({red},{green},{blue});color:{ink_on(colour)};'
        f'padding:.1em 0 .25em" '
        f'title="{escape(title)}">{escape(text)}</span>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else "<1%"
