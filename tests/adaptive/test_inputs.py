"""Datasets in every form users have them; what is wrong is named with its position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import adaptive._inputs as inputs
from adaptive import InvalidArgumentError
from adaptive._fingerprint import tokens_hash
from adaptive._inputs import Units, batches, read_units, texts_batch, tokenizer_of
from adaptive.calibration import InvalidTypeError

TEXTS = ["w2 w3 w4", "w5", "w6 w7"]
TOKENS = ((2, 3, 4), (5,), (6, 7))


@pytest.fixture(scope="module")
def model(helpers: Any) -> Any:
    return helpers.tiny("llama", exits=False)


@pytest.fixture
def read(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    def reader(dataset: Any, **settings: Any) -> Units:
        return read_units(dataset, **({"model": model, "tokenizer": tokenizer} | settings))

    return reader


def _turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 3, 4], [0, 0, 5], [6, 7, 0]])  # the mask counts, wherever it pads
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 1, 0]])
    return {"input_ids": ids, "attention_mask": mask}


# -- forms ----------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "strings": lambda: TEXTS,
    "tuple of strings": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "token ids": lambda: [list(tokens) for tokens in TOKENS],
    "tensors": lambda: [torch.tensor(tokens) for tokens in TOKENS],
    "arrays": lambda: [np.array(tokens) for tokens in TOKENS],
    "dicts with prompt": lambda: [{"prompt": text, "text": "w9"} for text in TEXTS],
    "dicts with text": lambda: [{"text": text} for text in TEXTS],
    "dicts with token ids": lambda: [{"input_ids": list(tokens)} for tokens in TOKENS],
    "one batch": lambda: [_padded()],
    "arrays of a batch": lambda: [{k: v.numpy() for k, v in _padded().items()}],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_give_the_same_units(read: Any, name: str) -> None:
    units = read(FORMS[name]())
    assert units.prompts == TOKENS
    assert units.ids == tuple(tokens_hash(tokens) for tokens in TOKENS)
    assert units.references == (None,) * 3
    assert units.groups is None
    assert len(units) == 3


@pytest.mark.parametrize("key", [None, "messages", "prompt"])
def test_chats_go_through_the_template(read: Any, key: str | None) -> None:
    chat = [*_turns("w2 w3"), {"role": "assistant", "content": "w4"}, *_turns("w7")]
    units = read([chat if key is None else {key: chat}])
    assert units.prompts == ((5, 2, 3, 6, 4, 5, 7, 6),)


def test_a_hugging_face_dataset(read: Any) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"question": TEXTS, "source": ["a", "b", "a"]})
    units = read(dataset, column="question", groups="source")
    assert units.prompts == TOKENS
    assert units.groups.tolist() == ["a", "b", "a"]
    assert read(dataset["question"]).prompts == TOKENS
    tensors = datasets.Dataset.from_dict({"input_ids": [list(t) for t in TOKENS]})
    assert read(tensors.with_format("torch")).prompts == TOKENS


def test_a_data_loader(read: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    def collate(texts: list[str]) -> Any:
        return tokenizer(texts, return_tensors="pt", padding=True)

    assert read(DataLoader(TEXTS, batch_size=2, collate_fn=collate)).prompts == TOKENS  # type: ignore[arg-type]


def test_bare_batches_have_no_padding(read: Any) -> None:
    assert read([torch.tensor([[2, 3], [4, 5]]), np.array([[6, 0]])]).prompts == (
        (2, 3),
        (4, 5),
        (6, 0),
    )


def test_continuations_are_references(read: Any) -> None:
    units = read(
        [
            {"prompt": "w2", "continuation": "w3 w4"},
            {"prompt": "w5"},
            {"prompt": "w6", "continuation": [7, 8]},
            {"prompt": "w7", "continuation": torch.tensor([9])},
        ]
    )
    assert units.references == ((3, 4), None, (7, 8), (9,))


# -- clusters -------------------------------------------------------------------------------------


def test_groups_by_key_and_by_array(read: Any) -> None:
    items = [{"text": text, "doc": doc} for text, doc in zip(TEXTS, "xyx", strict=True)]
    assert read(items, groups="doc").groups.tolist() == ["x", "y", "x"]
    assert read(TEXTS, groups=[1, 1, 2]).groups.tolist() == [1, 1, 2]
    assert read(TEXTS, groups=np.array([3, 4, 4])).groups.tolist() == [3, 4, 4]


def test_groups_of_a_batch_are_one_per_row(read: Any) -> None:
    units = read([_padded() | {"doc": torch.tensor([4, 4, 9])}], groups="doc")
    assert units.groups.tolist() == [4, 4, 9]
    units = read([_padded() | {"doc": ["a", "b", "b"]}], groups="doc")
    assert units.groups.tolist() == ["a", "b", "b"]


def test_groups_of_a_batch_of_the_wrong_length(read: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`groups` must be one per row of item 0"):
        read([_padded() | {"doc": ["a", "b"]}], groups="doc")


def test_groups_of_another_length(read: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`groups` must be one per prompt, 3, got 2"):
        read(TEXTS, groups=[1, 2])


def test_groups_that_are_not_there(read: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`groups` must be a key of every item; item 1"):
        read([{"text": "w2", "doc": 1}, {"text": "w3"}], groups="doc")
    with pytest.raises(InvalidArgumentError, match="`groups` must be a key of every item; item 0"):
        read(TEXTS, groups="doc")


# -- repetitions and selection --------------------------------------------------------------------


def test_repetitions_are_found_across_forms(read: Any) -> None:
    units = read(["w2 w3", [4], [2, 3], "w4 "], groups=[0, 1, 2, 3])
    assert units.ids[0] == units.ids[2]
    distinct = units.distinct()
    assert distinct.prompts == ((2, 3), (4,))
    assert distinct.groups is not None
    assert distinct.groups.tolist() == [0, 1]


def test_selection_keeps_everything_together(read: Any) -> None:
    units = read([{"text": t, "continuation": t} for t in TEXTS], groups=[7, 8, 9]).select([2, 0])
    assert units.prompts == (TOKENS[2], TOKENS[0]) == units.references
    assert units.groups.tolist() == [9, 7]


# -- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a single text": ("w2 w3", InvalidTypeError, "not a single item"),
    "a single dict": ({"text": "w2"}, InvalidTypeError, "not a single item"),
    "bytes": (b"w2", InvalidTypeError, "not a single item"),
    "None": (None, InvalidTypeError, "`dataset` must be an iterable of prompts"),
    "a number": (3, InvalidTypeError, "`dataset` must be an iterable of prompts"),
    "nothing": ([], InvalidArgumentError, "at least one prompt"),
    "NaN": (["w2", float("nan")], InvalidTypeError, "item 1 is of type float"),
    "None inside": (["w2", "w3", None], InvalidTypeError, "item 2 is of type NoneType"),
    "floats": ([[2, 3], [1.5]], InvalidTypeError, "item 1 is of type list"),
    "float tensor": ([torch.tensor([0.5])], InvalidTypeError, "item 0"),
    "float batch": ([torch.tensor([[0.5]])], InvalidTypeError, "item 0"),
    "strings of a batch": ([["w2", "w3"]], InvalidTypeError, "item 0 is of type list"),
    "empty text": (["w2", ""], InvalidArgumentError, "an empty prompt at position 1"),
    "empty ids": ([[2], [], [3]], InvalidArgumentError, "an empty prompt at position 1"),
    "empty row": (
        [{"input_ids": torch.tensor([[2], [3]]), "attention_mask": torch.tensor([[1], [0]])}],
        InvalidArgumentError,
        "an empty prompt at position 0",
    ),
    "unknown keys": ([{"a": "w2"}], InvalidArgumentError, r"item 0 with keys \['a'\]"),
    "token too large": ([[2], [97]], InvalidArgumentError, "token 97 at position 1"),
    "negative token": ([[-1]], InvalidArgumentError, "token -1 at position 0"),
    "NaN continuation": (
        [{"text": "w2"}, {"text": "w2", "continuation": float("nan")}],
        InvalidTypeError,
        "item 1",
    ),
    "continuation of words": (
        [{"text": "w2", "continuation": ["w2"]}],
        InvalidTypeError,
        "item 0",
    ),
    "mask of another shape": (
        [{"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.tensor([[1]])}],
        InvalidArgumentError,
        "`attention_mask`|attention_mask",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named(read: Any, name: str) -> None:
    dataset, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        read(dataset)


def test_a_missing_column_is_named(read: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="one of the keys question"):
        read([{"text": "w2"}], column="question")


def test_text_without_a_tokenizer(model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="pass tokenizer="):
        read_units(TEXTS, model=model)
    assert len(read_units([[2, 3]], model=model)) == 1  # tokens need none


def test_a_tokenizer_beside_the_model_is_found(
    helpers: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = helpers.tiny("llama", exits=False)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    assert tokenizer_of(model)("w2 w3")["input_ids"] == [2, 3]
    assert read_units(TEXTS, model=model).prompts == TOKENS


def test_chats_without_a_template(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InvalidArgumentError, match=r"`tokenizer` must be .*chat template"):
        read_units([_turns("w2")], model=model, tokenizer=bare)


# -- batches --------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_left_and_complete(read: Any) -> None:
    prompts = [[2] * n for n in (5, 1, 3, 2, 4)]
    units = read(prompts)
    seen: dict[int, list[int]] = {}
    for index, ids, mask in batches(units, size=2, pad=9, device=torch.device("cpu")):
        assert ids.shape == mask.shape
        assert len(index) <= 2
        assert (ids[mask == 0] == 9).all()
        assert bool((mask[:, -1] == 1).all())
        for row, i in enumerate(index):
            seen[int(i)] = ids[row][mask[row].bool()].tolist()
    assert [seen[i] for i in range(5)] == prompts


def test_texts_align_where_the_prompt_ends() -> None:
    pairs = [((2, 3), (4, 5, 6)), ((7,), (8, 9))]
    ids, mask = texts_batch(pairs, torch.device("cpu"))
    assert ids.tolist() == [[2, 3, 4, 5], [0, 7, 8, 0]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_prompt_keys_are_documented() -> None:
    assert inputs._PROMPT_KEYS == ("prompt", "text", "messages", "input_ids")
    for key in inputs._PROMPT_KEYS:
        assert key in str(read_units.__doc__)
