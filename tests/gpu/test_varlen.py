"""The attention kernel for uneven lengths gives what a loop over answers gives, forward and backward."""

from typing import Any

import pytest
import torch
from gpu_stage import Stage
from torch import Tensor, nn

from dpoctl.model import attention as attention_module
from dpoctl.model.attention import Segments, shared_prefix_attention

pytestmark = pytest.mark.gpu

# Prompts with one answer, two, three and four; one answer without a prompt; lengths around the kernels' tiles.
RECORDS = ((0, 130, (64, 65)), (259, 1, (6,)), (266, 65, (1, 127, 3)), (462, 0, (40,)), (502, 17, (5, 31, 2, 9)))
ROWS = 566
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = [torch.bfloat16, torch.float16]


def attend(
    stage: Stage, dtype: torch.dtype, heads: int, kv_heads: int, width: int, *, fast: bool, **options: Any
) -> tuple[list[Tensor], list[bool]]:
    """Output and gradients, and for each call whether a kernel took it."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, count, ROWS, width, generator=generator).to(stage.device, dtype)
        for count in (heads, kv_heads, kv_heads)
    ]
    upstream = torch.randn(1, ROWS, heads, width, generator=generator).to(stage.device, dtype)
    tensors = [(t if fast else t.float()).requires_grad_() for t in tensors]
    taken: list[bool] = []
    find = attention_module.find_kernel

    def watched(*arguments: Any) -> Any:
        found = find(*arguments)
        taken.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "find_kernel", watched)
        out, _ = shared_prefix_attention(nn.Identity(), *tensors, layout=Segments(RECORDS).to(stage.device), **options)
    (out * upstream.to(out.dtype)).sum().backward()
    return [out.detach(), *(t.grad for t in tensors if t.grad is not None)], taken


def assert_equal_to_the_loop(
    stage: Stage, dtype: torch.dtype, heads: int, kv_heads: int, width: int, *, kernel: bool = True, **options: Any
) -> None:
    fast, taken = attend(stage, dtype, heads, kv_heads, width, fast=True, **options)
    slow, looped = attend(stage, dtype, heads, kv_heads, width, fast=False, **options)
    assert looped == [False], "float32 must go through the loop"
    assert taken == [kernel and not stage.rehearsal]
    assert len(fast) == len(slow) == 4
    for ours, true in zip(fast, slow, strict=True):
        error = float((ours.float() - true).norm() / true.norm())
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("window", [None, 33], ids=["full", "window"])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_head_sizes(stage: Stage, width: int, window: int | None, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(stage, dtype, 4, 2, width, sliding_window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (32, 8)])
def test_grouped_heads(stage: Stage, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(stage, dtype, heads, kv_heads, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_a_scale_of_its_own(stage: Stage, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(stage, dtype, 4, 2, 64, scaling=0.05)


@pytest.mark.parametrize("width", [20, 60])
def test_head_sizes_that_kernels_refuse_go_through_the_loop(stage: Stage, width: int) -> None:
    assert_equal_to_the_loop(stage, torch.bfloat16, 4, 2, width, kernel=False)


def test_a_head_of_eighty(stage: Stage) -> None:
    assert_equal_to_the_loop(stage, torch.bfloat16, 4, 4, 80)


def test_soft_caps_and_sinks_go_through_the_loop(stage: Stage) -> None:
    assert_equal_to_the_loop(stage, torch.bfloat16, 4, 2, 64, kernel=False, softcap=30.0)
    sinks = torch.zeros(4, device=stage.device)
    assert_equal_to_the_loop(stage, torch.bfloat16, 4, 2, 64, kernel=False, s_aux=sinks)


def test_the_same_call_gives_the_same_bits(stage: Stage) -> None:
    one, _ = attend(stage, torch.bfloat16, 8, 2, 128, fast=True)
    two, _ = attend(stage, torch.bfloat16, 8, 2, 128, fast=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
