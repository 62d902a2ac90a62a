"""Where assistant turns end, and what a template leaves out of them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from chat_samples import assistant, user

from dpoctl.data.records import Record, Reject
from dpoctl.data.rendering import Completion, Rendered, Renderer
from dpoctl.data.tokenize import Encoder

HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
GENERATE = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
TOOLS = HEADER + "{{ m.content }}" + CALLS + "<|im_end|>\n" + GENERATE
THINKS_LAST = (
    HEADER + "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}" + CALLS + "<|im_end|>\n" + GENERATE
)
"""As Qwen3: thinking is written in the last turn only."""
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|assistant|>', 'tool': '<|observation|>'}[m.role] }}"
    "\n{{ m.content }}" + CALLS + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = [assistant("It is 1."), user("And twice that?"), assistant("That is 2.")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def calling(content: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return assistant(content) | {"tool_calls": list(calls or [CALL])}


def spans(completion: Completion) -> list[str]:
    return [completion.text[start:end] for start, end in completion.spans]


@pytest.fixture
def render(tokenizer: Any) -> Callable[..., Rendered]:
    """Render a record with added tokens, flagged as special or not, of which some stop generation."""

    def call(
        template: str,
        answer: Any,
        *others: Any,
        prompt: Any = None,
        tokens: tuple[str, ...] = (),
        special: bool = False,
        stops: tuple[str, ...] | None = None,
        loss_on: str = "assistant",
        **columns: Any,
    ) -> Rendered:
        mine = copy.deepcopy(tokenizer)
        mine.add_tokens(list(tokens), special_tokens=special)
        mine.chat_template = template
        ids = None if stops is None else mine.convert_tokens_to_ids([mine.eos_token, *stops])
        renderer = Renderer(mine, {}, loss_on, ids)
        answers = [[answer] if isinstance(answer, dict) else answer, *others]
        question: Any = [user("Weather?")] if prompt is None else prompt
        rendered = renderer.render(Record(question, tuple(answers), **columns))
        Encoder(mine).encode([rendered])
        return rendered

    return call


def test_a_turn_is_its_content_and_its_calls_and_its_end(render: Callable[..., Rendered]) -> None:
    turns = [calling("Let me see.", CALL, CALL), {"role": "tool", "content": "22 C"}, assistant("It is warm.")]
    for template in (TOOLS, THINKS_LAST):
        first, last = spans(render(template, turns, stops=()).completions[0])
        assert first.startswith("Let me see.<tool_call>")
        assert first.count("Oslo") == 2
        assert first.endswith("</tool_call><|im_end|>")
        assert last.endswith("It is warm.<|im_end|>")


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, {}, {"n": 4, "deep": [{"k": True}, "x"]}])
def test_a_call_without_text_is_found_although_the_template_rewrites_it_once_others_follow(
    render: Callable[..., Rendered], arguments: dict[str, Any]
) -> None:
    turn = calling("", {"type": "function", "function": {"name": "weather", "arguments": arguments}})
    rendered = render(THINKS_LAST, [turn, {"role": "tool", "content": "22 C"}, assistant("It is warm.")], stops=())
    first, _ = spans(rendered.completions[0])
    assert first.startswith("<tool_call>")
    assert first.endswith("</tool_call><|im_end|>")
    assert rendered.notes == ("history_rewritten", "thinking_empty")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("stops", [("<end_of_turn>",), (), None], ids=["a stop", "no stop", "unknown"])
def test_what_the_template_writes_behind_an_answer_is_its_end(
    render: Callable[..., Rendered], special: bool, stops: tuple[str, ...] | None
) -> None:
    tokens = ("<start_of_turn>", "<end_of_turn>")
    completion = render(GEMMA, TURNS, tokens=tokens, special=special, stops=stops).completions[0]
    assert spans(completion) == ["It is 1.<end_of_turn>", "That is 2.<end_of_turn>"]
    # Of an unknown model only the special tokens are taken for stops.
    assert completion.needs_eos == (stops == () or (stops is None and not special))


def test_an_end_of_several_tokens_is_trained_on_in_every_turn(render: Callable[..., Rendered]) -> None:
    completion = render(GEMMA.replace("<end_of_turn>", "\n### over ###"), TURNS, stops=()).completions[0]
    assert spans(completion) == ["It is 1.\n### over ###", "That is 2.\n### over ###"]
    assert completion.needs_eos


def test_the_end_of_a_conversation_is_not_that_of_a_turn(render: Callable[..., Rendered]) -> None:
    template = TOOLS.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
    completion = render(template, TURNS, stops=("<|endoftext|>",)).completions[0]
    assert spans(completion) == ["It is 1.<|im_end|>", "That is 2.<|im_end|>"]
    assert not completion.needs_eos


def test_an_end_that_stands_only_between_turns_is_that_of_the_last_one_too(render: Callable[..., Rendered]) -> None:
    template = TOOLS.replace("<|im_end|>", "{% if not loop.last or add_generation_prompt %}<|im_end|>{% endif %}")
    for stops in ((), None):
        completion = render(template, TURNS, stops=stops).completions[0]
        assert spans(completion) == ["It is 1.<|im_end|>", "That is 2.<|im_end|>"]
        assert not completion.needs_eos


@pytest.mark.parametrize("special", [True, False])
def test_the_marker_of_the_next_turn_is_the_end_where_the_model_stops_at_it(
    render: Callable[..., Rendered], special: bool
) -> None:
    tokens, stops = ("<|user|>", "<|assistant|>", "<|observation|>"), ("<|user|>", "<|observation|>")
    options: dict[str, Any] = {"tokens": tokens, "special": special, "stops": stops}
    turns = [calling("Wait."), {"role": "tool", "content": "22 C"}, *TURNS]
    rendered = render(GLM, turns, [calling("")], **options)
    first, second, third = spans(rendered.completions[0])
    assert first.endswith("</tool_call><|observation|>")
    assert (second, third) == ("It is 1.<|user|>", "That is 2.<|user|>")
    assert spans(rendered.completions[1])[0].endswith("</tool_call><|observation|>")
    assert not any(completion.needs_eos for completion in rendered.completions)
    assert rendered.notes == ("next_marker",)


def test_turns_that_nothing_ends_are_noted(render: Callable[..., Rendered]) -> None:
    rendered = render(GLM, TURNS, tokens=("<|user|>", "<|assistant|>"), stops=())
    assert spans(rendered.completions[0]) == ["It is 1.", "That is 2."]
    assert rendered.notes == ("turns_without_end",)
    turns = [calling("Wait."), {"role": "tool", "content": "22 C"}, assistant("It is warm.")]
    assert render(GLM, turns, tokens=("<|user|>", "<|assistant|>"), stops=()).notes == ("turns_without_end",)
    assert render(TOOLS, turns, stops=()).notes == ()


@pytest.mark.parametrize("drop", ["all calls", "arguments", "one argument", "other calls", "content"])
def test_a_field_that_the_template_leaves_out_rejects_the_row_by_its_name(
    render: Callable[..., Rendered], drop: str
) -> None:
    call = "<tool_call>{{ call.function | tojson }}</tool_call>"
    template, says = {
        "all calls": (TOOLS.replace(CALLS, ""), "tool_calls_dropped.*does not render tool_calls'"),
        "arguments": (TOOLS.replace(call, "<tool_call>{{ call.function.name }}</tool_call>"), "tool_calls'"),
        "one argument": (
            TOOLS.replace(
                call,
                "{{ call.function.name }} {{ call.function.arguments.items() | list | first }}",
            ),
            r"tool_calls\[0\]\.arguments\.days",
        ),
        "other calls": (TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), r"tool_calls\[1\]"),
        "content": (
            TOOLS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"),
            "content beside tool_calls",
        ),
    }[drop]
    arguments = {"city": "Oslo", "days": 3} if drop == "one argument" else {"city": "Oslo"}
    call_of = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turn = calling("Look:", call_of, *([CALL] if drop == "other calls" else []))
    with pytest.raises(Reject, match=says):
        render(template, turn, stops=())
    assert render(TOOLS, turn, stops=())


def test_calls_without_arguments_are_missed_too(render: Callable[..., Rendered]) -> None:
    turn = calling("", {"type": "function", "function": {"name": "w", "arguments": {}}})
    with pytest.raises(Reject, match="tool_calls_dropped"):
        render(TOOLS.replace(CALLS, ""), turn)


def test_context_that_the_template_leaves_out_rejects_the_row(render: Callable[..., Rendered]) -> None:
    prompt = [user("Weather?"), calling(""), {"role": "tool", "content": '22 "C"'}]
    answer = assistant("It is warm.")
    assert render(TOOLS, answer, prompt=prompt, loss_on="last").notes == ()
    quoted = TOOLS.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    assert render(quoted, answer, prompt=prompt).notes == ()
    with pytest.raises(Reject, match="tool_calls of an earlier turn"):
        render(TOOLS.replace(CALLS, ""), answer, prompt=prompt)
    with pytest.raises(Reject, match=r"content_dropped.*the tool.*s turn"):
        render(TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), answer, prompt=prompt)


def test_tools_and_names_that_the_template_leaves_out_reject_the_row(render: Callable[..., Rendered]) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
    with pytest.raises(Reject, match=r"tools_dropped.*the row.s tools"):
        render(TOOLS, assistant("a"), tools=[tool])
    named = assistant("a") | {"name": "Wren"}
    with pytest.raises(Reject, match="name_dropped"):
        render(TOOLS, named)
    with_names = TOOLS.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    assert spans(render(with_names, named, stops=()).completions[0])[0].endswith("a<|im_end|>")
    assert render(TOOLS, assistant("a"), prompt=[user("q") | {"name": "Wren"}]).notes == ("names_ignored",)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_in_a_key_of_its_own_is_counted_where_the_template_leaves_it_out(
    render: Callable[..., Rendered], key: str
) -> None:
    turn = assistant("2") | {key: "add one and one"}
    assert render(TOOLS, turn).notes == ("thinking_dropped",)
    writes = TOOLS.replace(
        "{{ m.content }}", f"{{% if m.{key} %}}<think>{{{{ m.{key} }}}}</think>{{% endif %}}{{{{ m.content }}}}"
    )
    rendered = render(writes, turn, stops=())
    assert spans(rendered.completions[0]) == ["<think>add one and one</think>2<|im_end|>"]
    assert rendered.notes == ()


def test_thinking_that_only_earlier_turns_lose_is_counted_only_where_those_are_trained_on(
    render: Callable[..., Rendered],
) -> None:
    first, asked, last = TURNS
    turns = [first | {"reasoning_content": "one"}, asked, last | {"reasoning_content": "two"}]
    assert "thinking_dropped" in render(THINKS_LAST, turns).notes
    assert render(THINKS_LAST, turns, loss_on="last").notes == ()


def test_arguments_are_written_as_json_text_for_a_template_that_takes_only_that(
    render: Callable[..., Rendered],
) -> None:
    template = TOOLS.replace("{{ call.function | tojson }}", "{{ call.function.name + call.function.arguments }}")
    assert (
        '<tool_call>weather{"city": "Oslo"}</tool_call><|im_end|>'
        in spans(render(template, calling("")).completions[0])[0]
    )


@pytest.mark.parametrize("written", ["{{ call.function.arguments }}", "{{ call.function.arguments | string | trim }}"])
def test_arguments_are_json_where_a_template_writes_them_as_they_are(
    render: Callable[..., Rendered], written: str
) -> None:
    arguments = {"city": "Zürich", "metric": True, "days": None, "deep": [{"k": "it's"}]}
    turn = calling("", {"type": "function", "function": {"name": "weather", "arguments": arguments}})
    rendered = render(TOOLS.replace("{{ call.function | tojson }}", "{{ call.function.name }} " + written), turn)
    expected = '{"city": "Zürich", "metric": true, "days": null, "deep": [{"k": "it\'s"}]}'
    assert spans(rendered.completions[0]) == [f"<tool_call>weather {expected}</tool_call><|im_end|>"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ call.function.name }}: {{ call.function.arguments | tojson }}", 'weather: {"city": "Oslo"}'),
        (
            "{{ call.function.name }}{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}"
            "{% endfor %}",
            "weather city=Oslo",
        ),
        ("{{ call.function }}", "{'name': 'weather', 'arguments': {'city': 'Oslo'}}"),
    ],
)
def test_arguments_stay_an_object_where_a_template_writes_them_in_its_own_way(
    render: Callable[..., Rendered], written: str, expected: str
) -> None:
    rendered = render(TOOLS.replace("{{ call.function | tojson }}", written), calling(""))
    assert spans(rendered.completions[0]) == [f"<tool_call>{expected}</tool_call><|im_end|>"]


def test_an_answer_of_nothing_but_ends_is_no_answer(render: Callable[..., Rendered]) -> None:
    with pytest.raises(Reject, match="nothing_to_learn"):
        render(TOOLS, assistant("<|im_end|>"))
    with pytest.raises(Reject, match="empty_answer"):
        render(TOOLS, "<|im_end|>\n", prompt="q")
    turns = [assistant(""), user("Well?"), assistant("Yes.")]
    assert render(TOOLS, turns).notes == ("empty_turns",)


@pytest.mark.parametrize(
    ("answer", "text", "needs_eos"),
    [
        ("Deep.<|end|>\n", "Deep.<|end|>", False),
        ("Deep. <|end|>\n<|im_end|>\n", "Deep. <|end|>", False),
        ("Deep.<|im_end|><|end|> \n", "Deep.", True),
        ("Deep.<|end|> or not ", "Deep.<|end|> or not ", True),
    ],
)
def test_an_answer_of_text_ends_once_at_the_stop_that_comes_first(
    render: Callable[..., Rendered], answer: str, text: str, needs_eos: bool
) -> None:
    rendered = render(None, answer, prompt="q", tokens=("<|end|>",), stops=("<|end|>",))  # type: ignore[arg-type]
    (completion,) = rendered.completions
    assert (completion.text, completion.needs_eos) == (text, needs_eos)
    assert rendered.notes == (() if needs_eos else ("stop_in_text",))
    unknown = render(None, answer, prompt="q", tokens=("<|end|>",)).completions[0]  # type: ignore[arg-type]
    assert unknown.needs_eos


def test_stops_and_openings_in_an_answer_are_text(render: Callable[..., Rendered]) -> None:
    rendered = render(
        GEMMA, assistant("a <end_of_turn> b <start_of_turn> c"), tokens=("<start_of_turn>", "<end_of_turn>")
    )
    assert "control_tokens" in rendered.notes
    (span,) = spans(rendered.completions[0])
    assert span.count("<end_of_turn>") == 1
    assert "<start_of_turn>" not in span


def test_a_long_run_of_stops_is_cut_in_no_time(render: Callable[..., Rendered]) -> None:
    assert render(TOOLS, "a" + "<|im_end|>\n" * 100_000, prompt="q").completions[0].text == "a"


SILENT = "{% for m in messages if m.role != 'tool' %}" + TOOLS.removeprefix("{% for m in messages %}")
FIRST_AND_LAST = "{% for m in messages if m.role != 'user' or m in (messages[0], messages[-1]) %}"


@pytest.mark.parametrize("result", ["ok", "yes", "look"])
def test_what_a_tool_returns_is_missed_although_others_say_the_same(
    render: Callable[..., Rendered], result: str
) -> None:
    prompt = [user("is it ok? look")]
    turns = [calling(""), {"role": "tool", "content": result}, assistant("yes, ok")]
    with pytest.raises(Reject, match=f"content of the tool's turn '{result}'"):
        render(SILENT, turns, prompt=prompt)
    with pytest.raises(Reject, match=f"content of the tool's turn '{result}'"):
        render(SILENT, turns[2:], prompt=prompt + turns[:2])
    assert len(spans(render(TOOLS, turns, prompt=prompt).completions[0])) == 2
    quoted = TOOLS.replace(
        "{{ m.content }}", "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    )
    turns[1]["content"] = '{"is": "ok"}\n'
    assert len(spans(render(quoted, turns, prompt=prompt).completions[0])) == 2


def test_what_a_user_says_is_missed_although_it_was_said_before(render: Callable[..., Rendered]) -> None:
    prompt = [user("ok, weather?"), assistant("Where?"), user("ok"), assistant("Sure?"), user("Oslo")]
    with pytest.raises(Reject, match="content of the user's turn 'ok'"):
        render(FIRST_AND_LAST + TOOLS.removeprefix("{% for m in messages %}"), assistant("22 C"), prompt=prompt)
    assert render(TOOLS, assistant("22 C"), prompt=prompt).notes == ()


def test_a_template_that_reads_what_a_tool_returns_may_refuse_other_results(render: Callable[..., Rendered]) -> None:
    strict = TOOLS.replace(
        "{{ m.content }}", "{% if m.role == 'tool' and m.content != 'ok' %}{{ 1 / 0 }}{% endif %}{{ m.content }}"
    )
    turns = [calling(""), {"role": "tool", "content": "ok"}, assistant("yes")]
    assert len(spans(render(strict, turns).completions[0])) == 2
