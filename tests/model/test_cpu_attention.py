"""The kernel's calls put together are the attention that a mask describes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpoctl.model import cpu_attention
from dpoctl.model.attention import Segments, shared_prefix_attention

HEADS, WIDTH = 4, 16
SHAPES = ((13, (5, 7, 3)), (0, (4, 6)), (40, (1, 1)), (9, (20,)), (70, (80, 33)))


def layout() -> Segments:
    records, first = [], 0
    for shared, suffixes in SHAPES:
        records.append((first, shared, suffixes))
        first += shared + sum(suffixes)
    return Segments(tuple(records))


def draw(heads: int, dtype: torch.dtype) -> Tensor:
    rows = sum(shared + sum(suffixes) for shared, suffixes in SHAPES)
    return torch.randn(1, rows, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()


def attend(tensors: list[Tensor], upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The output, and the gradients of queries, keys and values."""
    out, _ = shared_prefix_attention(torch.nn.Module(), *tensors, layout=layout(), **options)
    return out.detach(), *torch.autograd.grad(out, tensors, upstream)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_outputs_and_gradients_are_those_of_a_call_for_each_answer(
    dtype: torch.dtype, tolerance: float, key_heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors = [draw(heads, dtype) for heads in (HEADS, key_heads, key_heads)]
    upstream = draw(HEADS, dtype).detach().transpose(1, 2)
    ours = attend(tensors, upstream, scaling=scaling)
    monkeypatch.setattr(cpu_attention, "takes", lambda *_: False)
    for mine, plain in zip(ours, attend(tensors, upstream, scaling=scaling), strict=True):
        torch.testing.assert_close(mine, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("options", "joined"), [
    ({}, True),
    ({"sliding_window": 150}, True),
    ({"sliding_window": 149}, False),
    ({"softcap": 20.0}, False),
    ({"s_aux": torch.zeros(HEADS)}, False),
    ({"dropout": 0.5}, False),
])  # fmt: skip
def test_what_the_kernel_does_not_know_goes_another_way(
    options: dict[str, Any], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(cpu_attention, "attend", lambda query, *_: calls.append(1) or query.transpose(1, 2))
    shared_prefix_attention(
        torch.nn.Module(), *(draw(HEADS, torch.float32) for _ in range(3)), layout=layout(), **options
    )
    assert bool(calls) is joined


def test_a_torch_without_the_kernel_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [draw(HEADS, torch.float32) for _ in range(3)]
    upstream = draw(HEADS, torch.float32).detach().transpose(1, 2)
    expected = attend(tensors, upstream)
    monkeypatch.setattr(cpu_attention, "_forward", None)
    for mine, own in zip(attend(tensors, upstream), expected, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_values_narrower_than_keys_and_a_precision_that_autocast_would_change_are_left_to_torch() -> None:
    query, key = draw(HEADS, torch.float32), draw(HEADS, torch.float32)
    assert cpu_attention.takes(query, key, key)
    assert not cpu_attention.takes(query, key, key[..., :8])
    assert not cpu_attention.takes(query, key.double(), key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_attention.takes(query, key, key)
        assert cpu_attention.takes(*(tensor.bfloat16() for tensor in (query, key, key)))
