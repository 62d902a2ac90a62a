"""The probe finds out what an architecture can do, and is not fooled."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpoctl.model import attention as attention_module
from dpoctl.model.probe import probe

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("mixtral", {}),
        ("gpt2", {}),
        ("gemma2", {"head_dim": 16, "sliding_window": 8}),
        ("gpt_oss", {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_attention_only_models_share_prompts(architecture: str, changes: dict[str, object], tiny_model: Build) -> None:
    verdict = probe(tiny_model(architecture, **changes), max_length=128)
    assert (verdict.layout, verdict.own_head) == ("shared", True), verdict.reason


def mamba() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "mamba2", vocab_size=384, hidden_size=64, num_hidden_layers=2, head_dim=16, num_heads=8
    )
    return AutoModelForCausalLM.from_config(config)


def falcon_h1() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("build", [mamba, falcon_h1])
def test_models_that_carry_state_fall_back_to_padded_rows(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    verdict = probe(build(), max_length=128)
    assert verdict.layout == "padded"
    assert "not shared" in verdict.reason


def test_an_attention_that_lets_answers_see_each_other_is_found_out(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(module, query, key, value, mask=None, *, layout=None, **kwargs):  # type: ignore[no-untyped-def]
        merged = attention_module.Segments(
            tuple((start, shared, (sum(rest),)) for start, shared, rest in layout.records)
        )
        return attention_module.shared_prefix_attention(module, query, key, value, mask, layout=merged, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, attention_module.SHARED_PREFIX, leaking)
    verdict = probe(tiny_llama, max_length=64)
    assert verdict.layout == "padded"
    assert "edit of one answer" in verdict.reason


def test_a_window_that_is_ignored_is_found_out(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def windowless(*args, sliding_window=None, **kwargs):  # type: ignore[no-untyped-def]
        return attention_module.shared_prefix_attention(*args, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, attention_module.SHARED_PREFIX, windowless)
    verdict = probe(tiny_model("mistral", sliding_window=8), max_length=64)
    assert verdict.layout == "padded"
    assert "differ" in verdict.reason


def test_a_head_with_a_transform_we_do_not_know_is_found_out(tiny_llama: PreTrainedModel) -> None:
    forward = tiny_llama.lm_head.forward
    original = tiny_llama.forward

    def doubled(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    tiny_llama.forward = doubled  # type: ignore[method-assign]
    verdict = probe(tiny_llama, max_length=64)
    assert (verdict.layout, verdict.own_head) == ("padded", False)
    assert tiny_llama.lm_head.forward == forward


def test_the_model_is_left_as_it_was(tiny_llama: PreTrainedModel) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules="all-linear"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    probe(model.get_base_model(), max_length=64)
    assert model.get_base_model().training
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
