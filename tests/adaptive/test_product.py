"""Products of few states: the values of ``F.linear``, whatever form they are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from adaptive._families import Readout
from adaptive._product import filled_up, product


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [False, True])
def test_every_number_of_rows(threads: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, added = torch.randn(48, 24), torch.randn(48) if bias else None
    for count in (*range(40), 63, 64, 127, 128, 129, 300):
        states = torch.randn(count, 24)
        found = product(states, weight, added)
        assert found.is_contiguous()
        torch.testing.assert_close(found, F.linear(states, weight, added))


def test_any_shape_and_stride(threads: int) -> None:
    weight = torch.randn(16, 8)
    for states in (
        torch.randn(8),
        torch.randn(3, 8),
        torch.randn(2, 5, 8),
        torch.randn(2, 3, 2, 8),
        torch.randn(8, 7).T,
        torch.randn(6, 4, 16)[:, ::2, ::2],
    ):
        found = product(states, weight, None)
        assert found.shape == (*states.shape[:-1], 16)
        assert found.is_contiguous()
        torch.testing.assert_close(found, F.linear(states, weight))


def test_rows_are_filled_up_to_tiles(threads: int) -> None:
    weight = torch.empty(1, 1)
    filled = {count: filled_up(count, weight) for count in range(300)}
    assert [filled[count] for count in (0, 1, 2, 3, 4, 5, 6, 7, 8)] == [0, 0, 4, 4, 4, 5, 6, 8, 8]
    many = [filled[count] for count in (9, 13, 16, 20, 64, 65)]
    assert many == ([0] * 6 if threads == 1 else [16, 16, 16, 24, 64, 0])
    assert all(rows == 0 or count <= rows < count + 8 for count, rows in filled.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 8).to(dtype)
    assert filled_up(4, weight) == 0
    states = torch.randn(4, 8).to(dtype)
    assert torch.equal(product(states, weight, None), F.linear(states, weight))


def test_a_compiled_product_asks_for_nothing(threads: int) -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(48, 24), torch.randn(13, 24)
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(states, weight, None), F.linear(states, weight))


def test_a_head_that_does_more_is_called(tools: SimpleNamespace) -> None:
    """A hook on the head, a forward of its own, or another class: what they do is done."""
    model: Any = tools.model()
    hidden = torch.randn(4, model.config.hidden_size)
    plain = Readout(model)(hidden)
    torch.testing.assert_close(plain, model.lm_head(model.model.norm(hidden)))
    handle = model.lm_head.register_forward_hook(lambda *_: _[-1] + 1)
    torch.testing.assert_close(Readout(model)(hidden), plain + 1)
    handle.remove()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * forward(states)
    torch.testing.assert_close(Readout(model)(hidden), 2 * plain)
    del model.lm_head.forward

    class Shifted(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) + 3

    shifted = Shifted(model.config.hidden_size, model.config.vocab_size, bias=False)
    shifted.weight = model.lm_head.weight
    model.set_output_embeddings(shifted)
    torch.testing.assert_close(Readout(model)(hidden), plain + 3)
