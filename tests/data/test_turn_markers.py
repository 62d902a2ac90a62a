"""Turn markers that the tokenizer does not know are counted: those of the chat template, and those in rows of text."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from chat_samples import assistant, user

from dpoctl.data.prepare import PreparedData

CHATML = {
    "prompt": "<|im_start|>user\nHow deep is lake {n}?<|im_end|>\n<|im_start|>assistant\n",
    "chosen": "About {n} metres.<|im_end|>\n",
    "rejected": "Deep.<|im_end|>\n",
}
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
HTML = {"prompt": "<p>What is {n}?\n<br>", "chosen": "<p>A <b>number</b> {n}.</p>", "rejected": "<i>Nothing</i>"}
OWN = {"prompt": "<me>What is {n}?<bot>", "chosen": "A number, {n}.<stop>", "rejected": "No.<stop>"}


def rows(shape: dict[str, str], count: int = 4) -> list[dict[str, str]]:
    return [{key: text.format(n=n) for key, text in shape.items()} for n in range(count)]


@pytest.fixture
def without_markers(tokenizer: Any) -> Any:
    """A tokenizer that lacks the tokens of ChatML."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(tokenizer.backend_tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()))
    core = Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(t for t in letters if len(t) == 1)}, merges=[]))
    core.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    core.decoder = tokenizer.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def markers_of(data: PreparedData) -> dict[str, Any]:
    found: dict[str, Any] = data.report["train"]["markers"]
    return found


def test_markers_in_rows_of_text_are_counted_and_told(
    run: Callable[..., PreparedData], write_rows: Callable[..., str], without_markers: Any, capfd: Any
) -> None:
    data = run(train=[write_rows(rows(CHATML))], using=without_markers)
    assert markers_of(data)["text"] == {
        "<|im_end|>": {"rows": 4, "pieces": 10},
        "<|im_start|>": {"rows": 4, "pieces": 12},
    }
    err = capfd.readouterr().err
    assert "warning: train: rows of text hold turn markers that are no tokens of this tokenizer" in err
    assert "<|im_start|> (12 tokens, 4 rows); use messages instead of text" in err


def test_markers_of_any_spelling_are_found_where_they_recur_and_tags_are_not(
    run: Callable[..., PreparedData], write_rows: Callable[..., str], without_markers: Any
) -> None:
    found = markers_of(run(train=[write_rows(rows(OWN))], using=without_markers))
    assert set(found["text"]) == {"<me>", "<bot>", "<stop>"}
    gemma = {key: text.replace("<me>", "<start_of_turn>") for key, text in OWN.items()}
    assert "<start_of_turn>" in markers_of(run(train=[write_rows(rows(gemma, 1))], using=without_markers))["text"]
    assert markers_of(run(train=[write_rows(rows(HTML))], using=without_markers))["text"] == {}
    mixed = [*rows(OWN, 1), *rows({"prompt": "What is {n}?", "chosen": "Well, {n}", "rejected": "No"}, 5)]
    assert markers_of(run(train=[write_rows(mixed)], using=without_markers))["text"] == {}


def test_markers_that_are_tokens_are_not_counted(
    run: Callable[..., PreparedData], write_rows: Callable[..., str], tokenizer: Any
) -> None:
    assert markers_of(run(train=[write_rows(rows(CHATML))], using=tokenizer))["text"] == {}


@pytest.mark.parametrize("added", [(), ("<start_of_turn>", "<end_of_turn>")])
def test_markers_of_the_template_are_counted_whatever_their_spelling(
    run: Callable[..., PreparedData], write_rows: Callable[..., str], tokenizer: Any, added: tuple[str, ...]
) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = GEMMA
    mine.add_tokens(list(added))
    data = run("sft", train=[write_rows([{"messages": [user("q"), assistant("a")]}])], using=mine)
    expected = {} if added else {"<end_of_turn>": 1, "<start_of_turn>": 1}
    found = markers_of(data)
    assert {marker: counts["rows"] for marker, counts in found["template"].items()} == expected
    assert all(counts["pieces"] > 1 for counts in found["template"].values())
    assert not found["template_ends_turns"]
