"""Thinking blocks in and out of the loss, and the masks of tool turns, on templates of models that people train."""

from pathlib import Path
from typing import Any

import pytest
from chat_samples import assistant, build_tokenizer, user
from template_sweep import FILES, OSLO, TOOL, calling, found, thinking_table, trained_runs

from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import Rendered, Renderer
from dpoctl.data.tokenize import Encoder

HERE = Path(__file__).parent
needs_trl = pytest.mark.skipif(not found, reason="trl is not installed")
ASK = [user("What about it?")]
PLAIN, THINKS = assistant("Umbrella needed."), assistant("Umbrella needed.") | {
    "reasoning_content": "Clouds.", "thinking": "Clouds.", "reasoning": "Clouds."
}  # fmt: skip
RENDERED = assistant("<think>\nClouds.\n</think>\n\nUmbrella needed.")
BLOCKS: dict[str, tuple[str, str, str]] = {
    "qwen3": ("<think>\n\n</think>\n\n", "<think>\nClouds.\n</think>\n\n", "Umbrella needed.<|im_end|>"),
    "qwen3_5_think": ("\n</think>\n\n", "Clouds.\n</think>\n\n", "Umbrella needed.<|im_end|>"),
    "glm4moe": ("\n<think></think>\n", "\n<think>Clouds.</think>\n", "Umbrella needed.<|endoftext|>"),
    "gptoss": (
        "",
        "<|channel|>analysis<|message|>Clouds.<|end|><|start|>assistant",
        "<|channel|>final<|message|>Umbrella needed.<|return|>",
    ),
    "gemma4_v5": ("", "<|channel>thought\nClouds.\n<channel|>", "Umbrella needed.<turn|>"),
    "muse_glimmer": (
        "",
        " to=self<|message|>Clouds.<|eom|><|start|>assistant",
        " to=user<|message|>Umbrella needed.<|eot|>",
    ),
}
"""By template: its empty block before an answer, the block of one that thinks, and the rest."""


def trained(tokenizer: Any, rendered: Rendered) -> list[list[str]]:
    """Decode what is trained on in each answer."""
    _, answers = Encoder(tokenizer).encode([rendered])[0]
    return [[tokenizer.decode(run) for run in trained_runs(answer)] for answer in answers]


@needs_trl
@pytest.mark.parametrize("name", BLOCKS)
def test_the_thinking_block_of_a_template_is_trained_on_or_not(name: str) -> None:
    empty, block, rest = BLOCKS[name]
    tokenizer = build_tokenizer(name, FILES[name].read_text(encoding="utf-8"))
    expected = {"all": [empty + rest, block + rest], "nonempty": [rest, block + rest], "none": [rest, rest]}
    for wanted, (plain, thinks) in expected.items():
        rendered = Renderer(tokenizer, {}, train_on_think=wanted).render(Record(ASK, ([PLAIN], [THINKS]), ((0, 1),)))  # type: ignore[arg-type]
        assert trained(tokenizer, rendered) == [[plain], [thinks]], wanted
        assert ("thinking_empty" in rendered.notes) == (wanted == "all" and bool(empty))
        assert ("thinking_untrained" in rendered.notes) == (wanted == "none" or (wanted == "nonempty" and bool(empty)))


@needs_trl
def test_every_turn_that_is_trained_on_loses_its_block() -> None:
    tokenizer = build_tokenizer("glm4moe", FILES["glm4moe"].read_text(encoding="utf-8"))
    record = Record(ASK, ([PLAIN, user("And then?"), RENDERED],))
    rendered = Renderer(tokenizer, {}, train_on_think="none").render(record)
    first, second = trained(tokenizer, rendered)[0]
    assert "think" not in first + second
    assert first.startswith("Umbrella")
    assert second.startswith("Umbrella")


