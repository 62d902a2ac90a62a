"""Chat templates as models ship them: each conversation gives the right answer span, or a refusal by name."""

import importlib.util
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from chat_samples import CONVERSATIONS, OWN, build_tokenizer

from dpoctl.data.chat_template import ChatTemplate
from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import BREAK, Rendered, Renderer
from dpoctl.data.tokenize import Encoder

found = importlib.util.find_spec("trl")
SHIPPED = Path(str(found.origin)).parent / "chat_templates" if found else Path("trl is not installed")
FILES = {f"our {path.stem}": path for path in sorted(OWN.glob("*.jinja"))}
FILES |= {path.stem: path for path in sorted(SHIPPED.glob("*.jinja"))}
OTHER_END = {"phi3": "<|end|>", "glm4moe_training": "<|user|>"}
"""Templates whose turns do not end with the end-of-sequence token."""


DEEPSEEK = dict.fromkeys(CONVERSATIONS, "thinking_stub") | {"think": "thinking_dropped, thinking_stub"}
NEMOTRON = dict.fromkeys(CONVERSATIONS, "thinking_stub")
EMPTY = dict.fromkeys(CONVERSATIONS, "thinking_empty")
QWEN3 = EMPTY | {"turns": "history_rewritten, thinking_empty"}
QWEN3_5 = EMPTY | {"turns": "history_rewritten, thinking_empty, thinking_stub"}
QWEN3_8 = EMPTY | {"think": "thinking_doubled, thinking_empty"}
OUTCOMES: dict[str, dict[str, str]] = {
    "our gemma": {"system": "refused: template_refuses"},
    "our mistral-v0.1": {"system": "refused: template_refuses"},
    "our mistral-v0.3": {"system": "system_dropped"},
    "our qwen3": QWEN3,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseek_r1_distill_training": NEMOTRON,
    "deepseekv3": DEEPSEEK,
    "deepseekv3_training": DEEPSEEK,
    "gemma": {"system": "refused: template_refuses"},
    "gemma_training": {"system": "refused: template_refuses"},
    "gptoss": {"turns": "history_rewritten"},
    "gptoss_training": {"turns": "history_rewritten"},
    "glm4moe": EMPTY | {"turns": "thinking_empty, turns_without_end"},
    "glm4moe_training": EMPTY,
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_5_lightning_training": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_nano_training": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_super_training": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "nemotron_3_ultra_training": NEMOTRON,
    "qwen3": QWEN3,
    "qwen3_training": EMPTY,
    "qwen3_5_nothink": {"turns": "history_rewritten, thinking_stub", "think": "refused: thinking_refused"},
    "qwen3_5_nothink_training": {"think": "refused: thinking_refused"},
    "qwen3_5_think": QWEN3_5,
    "qwen3_5_think_training": EMPTY,
    "qwen3_6": QWEN3_5,
    "qwen3_6_training": EMPTY,
    "qwen3_8": QWEN3_8,
    "qwen3_8_training": QWEN3_8,
}
"""What is not simply verified, by template and conversation."""


def outcome_of(renderer: Renderer, record: Record) -> tuple[str, Rendered | None]:
    try:
        rendered = renderer.render(record)
    except Reject as reject:
        return f"refused: {reject.reason}", None
    return ", ".join(rendered.notes) or "verified", rendered


def scored_pieces(tokenizer: Any, answer: Any) -> list[list[int]]:
    marked = zip(answer.ids, answer.scored, strict=True)
    return [[token for token, _ in run] for scored, run in groupby(marked, key=lambda item: item[1]) if scored]


def check_tokens(name: str, tokenizer: Any, record: Record, rendered: Rendered) -> None:
    prompt, answers = Encoder(tokenizer).encode([rendered])[0]
    assert tokenizer.decode(prompt) == rendered.prompt.replace(BREAK, "")
    users = sum(message["role"] == "user" for message in record.prompt)
    each = users if name == "our llama2" else 1
    assert prompt.count(tokenizer.bos_token_id) == (each if "bos_token" in tokenizer.chat_template else 0)
    family = next((family for family in OTHER_END if family in name), None)
    end = tokenizer.convert_tokens_to_ids(OTHER_END[family] if family else tokenizer.eos_token)
    for response, answer in zip(record.responses, answers, strict=True):
        turns = [message["content"] for message in response if message["role"] == "assistant"]
        text = "".join(tokenizer.decode(piece) for piece in scored_pieces(tokenizer, answer))
        for turn in turns:
            assert turn.rpartition("</think>")[2].strip() in text
        assert "W" not in text, "a question is scored"
        last = scored_pieces(tokenizer, answer)[-1]
        assert last[-1] == end
        assert last.count(end) == 1
        assert tokenizer.bos_token_id not in last


@pytest.mark.skipif(not found, reason="trl is not installed")
def test_the_outcomes_are_those_of_the_templates_that_are_there():
    assert OUTCOMES.keys() <= FILES.keys()
    assert len(FILES) > 80


@pytest.mark.parametrize("name", FILES)
def test_a_template_gives_verified_answers_or_refuses_by_name(name):
    tokenizer = build_tokenizer(FILES[name].stem, FILES[name].read_text(encoding="utf-8"))
    renderer = Renderer(tokenizer, {})
    outcomes = {}
    for conversation, (prompt, *responses) in CONVERSATIONS.items():
        record = Record(prompt, tuple(responses), ((0, 1),))
        outcomes[conversation], rendered = outcome_of(renderer, record)
        if rendered is not None:
            check_tokens(name, tokenizer, record, rendered)
    assert {key: value for key, value in outcomes.items() if value != "verified"} == OUTCOMES.get(name, {})


@pytest.mark.parametrize("name", FILES)
def test_a_template_is_called_as_transformers_calls_it(name):
    tokenizer = build_tokenizer(FILES[name].stem, FILES[name].read_text(encoding="utf-8"))
    chat = ChatTemplate(tokenizer, {"enable_thinking": True})
    if chat._wants_parts:
        pytest.skip("its contents are lists of parts")
    for prompt, *responses in CONVERSATIONS.values():
        for messages, generate in ((prompt, True), *((prompt + response, False) for response in responses)):
            try:
                mine = chat.apply(messages, generate=generate)
            except Reject:
                mine = None
            try:
                theirs = tokenizer.apply_chat_template(
                    messages,
                    chat_template=chat.text,
                    tokenize=False,
                    add_generation_prompt=generate,
                    enable_thinking=True,
                )
            except Exception:
                theirs = None
            assert mine == theirs
