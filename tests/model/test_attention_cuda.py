"""A variable-length kernel on gathered keys gives the same result as the loop over segments.

The kernels run on GPUs only. A plain implementation of their contract takes their place here: packed sequences, the
last query of each aligned with its last key, and a window that ends there.
"""

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpoctl.model import attention as attention_module
from dpoctl.model import attention_cuda
from dpoctl.model.attention import Segments, shared_prefix_attention
from dpoctl.model.attention_cuda import GatheredKeys, Kernel, find_kernel, gather

# Prompts with one answer, two, three; one answer without a prompt.
RECORDS = ((0, 5, (3, 4)), (12, 1, (6,)), (19, 2, (1, 2, 3)), (27, 0, (4,)))
ROWS, HEADS, WIDTH = 31, 4, 8


def contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: GatheredKeys,
    scale: float,
    window: tuple[int, int],
    *,
    causal: bool,
) -> Tensor:
    """Compute what a variable-length kernel computes."""
    starts_q, starts_k = keys.query_starts, keys.key_starts
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert (starts_q[-1], starts_k[-1]) == (len(query), len(key))
    assert (keys.longest_query, keys.longest_key) == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    outputs = []
    for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        q, k, v = (t.transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        visible = torch.ones_like(behind, dtype=torch.bool)
        if window[0] >= 0:
            visible &= behind <= window[0]
        if window[1] >= 0 or causal:
            visible &= behind >= -max(window[1], 0)
        scores = q @ k.transpose(1, 2) * scale
        outputs.append((scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
               max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
               window_size: tuple[int, int] = (-1, -1), deterministic: bool = False) -> Tensor:  # fmt: skip
    assert deterministic
    assert softmax_scale is not None
    keys = GatheredKeys.of(RECORDS)
    assert torch.equal(cu_seqlens_q, keys.query_starts)
    return contract(q, k, v, keys, softmax_scale, window_size, causal=causal)


def in_torch(q: Tensor, k: Tensor, v: Tensor, keys: GatheredKeys, scale: float, window: int | None) -> Tensor:
    """Call `contract` with the arguments of torch's own kernel."""
    options = attention_cuda._options(scale, window)
    sides = options["window_size_left"], options["window_size_right"]
    return contract(q, k, v, keys, options["scale"], sides, causal=window is None)


KERNELS = {"torch": in_torch, "flash-attn": attention_cuda.flash_attn_kernel(flash_attn)}


def attend(
    kernel: Kernel | None, monkeypatch: pytest.MonkeyPatch, kv_heads: int, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of queries, keys and values."""
    monkeypatch.setattr(attention_module, "find_kernel", lambda *_: kernel)
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
def test_the_kernel_on_gathered_keys_gives_the_result_of_the_loop(
    name: str, kv_heads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, gradients = attend(None, monkeypatch, kv_heads, **options)
    out, own = attend(KERNELS[name], monkeypatch, kv_heads, **options)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    assert len(own) == len(gradients) == 3
    for mine, true in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_the_gathered_keys_of_a_response_are_the_prefix_and_its_own() -> None:
    keys = GatheredKeys.of(((0, 2, (1, 2)), (5, 1, (1,))))
    assert keys.tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert keys.query_starts.tolist() == [0, 3, 5, 7]
    assert keys.key_starts.tolist() == [0, 3, 7, 9]
    assert (keys.longest_query, keys.longest_key) == (3, 4)
    assert keys.first.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert [(tokens.tolist(), copies.tolist()) for tokens, copies in keys.repeats] == [([0, 1], [3, 4])]


def test_half_precision_gradients_of_shared_tokens_are_summed_in_float32() -> None:
    many = ((0, 1, (1,) * 64),)
    keys, source = GatheredKeys.of(many), torch.ones(65, 1, 1, dtype=torch.bfloat16).requires_grad_()
    (gather(source, keys) * 0.01).sum().backward()
    assert source.grad is not None
    # Summed in bfloat16, with eight bits, the total would stop growing before the end.
    assert float(source.grad[0, 0, 0]) == pytest.approx(64 * float(torch.tensor(0.01).bfloat16()), rel=4e-3)


def test_a_cpu_has_no_kernel() -> None:
    assert find_kernel(*[torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)] * 2, True) is None
    assert Segments(RECORDS).to(torch.device("cpu")).keys is None


def test_the_deterministic_switch_is_restored() -> None:
    with attention_cuda._deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), attention_cuda._deterministic():
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), OSError("libcudart.so.11.0: cannot open")])
def test_a_broken_flash_attn_is_reported_and_not_used(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any, **options: Any) -> Any:
        if name == "flash_attn":
            raise error
        return real(name, *rest, **options)

    monkeypatch.setattr(attention_cuda, "find_spec", lambda name: object())
    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    attention_cuda.installed_kernel.cache_clear()
    found = attention_cuda.installed_kernel()
    attention_cuda.installed_kernel.cache_clear()
    assert found is attention_cuda._torch_kernel
    message = (
        f"flash_attn is installed but cannot be imported ({error}): using torch's own flash kernel; "
        "install a flash_attn built for this torch, or remove it"
    )
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("query", "value"), [((4, 9, 20), (2, 9, 20)), ((4, 9, 320), (2, 9, 320)), ((4, 9, 192), (2, 9, 128))],
    ids=["not a multiple of eight", "too large", "other size of values"],
)  # fmt: skip
def test_head_sizes_that_the_kernel_does_not_support(
    query: tuple[int, ...], value: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_cuda, "installed_kernel", lambda: KERNELS["torch"])
    q, v = (torch.zeros(1, *shape, dtype=torch.bfloat16).as_subclass(OnGpu) for shape in (query, value))
    assert find_kernel(q, v, True) is None
    fine = torch.zeros(1, 4, 9, 64, dtype=torch.bfloat16).as_subclass(OnGpu)
    assert find_kernel(fine, fine, True) is not None
