"""The CPU implementation agrees with the loop over responses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpoctl.model import attention_cpu
from dpoctl.model.attention import Segments, shared_prefix_attention

HEADS, WIDTH = 4, 16
SHAPES = ((13, (5, 7, 3)), (0, (4, 6)), (40, (1, 1)), (9, (20,)), (70, (80, 33)))


def layout() -> Segments:
    records, first = [], 0
    for shared, suffixes in SHAPES:
        records.append((first, shared, suffixes))
        first += shared + sum(suffixes)
    return Segments(tuple(records))


def random_heads(heads: int, dtype: torch.dtype) -> Tensor:
    rows = sum(shared + sum(suffixes) for shared, suffixes in SHAPES)
    return torch.randn(1, rows, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()


def attend(tensors: list[Tensor], upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Return the output and the gradients of queries, keys and values."""
    out, _ = shared_prefix_attention(torch.nn.Module(), *tensors, layout=layout(), **options)
    return out.detach(), *torch.autograd.grad(out, tensors, upstream)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_output_and_gradients_are_those_of_the_loop(
    dtype: torch.dtype, tolerance: float, key_heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors = [random_heads(heads, dtype) for heads in (HEADS, key_heads, key_heads)]
    upstream = random_heads(HEADS, dtype).detach().transpose(1, 2)
    ours = attend(tensors, upstream, scaling=scaling)
    monkeypatch.setattr(attention_cpu, "supports", lambda *_: False)
    for mine, plain in zip(ours, attend(tensors, upstream, scaling=scaling), strict=True):
        torch.testing.assert_close(mine, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("options", "used"), [
    ({}, True),
    ({"sliding_window": 150}, True),
    ({"sliding_window": 149}, False),
    ({"softcap": 20.0}, False),
    ({"s_aux": torch.zeros(HEADS)}, False),
    ({"dropout": 0.5}, False),
])  # fmt: skip
def test_options_that_the_kernel_lacks_use_the_loop(
    options: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention_cpu, "attend", lambda query, *_: calls.append(1) or query.transpose(1, 2))
    shared_prefix_attention(
        torch.nn.Module(), *(random_heads(HEADS, torch.float32) for _ in range(3)), layout=layout(), **options
    )
    assert bool(calls) is used


def test_a_torch_without_the_kernel_uses_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random_heads(HEADS, torch.float32) for _ in range(3)]
    upstream = random_heads(HEADS, torch.float32).detach().transpose(1, 2)
    expected = attend(tensors, upstream)
    monkeypatch.setattr(attention_cpu, "_forward", None)
    for mine, own in zip(attend(tensors, upstream), expected, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_unequal_head_sizes_and_tensors_that_autocast_would_cast_are_not_supported() -> None:
    query, key = random_heads(HEADS, torch.float32), random_heads(HEADS, torch.float32)
    assert attention_cpu.supports(query, key, key)
    assert not attention_cpu.supports(query, key, key[..., :8])
    assert not attention_cpu.supports(query, key.double(), key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not attention_cpu.supports(query, key, key)
        assert attention_cpu.supports(*(tensor.bfloat16() for tensor in (query, key, key)))
