import json
from pathlib import Path

import pytest

from dpoctl.data.formats import read
from dpoctl.data.formats.detect import detect
from dpoctl.data.records import Record, Reject

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("sharegpt", "alpaca", "capybara-conversation", "prompt-response", "llamafactory-kto")


def rows(name):
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def records(name):
    """The record of each row of a fixture, or the reason why there is none."""
    return [outcome(name, row) for row in rows(name)]


def outcome(name, row):
    try:
        return read(name, row)
    except Reject as reject:
        return reject.reason


def turn(role):
    return lambda text, **more: {"role": role, "content": text} | more


system, user, assistant, tool = map(turn, ("system", "user", "assistant", "tool"))


def demonstration(prompt, *answer, **fields):
    return Record(prompt, (list(answer),), **fields)


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(rows(name))[0] == name


def test_sharegpt_turns_become_messages_and_function_calls_tool_calls():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert records("sharegpt") == [
        demonstration([user("Hi?")], assistant("Hello.")),
        demonstration([system("Be brief."), user("One?")], assistant("1"), user("Two?"), assistant("2")),
        demonstration(
            [system("Use tools."), user("Weather?")],
            assistant("", tool_calls=[call]),
            tool("rain"),
            assistant("It rains."),
            tools=[{"type": "function", "function": {"name": "weather"}}],
        ),
        "no_assistant_turn",
        "unknown_role",
    ]


def test_the_systems_turn_in_a_conversation_rules_out_the_one_beside_it():
    row = rows("sharegpt")[1] | {"system": "Be long."}
    assert read("sharegpt", row).prompt == [system("Be brief."), user("One?")]


def test_alpaca_input_joins_the_users_turn_and_history_is_not_learned():
    history = [user("Go?"), assistant("No."), user("Why?"), assistant("Because.")]
    assert records("alpaca") == [
        demonstration([user("Translate to French.\nGood day.")], assistant("Bonjour.")),
        demonstration([user("Say hi.")], assistant("Hi.")),
        demonstration([system("Be terse."), *history, user("And now?")], assistant("Later.")),
        "empty_prompt",
        "empty_answer",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"history": [["one"]]}, "bad_history"),
        ({"history": "one"}, "bad_history"),
        ({"output": ["a", "b"]}, "wrong_shape"),
        ({"input": None, "system": None, "history": None}, demonstration([user("Say hi.")], assistant("Hi."))),
    ],
)
def test_alpaca_columns_are_what_they_should_be(change, expected):
    assert outcome("alpaca", rows("alpaca")[1] | change) == expected


def test_every_output_of_a_capybara_conversation_is_learned():
    assert records("capybara-conversation") == [
        demonstration([user("One?")], assistant("1"), user("Two?"), assistant("2")),
        demonstration([user("Hi?")], assistant("Hello.")),
        "no_assistant_turn",
        "empty_answer",
    ]


def test_a_prompt_and_a_response_stay_plain_text():
    assert records("prompt-response") == [
        Record("1+1?", ("2",)),
        Record("2+2?", ("4",)),
        "empty_prompt",
        "empty_answer",
    ]


def test_a_prompt_and_a_response_may_be_messages_and_have_a_label():
    row = {"query": [user("q")], "answer": "a", "label": True}
    assert read("prompt-response", row) == demonstration([user("q")], assistant("a"), label=True)


@pytest.mark.parametrize("row", [{"prompt": "q", "question": "q", "response": "a"}, {"prompt": "q"}, {"answer": "a"}])
def test_columns_are_not_guessed_where_several_or_none_could_be_meant(row):
    assert outcome("prompt-response", row) == "wrong_shape"


def test_llamafactory_feedback_is_on_the_last_answer():
    assert records("llamafactory-kto") == [
        demonstration([user("Hi?")], assistant("Hello."), label=True),
        demonstration([user("Hi?")], assistant("Go away."), label=False),
        demonstration([system("Be brief."), user("One?"), assistant("1"), user("Two?")], assistant("3"), label=False),
        "no_final_answer",
    ]


def test_llamafactory_feedback_may_be_on_messages():
    row = {"messages": [user("Hi?"), assistant("Hello.")], "label": False}
    assert detect([row])[0] == "llamafactory-kto"
    assert read("llamafactory-kto", row) == demonstration([user("Hi?")], assistant("Hello."), label=False)


def test_a_class_label_beside_messages_is_no_feedback():
    assert detect([{"messages": [user("Hi?"), assistant("Hello.")], "label": 3}])[0] == "messages"


def test_kto_mix_is_a_prompt_and_a_completion_with_a_label():
    row = {
        "dataset": "capybara",
        "prompt": [user("One?"), assistant("1"), user("Two?")],
        "completion": [assistant("2")],
        "label": True,
        "rating": 5.0,
    }
    assert detect([row])[0] == "prompt-completion"
    assert read("prompt-completion", row) == demonstration(row["prompt"], assistant("2"), label=True)


def test_openai_files_are_messages_with_weights_tools_and_developers():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            user("One?"),
            assistant("1", weight=0),
            user("Two?"),
            assistant("2", weight=1),
        ],
        "tools": tools,
        "parallel_tool_calls": False,
    }
    assert detect([row])[0] == "messages"
    answer = (assistant("1", weight=0), user("Two?"), assistant("2", weight=1))
    assert read("messages", row) == demonstration([system("Be brief."), user("One?")], *answer, tools=tools)


def test_a_function_call_of_earlier_apis_is_a_tool_call():
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    row = {"messages": [user("Weather?"), {"role": "assistant", "content": None, "function_call": function}]}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert read("messages", row) == demonstration([user("Weather?")], assistant("", tool_calls=[call]))


def test_ultrachat_is_messages():
    row = {"prompt": "Hi?", "prompt_id": "x", "messages": [user("Hi?"), assistant("Hello.")]}
    assert detect([row])[0] == "messages"
    assert read("messages", row) == demonstration([user("Hi?")], assistant("Hello."))
