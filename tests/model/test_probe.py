"""The probe finds out what an architecture can do, and is not fooled."""

from collections.abc import Callable

import pytest
import torch
from architectures import BY_TYPE
from transformers import PreTrainedModel

from dpoctl.model import attention as attention_module
from dpoctl.model import layouts
from dpoctl.model.probe import backbone, probe

Build = Callable[..., PreTrainedModel]


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
    assert verdict.layout == "masked", "the model's own attention does not leak"
    assert "edit of one answer" in verdict.reason


def test_a_mask_that_lets_answers_see_each_other_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        hidden = torch.ones(parts.shape[-1], parts.shape[-1]).triu(1).bool()
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min).expand(len(parts), 1, -1, -1)

    assert probe(BY_TYPE["stablelm"].build(), max_length=64).layout == "masked"
    monkeypatch.setattr(layouts, "_dense_mask", leaking)
    assert probe(BY_TYPE["stablelm"].build(), max_length=64).layout == "padded"


def test_a_window_over_columns_rules_out_a_mask_even_where_no_row_is_longer() -> None:
    # Between a prompt and its second answer stands the first: more columns than positions lie between their tokens.
    assert probe(BY_TYPE["gpt_neo"].build(window_size=256), max_length=64).layout == "padded"


def test_a_text_tower_under_a_name_of_its_multimodal_model_has_a_backbone() -> None:
    model = BY_TYPE["llama4_text"].build()
    assert backbone(model) is model.model


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