def test_thinking_between_unknown_marks_cannot_be_kept_out() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}({{ m.thinking }}) {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = build_tokenizer("chatml", template)
    record = Record(ASK, ([assistant("Yes.") | {"thinking": "Clouds."}],))
    assert Renderer(tokenizer, {}).render(record).completions[0].text == "(Clouds.) Yes.<|im_end|>"
    with pytest.raises(Reject, match="thinking_unmarked"):
        Renderer(tokenizer, {}, train_on_think="none").render(record)


@needs_trl
def test_the_documents_say_what_each_template_does_with_thinking() -> None:
    page = (HERE.parents[1] / "docs" / "templates.md").read_text(encoding="utf-8")
    assert thinking_table() in page


RESULT = {"role": "tool", "tool_call_id": "idweather", "name": "weather", "content": "rainfall"}
TALK = [calling("", OSLO), RESULT, assistant("Umbrella needed.")]
ARGUMENTS = '{"city": "Oslo", "days": 17}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
IN_CONTENT = [assistant(CALL.removesuffix("<|im_end|>")), RESULT, assistant("Umbrella needed.")]
MASKS: dict[str, tuple[Any, Any, list[str]]] = {
    "qwen3": (TALK, {"tools": [TOOL]}, [CALL, "<think>\n\n</think>\n\nUmbrella needed.<|im_end|>"]),
    "llama3_1": (
        TALK,
        {"tools": [TOOL]},
        [f'{{"name": "weather", "parameters": {ARGUMENTS}}}<|eot_id|>', "Umbrella needed.<|eot_id|>"],
    ),
    "mistral": (
        TALK,
        {"tools": [TOOL]},
        [
            f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "idweather"}}]</s>',
            " Umbrella needed.</s>",
        ],
    ),
    "hermes": (TALK, {"tools": [TOOL]}, [CALL, "Umbrella needed.<|im_end|>"]),
    "smollm3": (IN_CONTENT, {"template_kwargs": {"xml_tools": ["weather"]}}, [CALL, "Umbrella needed.<|im_end|>"]),
}
"""By template: the turns, further columns, and exactly what is trained on."""


@needs_trl
@pytest.mark.parametrize("name", MASKS)
def test_of_tool_turns_the_calls_and_the_answers_are_trained_on_and_nothing_else(name: str) -> None:
    turns, columns, expected = MASKS[name]
    file = FILES.get(name) or HERE / "tool_templates" / f"{name}.jinja"
    tokenizer = build_tokenizer(name, file.read_text(encoding="utf-8"))
    rendered = Renderer(tokenizer, {}).render(Record(ASK, (turns,), **columns))
    assert trained(tokenizer, rendered)[0] == expected
    last = Renderer(tokenizer, {}, "last").render(Record(ASK, (turns,), **columns))
    assert trained(tokenizer, last)[0] == expected[-1:]
    # As a preference: the same prompt, another answer.
    prompt, other = [*ASK, *turns[:2]], [assistant("No idea.")]
    pair = Renderer(tokenizer, {}, "last").render(Record(prompt, (turns[2:], other), ((0, 1),), **columns))
    assert [texts for (texts,) in trained(tokenizer, pair)] == [
        expected[-1],
        expected[-1].replace("Umbrella needed", "No idea"),
    ]


def test_what_a_template_leaves_out_of_tool_turns_rejects_the_row() -> None:
    hermes, smollm3 = (
        build_tokenizer(name, (HERE / "tool_templates" / f"{name}.jinja").read_text(encoding="utf-8"))
        for name in ("hermes", "smollm3")
    )
    with pytest.raises(Reject, match="content beside tool_calls"):
        Renderer(hermes, {}).render(Record(ASK, ([calling("Looking it up.", OSLO)],), tools=[TOOL]))
    with pytest.raises(Reject, match="tool_calls_dropped"):
        Renderer(smollm3, {}).render(Record(ASK, (TALK,)))
    with pytest.raises(Reject, match="tools_dropped"):
        Renderer(smollm3, {}).render(Record(ASK, (IN_CONTENT,), tools=[TOOL]))


def test_an_empty_block_in_the_generation_prompt_is_never_trained_on() -> None:
    tokenizer = build_tokenizer("smollm3", (HERE / "tool_templates" / "smollm3.jinja").read_text(encoding="utf-8"))
    rendered = Renderer(tokenizer, {"enable_thinking": False}).render(Record(ASK, (IN_CONTENT,)))
    assert trained(tokenizer, rendered)[0] == [CALL, "Umbrella needed.<|im_end|>"]
    assert rendered.notes == ()
