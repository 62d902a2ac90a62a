"""The kernel for uneven lengths: fed with gathered keys it gives what the loop over segments gives.

The kernel itself runs on GPUs only. What is called here obeys its contract, spelled out: packed sequences, the last
query of each aligned with its last key, a window counted back from there.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpoctl.model import attention as attention_module
from dpoctl.model.attention import Segments, shared_prefix_attention
from dpoctl.model.varlen import GatheredKeys, Varlen, find_varlen, gather

# Prompts with one answer, two, three; one answer without a prompt.
RECORDS = ((0, 5, (3, 4)), (12, 1, (6,)), (19, 2, (1, 2, 3)), (27, 0, (4,)))
ROWS, HEADS, WIDTH = 31, 4, 8


def contract(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int],
    *, scale: float | None, window: tuple[int, int], causal: bool,
) -> Tensor:  # fmt: skip
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert (starts_q[-1], starts_k[-1]) == (len(query), len(key))
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert longest == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    outputs = []
    for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        q, k, v = (t.transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = torch.ones_like(behind, dtype=torch.bool)
        if window[0] >= 0:
            seen &= behind <= window[0]
        if window[1] >= 0 or causal:
            seen &= behind >= -max(window[1], 0)
        scores = q @ k.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def torch_2_10(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
               is_causal: bool = False, return_aux: Any = None) -> Tensor:  # fmt: skip
    longest = (max_q, max_k)
    return contract(query, key, value, cu_seq_q, cu_seq_k, longest, scale=None, window=(-1, -1), causal=is_causal)


def torch_2_11(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
               *, return_aux: Any = None, scale: float | None = None,
               window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    longest = (max_q, max_k)
    return contract(query, key, value, cu_seq_q, cu_seq_k, longest, scale=scale, window=window_size, causal=False)


def torch_2_13(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
               *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
               enable_gqa: bool = False) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    longest = (max_q, max_k)
    return contract(query, key, value, cu_seq_q, cu_seq_k, longest, scale=scale, window=window_size, causal=False)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
               max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
               window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    groups, longest = q.shape[1] // k.shape[1], (max_seqlen_q, max_seqlen_k)
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return contract(
        q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale=softmax_scale, window=window_size, causal=causal
    )


KERNELS = {
    "torch 2.10": Varlen.around(torch_2_10),
    "torch 2.11": Varlen.around(torch_2_11),
    "torch 2.13": Varlen.around(torch_2_13),
    "flash-attn": Varlen.around(flash_attn, is_flash=True),
}


def attend(
    kernel: Varlen | None, monkeypatch: pytest.MonkeyPatch, kv_heads: int, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients with respect to queries, keys and values."""
    monkeypatch.setattr(attention_module, "find_varlen", lambda *_: kernel)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, ROWS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]
    upstream = torch.randn(1, ROWS, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    layout = Segments(RECORDS, None if kernel is None else GatheredKeys.of(RECORDS))
    out, _ = shared_prefix_attention(nn.Identity(), *tensors, layout=layout, **options)
    (out * upstream).sum().backward()
    return out.detach(), [tensor.grad for tensor in tensors if tensor.grad is not None]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.2}, {"sliding_window": 3}], ids=["plain", "scaled", "windowed"])
def test_the_kernel_on_gathered_keys_is_the_loop_over_segments(
    name: str, kv_heads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KERNELS[name]
    if "sliding_window" in options and not kernel.has_windows:
        pytest.skip("this release knows no windows; the loop serves there")
    truth, gradients = attend(None, monkeypatch, kv_heads, **options)
    out, own = attend(kernel, monkeypatch, kv_heads, **options)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    assert len(own) == len(gradients) == 3
    for mine, true in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_each_response_finds_the_prefix_before_its_own_rows() -> None:
    keys = GatheredKeys.of(((0, 2, (1, 2)), (5, 1, (1,))))
    assert keys.rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert keys.query_starts.tolist() == [0, 3, 5, 7]
    assert keys.key_starts.tolist() == [0, 3, 7, 9]
    assert (keys.longest_query, keys.longest_key) == (3, 4)
    assert keys.first.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert [(rows.tolist(), at.tolist()) for rows, at in keys.again] == [([0, 1], [3, 4])]


def test_half_precision_gradients_of_shared_rows_add_up_in_float32() -> None:
    many = ((0, 1, (1,) * 64),)
    keys, source = GatheredKeys.of(many), torch.ones(65, 1, 1, dtype=torch.bfloat16).requires_grad_()
    (gather(source, keys) * 0.01).sum().backward()
    assert source.grad is not None
    # Rounded at every addition to eight bits, 64 hundredths stop growing on the way.
    assert float(source.grad[0, 0, 0]) == pytest.approx(64 * float(torch.tensor(0.01).bfloat16()), rel=4e-3)


def test_a_cpu_loops_over_segments() -> None:
    assert find_varlen(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), True, None) is None
    assert Segments(RECORDS).to(torch.device("cpu")).keys is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_real_kernel_agrees_with_the_loop_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, ROWS, 64, generator=generator).to("cuda", torch.bfloat16) for heads in (HEADS, 2, 2)
    ]
    layout = Segments(RECORDS)
    looped, _ = shared_prefix_attention(nn.Identity(), *(t.float() for t in tensors), layout=layout)
    fast, _ = shared_prefix_attention(nn.Identity(), *tensors, layout=layout.to(torch.device("cuda")))
    torch.testing.assert_close(fast.float(), looped, rtol=2e-2, atol=2e-2)
