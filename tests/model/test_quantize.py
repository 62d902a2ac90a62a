"""Quantised base models train on a CPU, and their reference does not change."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import IDS, disturb, logits, plain, reference_logits

from dpoctl.errors import SetupError, UsageError
from dpoctl.model import quantize
from dpoctl.model.export import export_model
from dpoctl.model.memory import set_gradient_checkpointing
from dpoctl.model.policy import Policy

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the quant extra is not installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_reference_stays(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], model_type: str, width: str, dtype: str
) -> None:
    save_base(model_type)
    recipe = make_recipe(model={"dtype": dtype}, quantization={width: True}, lora={"r": 4})
    policy = load(recipe)
    assert any(p.dtype in (torch.uint8, torch.int8) for p in policy.causal.parameters())
    set_gradient_checkpointing(policy.causal, True)
    policy.model.train()
    cast = torch.autocast("cpu", policy.dtype, enabled=policy.dtype != torch.float32)
    with cast:
        first = logits(policy.causal)
    optimizer = torch.optim.AdamW([p for p in policy.causal.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with cast:
            loss = policy.causal(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with policy.reference(), cast:
        assert torch.equal(logits(policy.causal), first)
    policy.model.eval()
    with policy.reference(), cast:
        assert torch.equal(logits(policy.causal), first)


@needs_bitsandbytes
@pytest.mark.parametrize("adapted", [True, False])
def test_a_row_s_8_bit_product_does_not_depend_on_its_neighbours(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], adapted: bool
) -> None:
    """An input of 50 is an outlier, for which bitsandbytes would multiply its whole column in another way."""
    save_base("llama")
    policy = load(make_recipe(quantization={"load_in_8bit": True}, lora={"r": 4, "target_modules": ["q_proj"]}))
    layer = policy.causal.get_submodule("model.layers.0.self_attn." + ("q_proj" if adapted else "k_proj"))
    base: Any = layer.base_layer if adapted else layer
    x = torch.randn(3, base.in_features, requires_grad=True)
    outlier = x.detach().clone()
    outlier[2, 5] = 50.0
    assert torch.equal(layer(x)[:2], layer(outlier)[:2])
    true = base.weight.data.float() * base.state.SCB[:, None] / 127
    torch.testing.assert_close(layer(x), x @ true.T)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, true.sum(0).expand(3, -1))


@needs_bitsandbytes
def test_the_head_and_saved_modules_are_not_quantised(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(quantization={"load_in_4bit": True}, lora={"r": 4, "modules_to_save": ["o_proj"]}))
    dtypes = {name: p.dtype for name, p in policy.causal.named_parameters()}
    assert dtypes["lm_head.weight"] == torch.float32
    assert dtypes["model.layers.0.self_attn.o_proj.modules_to_save.default.weight"] == torch.float32
    assert dtypes["model.layers.0.self_attn.q_proj.base_layer.weight"] == torch.uint8
    first = logits(policy.causal)
    disturb(policy)
    assert torch.equal(reference_logits(policy), first)


@needs_bitsandbytes
def test_reference_tensors_include_quantised_weights_and_their_constants(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    nf4 = load(make_recipe(quantization={"load_in_4bit": True}, lora={"r": 4}))
    names = dict(nf4.reference_tensors())
    assert names["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in names
    plain_quant = load(
        make_recipe(quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": False}, lora={"r": 4})
    )
    assert dict(plain_quant.reference_tensors()).keys() != names.keys()


@needs_bitsandbytes
@pytest.mark.parametrize("start", ["new", "continue"])
def test_an_sft_adapter_works_over_a_quantised_base(
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    save_sft: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    start: str,
) -> None:
    save_base("llama")
    quantization = {"load_in_4bit": True}
    policy = load(make_recipe(save_sft(), quantization=quantization, lora={"start": start}))
    first = logits(policy.causal)
    disturb(policy)
    assert torch.equal(reference_logits(policy), first)
    export_model(policy, tmp_path / "run", tokenizer)
    assert plain(tmp_path / "base", tmp_path / "run") is not None


def test_without_bitsandbytes_the_error_says_how_to_install_it(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base("llama")
    monkeypatch.setattr(quantize, "find_spec", lambda _name: None)
    with pytest.raises(SetupError) as caught:
        load(make_recipe(quantization={"load_in_4bit": True}, lora={"r": 4}))
    assert str(caught.value) == "quantization needs bitsandbytes; pip install 'dpoctl[quant]'"


def test_a_checkpoint_quantised_with_gptq_is_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        UsageError, match=r"is quantised with gptq, which cannot be trained; give its unquantised weights$"
    ):
        load(make_recipe(lora={"r": 4}))
