"""Depths of tokens as a histogram, in HTML and in a terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive import InvalidArgumentError, generate
from adaptive._display_axes import depth_colours, ink_on
from adaptive._display_depth import pieces
from adaptive.displays import ExitDepthDisplay, TokenDepthDisplay


def test_counts_leave_out_padding() -> None:
    display = ExitDepthDisplay.from_stages([[0, 2, -1], [2, 1, 2]], layers=(2, 4, 6))
    assert display == ExitDepthDisplay((2, 4, 6), (1, 1, 3))
    assert display.mean_depth == pytest.approx((2 + 4 + 18) / 5)


def test_a_generation_is_counted_without_its_first_tokens(helpers: Any) -> None:
    model = helpers.shared("llama")
    ids, mask = helpers.prompts()
    output = generate(
        model,
        ids,
        attention_mask=mask,
        policy=helpers.mixed(model, "propagate"),
        max_new_tokens=9,
        return_dict_in_generate=True,
    )
    display = ExitDepthDisplay.from_output(output, model)
    assert display.layers == (1, 2, 4, 6)
    assert sum(display.counts) == 3 * 8
    assert display.mean_depth == pytest.approx(output.mean_depth)
    assert len({i for i, count in enumerate(display.counts) if count}) > 1


@pytest.mark.parametrize(
    ("layers", "counts", "message"),
    [
        ((), (), "`layers` must be ascending"),
        ((4, 2), (1, 1), "`layers` must be ascending"),
        ((2, 4), (1,), "`counts` must be 2 counts"),
        ((2, 4), (0, 0), "not all zero"),
        ((2, 4), (-1, 2), "`counts` must be"),
    ],
)
def test_impossible_counts_are_refused(layers: Any, counts: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ExitDepthDisplay(layers, counts)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`stages` must be below 2"):
        ExitDepthDisplay.from_stages([2], layers=(1, 2))
    with pytest.raises(InvalidArgumentError, match="not all zero"):
        ExitDepthDisplay.from_stages([], layers=(1, 2))
    with pytest.raises(InvalidArgumentError, match="return_dict_in_generate=True"):
        ExitDepthDisplay.from_output(SimpleNamespace(), None)  # type: ignore[arg-type]


def test_the_histogram_is_of_shares() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    drawn = ExitDepthDisplay((2, 4, 6), (1, 995, 4)).plot()
    assert [bar.get_height() for bar in drawn.artists_["bars"]] == [0.001, 0.995, 0.004]
    labels = [text.get_text() for text in drawn.ax_.texts]
    assert labels == ["<1%", "100%", "<1%"]
    assert [tick.get_text() for tick in drawn.ax_.get_xticklabels()] == ["2", "4", "6\n(full)"]
    pyplot.close(drawn.figure_)


HOSTILE = '<script>alert("x")</script>&amp;'


class _Text(HTMLParser):
    """The text of a page as a browser shows it, and every tag on it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.titles = "", set(), []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]


def test_html_shows_hostile_text_as_text() -> None:
    display = TokenDepthDisplay(HOSTILE, (HOSTILE, "\n ok"), (0, 1), (2, 4), (0.5, float("nan")))
    page = _Text(display.to_html())
    assert page.tags == {"div", "span"}
    assert page.text.endswith(HOSTILE + HOSTILE + "\n ok")
    assert page.titles[-2:] == ["layer 2 of 4, score 0.500", "layer 4 of 4"]
    assert display._repr_html_() == display.to_html()


def test_the_terminal_shows_the_text_and_its_colours() -> None:
    display = TokenDepthDisplay("[bold]a", (" b", " [c]"), (0, 2), (2, 4, 6))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(display)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).endswith("[bold]a b [c]\n")
    for stage in (0, 2):
        red, green, blue = depth_colours(3)[stage]
        assert f"48;2;{red};{green};{blue}m" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (0,)}, "`stages` must be one per token, 2"),
        ({"stages": (0, 2)}, "`stages` must be in 0..1"),
        ({"stages": (-1, 0)}, "`stages` must be in 0..1"),
        ({"scores": (0.1,)}, "`scores` must be one per token, 2, or none"),
    ],
)
def test_tokens_without_their_depth_are_refused(changes: Any, message: str) -> None:
    fields: dict[str, Any] = {"prompt": "", "tokens": ("a", "b"), "stages": (0, 1)}
    with pytest.raises(InvalidArgumentError, match=message):
        TokenDepthDisplay(**fields | {"layers": (2, 4)} | changes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_characters_of_several_tokens_are_shown_whole() -> None:
    tokenizer = byte_tokenizer()
    before, text = "x = ", "naïve → 😀!"
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, tokenizer(before)["input_ids"], ids)
    assert len(found) == len(ids) == len(text.encode())
    assert "".join(found) == text
    assert found[2:4] == ("", "ï")


def test_a_text_that_ends_inside_a_character_says_so() -> None:
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, [], tokenizer("a😀")["input_ids"][:-1]) == ("a", "", "", "\ufffd")
    assert pieces(tokenizer, [], []) == ()


def test_a_row_of_a_batch_is_shown(helpers: Any, tokenizer: Any) -> None:
    model = helpers.tiny("llama", eos_token_id=5)
    ids, mask = helpers.prompts()
    output = generate(
        model,
        ids,
        attention_mask=mask,
        policy=helpers.mixed(model, "exact"),
        max_new_tokens=6,
        return_dict_in_generate=True,
    )
    display = TokenDepthDisplay.from_output(output, model, tokenizer=tokenizer, row=1)
    words = [f"w{token}" for token in ids[1, mask[1].bool()].tolist()]
    assert display.prompt.split() == words  # padding is not shown
    own = output.exit_stages[1] >= 0
    assert display.stages == tuple(output.exit_stages[1][own].tolist())
    generated = output.sequences[1, ids.shape[1] :][own].tolist()
    assert "".join(display.tokens).split() == [f"w{token}" for token in generated]
    with pytest.raises(InvalidArgumentError, match="`row` must be one of the 3 rows"):
        TokenDepthDisplay.from_output(output, model, tokenizer=tokenizer, row=3)


def test_colours_darken_with_depth_and_stay_readable() -> None:
    def light(colour: Any) -> float:
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3295 for c in colour]
        return float(torch.tensor(linear) @ torch.tensor([0.2126, 0.7152, 0.0722]))

    for count in (1, 2, 4, 9):
        lights = [light(colour) for colour in depth_colours(count)]
        assert lights == sorted(lights, reverse=True)
        assert len(set(lights)) == count
        for colour in depth_colours(count):
            ink = 0.0 if ink_on(colour) == "#000000" else 1.0
            bright, dark = max(ink, light(colour)), min(ink, light(colour))
            assert (bright + 0.05) / (dark + 0.05) > 4.5  # WCAG 2.2, level AA
