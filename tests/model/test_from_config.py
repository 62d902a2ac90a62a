"""Models built from scratch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import logits, plain

from dpoctl.errors import UsageError
from dpoctl.model.export import export_model
from dpoctl.model.load import load_policy
from dpoctl.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")
SCRATCH = {
    "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 2},
    "tokenizer": {"vocab_size": 300},
}  # fmt: skip


def texts() -> Any:
    return iter(["the paper is fine, the reviewer is not. "] * 20)


def scratch(make_recipe: Any, **config: Any) -> Any:
    spec = {**SCRATCH, "config": {**SCRATCH["config"], **config}}
    return make_recipe(model={"model_name_or_path": None, "from_scratch": spec})


def test_a_model_from_scratch_depends_on_recipe_and_data_only(tmp_path: Path, make_recipe: Any) -> None:
    recipe = scratch(make_recipe)
    tokenizer = load_tokenizer(recipe, texts)
    one, two = (load_policy(recipe, tokenizer, CPU) for _ in range(2))
    ids = torch.arange(20)[None]
    assert torch.equal(logits(one.causal, ids), logits(two.causal, ids))
    assert one.causal.config.vocab_size == len(tokenizer)
    assert one.causal.config.eos_token_id == tokenizer.eos_token_id
    export_model(one, tmp_path / "run", tokenizer)
    loaded = plain(tmp_path / "run")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(logits(loaded, ids), logits(one.causal, ids))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "transformers has no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": "vit"}, "'vit' has no causal language model"),
        ({"hiden_size": 32}, "LlamaConfig has no setting 'hiden_size'; did you mean 'hidden_size'?"),
        ({"vocab_size": 10}, "vocab_size is 10, but the tokenizer has 270 tokens; leave vocab_size out"),
        ({"hidden_size": "wide"}, "model.from_scratch.config: "),
        ({"num_attention_heads": 5}, "model.from_scratch.config: "),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(make_recipe: Any, config: dict[str, Any], message: str) -> None:
    recipe = scratch(make_recipe, **config)
    tokenizer = load_tokenizer(scratch(make_recipe), texts)
    with pytest.raises(UsageError) as caught:
        load_policy(recipe, tokenizer, CPU)
    assert message.replace("270", str(len(tokenizer))) in str(caught.value)


@pytest.mark.parametrize("sections", [{"lora": {"r": 4}}, {"quantization": {"load_in_4bit": True}, "lora": {}}])
def test_a_model_from_scratch_is_trained_whole(make_recipe: Any, tokenizer: Any, sections: dict[str, Any]) -> None:
    recipe = scratch(make_recipe).model_copy(
        update={name: getattr(make_recipe(**sections), name) for name in ("lora", "quantization")}
    )
    with pytest.raises(
        UsageError, match=r"^a model built from scratch is trained whole; leave out lora and quantization$"
    ):
        load_policy(recipe, tokenizer, CPU)
