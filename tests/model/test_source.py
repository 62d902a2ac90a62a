"""Models that are refused by their configuration, their folder or their hub id, before weights are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from dpoctl.errors import SetupError, UsageError
from dpoctl.model import source
from dpoctl.model.policy import Policy
from dpoctl.model.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(**{"d_model": 16, "num_layers": 1}), "is an encoder-decoder (t5)"),
        (transformers.BartConfig(), "is an encoder-decoder (bart)"),
        (transformers.BertConfig(), "is an encoder (bert)"),
        (transformers.ViTConfig(), "(vit) has no causal head"),
        (transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (transformers.LlamaConfig(architectures=["LlamaModel"]), "is a LlamaModel: it has no causal head"),
    ],
)
def test_a_configuration_without_a_causal_decoder_is_refused(
    tmp_path: Path, make_recipe: Any, load: Callable[..., Policy], config: Any, message: str
) -> None:
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError) as caught:
        load(make_recipe())
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_kernel_of_the_hub_is_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy], key: str
) -> None:
    save_base("llama")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "someone/kernel"}))
    with pytest.raises(
        UsageError, match=f"sets {key} to 'someone/kernel', which is not allowed; remove it from config"
    ):
        load(make_recipe())


def test_code_that_comes_with_a_model_does_not_run(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = tmp_path / "base"
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"comes with its own code; set model.trust_remote_code: true to run it$"):
        load(make_recipe())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./gone", "/gone/for/good", "~/gone"])
def test_a_folder_that_does_not_exist_is_refused(make_recipe: Any, load: Callable[..., Policy], name: str) -> None:
    with pytest.raises(SetupError, match=f"model folder '{name}' does not exist"):
        load(make_recipe(name))


def test_a_hub_id_that_cannot_be_reached_is_refused(
    make_recipe: Any, load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "hub_is_reachable", lambda: False)
    with pytest.raises(SetupError, match=r"v0.1' is not a local folder, and https://.* cannot be reached; ") as caught:
        load(make_recipe("mistralai/Mistral-7B-v0.1"))
    assert caught.value.exit_code == 5
    with pytest.raises(SetupError, match=r"'mistralai/Mistral-7B-v0.1' is not a local folder"):
        load_tokenizer(make_recipe("mistralai/Mistral-7B-v0.1"), lambda: iter([]))
