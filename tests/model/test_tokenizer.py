"""The tokenizer of a run: its source, chat template, end-of-turn token and pad token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpoctl.errors import SetupError, UsageError
from dpoctl.model.tokenizer import load_tokenizer, stop_tokens
from dpoctl.recipe.templates import template_text

TURN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
LLAMA = Path(__file__).parents[3] / "shared" / "data" / "llama-tokenizer"


def texts() -> Any:
    return iter(["the paper is fine, the reviewer is not. ", "hello world, hello reviewer. "] * 20)


def scratch(make_recipe: Any, size: int = 300, template: str | None = None) -> Any:
    spec = {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": size}}
    return make_recipe(model={"model_name_or_path": None, "from_scratch": spec, "chat_template": template})


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("zephyr", "<|endoftext|>")])
def test_a_trained_tokenizer_has_single_control_tokens_and_ends_turns_with_eos(
    make_recipe: Any, template: str, end: str
) -> None:
    tokenizer = load_tokenizer(scratch(make_recipe, template=template), texts)
    assert tokenizer.eos_token == end
    assert tokenizer.pad_token == "<|pad|>"
    ids = tokenizer.apply_chat_template(TURN, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == (2 if end in template_text(template) or template == "zephyr" else 0)
    assert tokenizer.decode(ids).count("hello") == 1
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer.encode("any bytes: \x00 é 漢")) == "any bytes: \x00 é 漢"


def test_training_a_tokenizer_twice_gives_the_same_one(make_recipe: Any) -> None:
    one, two = (load_tokenizer(scratch(make_recipe), texts) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert one.encode("hello reviewer") == two.encode("hello reviewer")


def test_a_vocabulary_smaller_than_the_bytes_is_refused(make_recipe: Any) -> None:
    with pytest.raises(UsageError, match=r"vocab_size is 260, but bytes and special tokens need 261$"):
        load_tokenizer(scratch(make_recipe, size=260, template="zephyr"), texts)


def test_the_models_own_template_is_kept_unless_another_is_named(
    save_base: Any, make_recipe: Any, tokenizer: Any
) -> None:
    save_base()
    assert load_tokenizer(make_recipe(), texts).chat_template == tokenizer.chat_template
    named = load_tokenizer(make_recipe(model={"chat_template": "zephyr"}), texts)
    assert named.chat_template == template_text("zephyr")


def test_a_template_file_is_used(tmp_path: Path, save_base: Any, make_recipe: Any) -> None:
    save_base()
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    found = load_tokenizer(make_recipe(model={"chat_template": str(tmp_path / "mine.jinja")}), texts)
    assert found.apply_chat_template(TURN, tokenize=False) == "helloworld"


def test_an_adapters_own_tokenizer_comes_before_its_bases(
    save_base: Any, save_sft: Any, make_recipe: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_base()
    folder = save_sft()
    (folder / "chat_template.jinja").write_text("mine")
    assert load_tokenizer(make_recipe(folder, lora={"start": "new"}), texts).chat_template == "mine"
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    base_tokenizer = load_tokenizer(make_recipe(folder, lora={"start": "new"}), texts)
    assert base_tokenizer.chat_template == tokenizer.chat_template


@pytest.fixture
def without_chatml(tmp_path: Path, save_base: Any, make_recipe: Any) -> None:
    save_base()
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    plain = load_tokenizer(scratch(make_recipe, template="zephyr"), texts)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.usefixtures("without_chatml")
def test_chatml_on_a_tokenizer_without_its_tokens_needs_trained_embeddings(
    make_recipe: Any, stderr: Callable[[], str]
) -> None:
    chatml = {"chat_template": "chatml"}
    with pytest.raises(UsageError, match=r"needs <\|im_start\|>, <\|im_end\|>.*modules_to_save"):
        load_tokenizer(make_recipe(model=chatml, lora={"r": 4}), texts)
    for lora in ({}, {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}):
        tokenizer = load_tokenizer(make_recipe(model=chatml, **lora), texts)
        assert tokenizer.eos_token == "<|im_end|>"
        assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1
    assert "added <|im_start|>, <|im_end|> to the tokenizer" in stderr()


def test_zephyr_markers_may_be_several_tokens(save_base: Any, make_recipe: Any, stderr: Callable[[], str]) -> None:
    save_base()
    tokenizer = load_tokenizer(make_recipe(model={"chat_template": "zephyr"}, lora={"r": 4}), texts)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|user|>" in stderr()


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"unk_token": "<unk>", "eos_token": "</s>"}, "<unk>"),
        ({"unk_token": "<unk>", "eos_token": "</s>", "extra_special_tokens": ["<|reserved_special_token_0|>"]},
         "<|reserved_special_token_0|>"),
        ({"eos_token": "</s>"}, "</s>"),
    ],
)  # fmt: skip
def test_an_existing_token_replaces_a_missing_pad_token(
    tmp_path: Path, save_base: Any, make_recipe: Any, stderr: Callable[[], str], special: dict[str, Any], expected: str
) -> None:
    save_base()
    backend = load_tokenizer(scratch(make_recipe), texts).backend_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    vocabulary = {token for token in fast.get_vocab() if "pad" in token}
    assert vocabulary == {"<|pad|>"}
    fast.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|other|>"))
    size = len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    tokenizer = load_tokenizer(make_recipe(), texts)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size
    assert f"the tokenizer has no pad token: {expected} is used instead" in stderr()


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, make_recipe: Any) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(SetupError, match="base' cannot be loaded"):
        load_tokenizer(make_recipe(), texts)


@pytest.mark.skipif(not LLAMA.exists(), reason="../shared/data is absent")
def test_the_real_llama_tokenizer_loads_and_pads_with_unk(make_recipe: Any) -> None:
    tokenizer = load_tokenizer(make_recipe(LLAMA), texts)
    assert (len(tokenizer), tokenizer.pad_token) == (32000, "<unk>")


@pytest.mark.usefixtures("without_chatml")
def test_llama3_needs_its_control_tokens_and_mistral_needs_none(make_recipe: Any, stderr: Callable[[], str]) -> None:
    with pytest.raises(UsageError, match=r"needs <\|start_header_id\|>, .*<\|eot_id\|>.*modules_to_save"):
        load_tokenizer(make_recipe(model={"chat_template": "llama3"}, lora={"r": 4}), texts)
    llama3 = load_tokenizer(make_recipe(model={"chat_template": "llama3"}), texts)
    assert llama3.eos_token == "<|eot_id|>"
    assert "several tokens" not in stderr()
    mistral = load_tokenizer(make_recipe(model={"chat_template": "mistral"}, lora={"r": 4}), texts)
    assert mistral.eos_token == "<|endoftext|>"
    assert mistral.apply_chat_template(TURN, tokenize=False) == "[INST] hello [/INST] world<|endoftext|>"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [0, 1]}}, {0, 1, 2}),
        ({"generation_config.json": {"eos_token_id": 0}}, {0, 2}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 1}}, {1, 2}),
        ({"config.json": {"text_config": {"eos_token_id": [1]}}}, {1, 2}),
        ({"config.json": {}}, None),
    ],
)
def test_a_model_stops_at_its_settings_and_at_the_end_of_sequence(
    tmp_path: Path, save_base: Any, make_recipe: Any, tokenizer: Any, files: dict[str, Any], expected: set[int] | None
) -> None:
    save_base()
    for name in ("generation_config.json", "config.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    for name, settings in files.items():
        (tmp_path / "base" / name).write_text(json.dumps(settings))
    assert stop_tokens(make_recipe(), tokenizer) == expected


def test_an_adapter_stops_where_its_base_does_unless_it_has_settings(
    tmp_path: Path, save_base: Any, save_sft: Any, make_recipe: Any, tokenizer: Any
) -> None:
    save_base()
    folder = save_sft()
    (folder / "generation_config.json").unlink()  # adapters of other programs have none
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 1}')
    recipe = make_recipe(folder, lora={"start": "new"})
    assert stop_tokens(recipe, tokenizer) == {1, 2}
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert stop_tokens(recipe, tokenizer) == {0, 2}
    assert stop_tokens(scratch(make_recipe), tokenizer) == {2}
