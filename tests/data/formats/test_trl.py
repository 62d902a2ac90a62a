import json
from dataclasses import replace

import pytest
from format_samples import FIXTURES, assistant, outcome, outcomes, pair, rated, rows, system, user

from dpoctl.data.formats import read
from dpoctl.data.formats.detect import detect
from dpoctl.data.formats.trl import canonical_rows
from dpoctl.data.records import Record, Reject

EXPLICIT = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
IMPLICIT = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
RANKING = {"prompt": "q", "responses": ["a", "b", "c"], "pairs": [[0, 1], [0, 2]]}


def test_explicit_pairs_are_text_or_messages_and_carry_tools_and_template_variables():
    dog, sky, cat, weather, image = outcomes("trl-explicit")
    assert dog == pair("Name a dog.", "Rex", "Tom", meta={"source": "pets", "row": 1})
    assert sky == Record("The sky is", (" blue.", " green."), ((0, 1),))
    assert cat == pair("Name a cat.", "Tom", "Rex")
    assert weather.tools[0]["function"]["name"] == "weather"
    assert weather.template_kwargs == {"enable_thinking": False}
    assert image == "unsupported_column"


def test_an_implicit_prompt_is_the_shared_messages():
    went_on = [assistant("Go away"), user("Why?"), assistant("Because")]
    assert outcomes("trl-implicit") == [
        pair("Name a sea.", "Baltic", "Alps"),
        pair([user("Hi"), assistant("Hello"), user("Bye")], "Goodbye", "No"),
        replace(pair("Hi", "Hello", ""), responses=([assistant("Hello")], went_on)),
        "wrong_shape",
    ]


def test_the_seven_pairs_of_the_first_tutorial_are_all_kept():
    found = [read("trl-explicit", row) for row in rows("seven-pairs")]
    assert [record.prompt for record in found] == [
        "hello",
        "how are you",
        "What is your name?",
        "What is your name?",
        "Which is the best programming language?",
        "Which is the best programming language?",
        "Which is the best programming language?",
    ]
    assert [record.responses for record in found[-3:]] == [("Python", "Javascript"), ("Python", "C++"), ("Java", "C++")]
    assert all(record.pairs == ((0, 1),) for record in found)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (" ", " b", "empty_answer"),
        (" a", "", "empty_answer"),
        (" a", " a", "identical_answers"),
        (" a  b", " a b\n", "identical_answers"),
    ],
)
def test_pairs_that_teach_nothing_are_rejected(chosen, rejected, expected):
    assert outcome("trl-explicit", {"prompt": "q", "chosen": chosen, "rejected": rejected}) == expected
    messages = {"prompt": [user("q")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert outcome("trl-explicit", messages) == expected


def test_an_answer_is_all_that_follows_where_conversations_part_through_its_last_turn():
    chosen = [user("q"), assistant("good"), user("thanks"), assistant("bye"), user("bye")]
    rejected = [user("q"), assistant("bad"), user("no"), assistant("sorry")]
    found = read("trl-implicit", {"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.responses) == ([user("q")], (chosen[1:4], rejected[1:]))


def test_conversations_that_differ_in_a_user_turn_are_rejected():
    row = {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    assert outcome("trl-implicit", row) == "prompts_differ"


def test_a_text_prompt_beside_whole_conversations_is_checked_and_not_repeated():
    row = IMPLICIT | {"prompt": "q"}
    assert read("trl-explicit", row) == read("trl-explicit", EXPLICIT)
    assert outcome("trl-explicit", row | {"prompt": "another"}) == "prompts_differ"


def test_a_text_prompt_with_message_answers_is_a_user_turn():
    assert read("trl-explicit", EXPLICIT | {"prompt": "q"}) == read("trl-explicit", EXPLICIT)


def test_message_prompts_that_answers_repeat_are_taken_once():
    assert read("trl-explicit", IMPLICIT | {"prompt": [user("q")]}) == read("trl-explicit", EXPLICIT)


def test_nulls_vanish_at_any_depth_and_tools_written_as_text_keep_theirs():
    message = {"role": "user", "content": "q", "tool_calls": None, "extra": {"a": None, "b": 1}}
    row = {"messages": [message, assistant("a")]}
    assert read("messages", row).prompt == [{"role": "user", "content": "q", "extra": {"b": 1}}]
    assert read("messages", row | {"tools": [{"name": "search", "default": None}]}).tools == [{"name": "search"}]
    as_text = row | {"tools": '[{"name": "search", "default": null}]'}
    assert read("messages", as_text).tools == [{"name": "search", "default": None}]


def called(arguments, **first):
    call = {"type": "function", "function": {"name": "book", "arguments": arguments}}
    return {"messages": [user("q") | first, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def arguments_of(row):
    (answer,) = read("messages", row).responses
    return answer[0]["tool_calls"][0]["function"]["arguments"]


def test_a_null_argument_is_a_value_unless_arrow_made_the_row():
    given = {"city": "Rome", "day": None, "more": {"wifi": None, "beds": [None, 2]}}
    assert arguments_of(called(given)) == given
    assert arguments_of(called(given, tool_calls=None)) == {"city": "Rome", "more": {"beds": [None, 2]}}
    pair = {"prompt": "q", "chosen": called(given)["messages"][1:], "rejected": [assistant("no")]}
    answers = [
        read("trl-explicit", pair | {"rejected": [assistant("no") | more]}) for more in ({}, {"tool_calls": None})
    ]
    found = [answer.responses[0][0]["tool_calls"][0]["function"]["arguments"] for answer in answers]
    assert found == [given, {"city": "Rome", "more": {"beds": [None, 2]}}]
    old = {"role": "assistant", "content": None, "function_call": {"name": "book", "arguments": given}}
    assert arguments_of({"messages": [user("q"), old]}) == given
    (written,) = canonical_rows(read("messages", called(given)))
    assert arguments_of(written) == given


def test_arguments_of_a_call_that_are_json_text_become_an_object_and_other_text_stays():
    def answer(arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return assistant("") | {"tool_calls": [call]}

    def understood(arguments):
        row = {"prompt": [user("q")], "chosen": [answer(arguments)], "rejected": [assistant("bad")]}
        return read("trl-explicit", row).responses[0]

    assert understood('{"city": "Bonn"}') == understood({"city": "Bonn"}) == [answer({"city": "Bonn"})]
    for odd in ("Bonn", "[1]", '{"city"'):
        assert understood(odd) == [answer(odd)]


FLAWED = {
    "half a character": ('{"k": "x\\ud800"}', "lone_surrogate", "half of a UTF-16 pair, which is not a character"),
    "NaN": ('{"k": NaN}', "bad_value", "NaN, a number that is not finite"),
    "a repeated key": ('{"k": 1, "k": 2}', "bad_value", "the key 'k' is repeated"),
    "deep": ('{"k":' + "[" * 150 + "]" * 150 + "}", "bad_value", "nested more than 100 levels deep"),
    "beyond Python": ('{"k":' + "[" * 90_000 + "]" * 90_000 + "}", "bad_value", "nested more than 100 levels deep"),
}


@pytest.mark.parametrize("flaw", FLAWED)
@pytest.mark.parametrize("name", ["arguments", "tools", "chat_template_kwargs", "function_call"])
def test_json_text_in_a_field_is_judged_as_a_row_is(name, flaw):
    text, reason, detail = FLAWED[flaw]
    row = {"messages": [user("q"), assistant("a")]}
    kind, where = "messages", name
    if name == "arguments":
        call = {"type": "function", "function": {"name": "weather", "arguments": text}}
        row, where = {"messages": [user("q"), assistant("") | {"tool_calls": [call]}]}, "messages, message 2: arguments"
    elif name == "function_call":
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]
        kind, row, where = "sharegpt", {"conversations": turns}, "conversations: a function_call"
    else:
        row[name] = f"[{text}]" if name == "tools" else text
    with pytest.raises(Reject) as error:
        read(kind, row)
    assert (error.value.reason, error.value.detail) == (reason, f"{where}: {detail}")


@pytest.mark.parametrize("tools", ["[", '{"name": "search"}', [7], {"name": "search"}])
def test_tools_that_are_no_list_of_objects_are_rejected(tools):
    assert outcome("messages", rows("messages")[0] | {"tools": tools}) == "bad_column"


def test_text_parts_are_joined_and_images_refused_by_name():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read("messages", {"messages": [user(parts), assistant("a")]}).prompt == [user("one two")]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Reject, match="image_url"):
        read("messages", {"messages": [user(image), assistant("a")]})


def test_a_conversation_is_split_before_the_first_answer_and_ends_with_the_last():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert read("messages", {"messages": [*turns, user("e")]}) == Record(turns[:1], (turns[1:],))


def test_a_greeting_that_nobody_asked_for_belongs_to_the_prompt():
    turns = [assistant("welcome"), user("a"), assistant("b")]
    assert read("messages", {"messages": turns}) == Record(turns[:2], (turns[2:],))


def test_conversations_keep_weights_and_tools():
    poet, painter, unanswered, weather = outcomes("messages")
    assert poet == Record([user("Name a poet.")], ([assistant("Rilke")],))
    silent = assistant("Hello") | {"weight": 0}
    assert painter == Record(
        [system("Be brief."), user("Hi")], ([silent, user("Name a painter."), assistant("Dürer")],)
    )
    assert unanswered == "no_assistant_turn"
    assert [turn["role"] for turn in weather.responses[0]] == ["assistant", "tool", "assistant"]
    assert weather.tools == rows("messages")[3]["tools"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("q")], "no_assistant_turn"),
        ([assistant("a")], "empty_prompt"),
        ([user("q"), assistant("  ")], "empty_answer"),
        ([{"role": "human", "content": "q"}, assistant("a")], "unknown_role"),
        ([{"role": "user"}, assistant("a")], "no_content"),
        ([{"content": "q"}, assistant("a")], "wrong_shape"),
        ([user(7), assistant("a")], "wrong_shape"),
        ("q", "wrong_shape"),
    ],
)
def test_conversations_that_cannot_be_learned_from_are_rejected(messages, expected):
    assert outcome("messages", {"messages": messages}) == expected


@pytest.mark.parametrize("prompt", ["", "  ", []])
def test_an_empty_prompt_is_rejected(prompt):
    assert outcome("prompt-completion", {"prompt": prompt, "completion": "a"}) == "empty_prompt"


def test_a_completion_may_be_labelled():
    assert outcomes("prompt-completion") == [
        Record("The sea is", (" deep.",)),
        Record([user("Name a port.")], ([assistant("Kiel")],), label=True),
        Record([user("Name a ship.")], ([assistant("Rome")],), label=False),
        Record("Name a mast.", ("Main",)),
    ]
    assert outcome("prompt-completion", {"prompt": "q", "completion": "a", "label": 1}) == "bad_label"


def test_finished_text_is_learned_as_it_stands():
    assert outcomes("text") == [
        Record("", ("<|user|>Hi<|assistant|>Hello",)),
        Record("", ("Once upon a time.",)),
        "empty_answer",
        Record("", ("The end.",)),
    ]


def test_a_ranking_has_pairs_or_scores_and_perhaps_a_target():
    language, number, tree, *others = outcomes("ranking")
    assert language == Record("Best language?", ("Python", "C++", "Javascript"), ((0, 1), (0, 2)), target=0)
    expected = rated("Name a number.", ("One", 3), ("Red", -1.5), ("Two", 2))
    assert (number.prompt, number.responses, number.scores) == (expected.prompt, expected.responses, expected.scores)
    assert number.preferred().responses == ([assistant("Two")],)
    assert tree == pair("Name a tree.", "Oak", "Car", scores=(5, 2))
    assert others == ["bad_scores", "bad_pairs"]


@pytest.mark.parametrize("pairs", [[], [[0, 3]], [[1, 1]], [[0]], [[True, 0]], [["0", "1"]]])
def test_a_ranking_needs_pairs_of_its_own_responses(pairs):
    assert outcome("ranking", RANKING | {"pairs": pairs}) == "bad_pairs"


@pytest.mark.parametrize("target", ["d", 3, -1, True])
def test_a_target_is_one_of_the_responses(target):
    assert outcome("ranking", RANKING | {"sft_target": target}) == "bad_target"


@pytest.mark.parametrize("scores", [[1], [1, 2, "high"], [1, 2, None], "321"])
def test_scores_are_one_number_a_response(scores):
    assert outcome("ranking", RANKING | {"scores": scores}) in ("bad_scores", "bad_score")


def test_the_demonstration_in_a_preference_is_its_chosen_answer():
    assert read("trl-explicit", EXPLICIT).preferred().responses == ([assistant("good")],)
    with pytest.raises(Reject, match="unbeaten"):
        read("ranking", RANKING | {"pairs": [[0, 1], [2, 1]]}).preferred()
    with pytest.raises(Reject, match="bad"):
        read("prompt-completion", {"prompt": "q", "completion": "a", "label": False}).preferred()


def test_columns_with_other_names_are_read_as_prompt_chosen_and_rejected():
    assert outcomes("generic") == [
        Record("Name a lake.", ("Como", "Etna"), ((0, 1),)),
        Record("Name a hill.", ("Etna", "Como"), ((0, 1),)),
        "empty_answer",
    ]


WRITTEN = Record("q", ("a", "b", "c"), ((0, 1), (0, 2)), scores=(3.0, 2.5, 1.0), target=2)


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", FIXTURES)
def test_canonical_rows_are_written_again_as_they_are(name, split):
    source = detect(rows(name)).format
    records = [found for row in rows(name) if isinstance(found := outcome(source, row), Record)]
    assert records
    for record in records:
        for row in through_json(canonical_rows(record, split=split)):
            again = read(detect([row]).format, row)
            assert through_json(canonical_rows(again, split=split)) == [row]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_canonical_row_means_the_same_record(name):
    source = detect(rows(name)).format
    for record in (found for row in rows(name) if isinstance(found := outcome(source, row), Record)):
        (row,) = through_json(canonical_rows(record, split=False))
        assert through_json(read(detect([row]).format, row).to_fields()) == through_json(record.to_fields())


def test_a_ranking_becomes_one_row_a_pair_with_its_margin():
    assert canonical_rows(WRITTEN) == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "meta": {"margin": 0.5}},
        {"prompt": "q", "chosen": "a", "rejected": "c", "meta": {"margin": 2.0}},
    ]


def test_a_ranking_can_stay_one_row():
    expected = {"pairs": [[0, 1], [0, 2]], "scores": [3.0, 2.5, 1.0], "sft_target": 2}
    assert canonical_rows(WRITTEN, split=False) == [{"prompt": "q", "responses": ["a", "b", "c"]} | expected]


def test_rated_answers_without_pairs_stay_one_row():
    one, two = [assistant("1")], [assistant("2")]
    (row,) = canonical_rows(rated("q", ("1", 4.0), ("2", 3.0)))
    assert row == {"prompt": [user("q")], "responses": [one, two], "scores": [4.0, 3.0]}
    (alone,) = canonical_rows(rated("q", ("1", 4.0)))
    assert alone == {"prompt": [user("q")], "responses": [one], "scores": [4.0]}


def test_meta_tools_and_template_variables_are_columns():
    record = pair(
        "q", "a", "b", tools=[{"name": "x"}], template_kwargs={"think": True}, meta={"id": 7}, scores=(2.0, 1.0)
    )
    (row,) = canonical_rows(record)
    assert list(row) == ["prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "meta"]
    assert row["tools"] == [{"name": "x"}]
    assert row["chat_template_kwargs"] == {"think": True}
    assert row["meta"] == {"id": 7, "margin": 1.0}


def test_only_the_tied_pairs_of_a_record_with_a_tie_are_marked():
    record = Record("q", ("a", "b", "c"), ((0, 1), (0, 2)), scores=(2.0, 2.0, 1.0), meta={"tie": True})
    assert [row["meta"] for row in canonical_rows(record)] == [
        {"margin": 0.0, "tie": True},
        {"margin": 1.0, "tie": False},
    ]


def test_a_demonstration_is_messages_or_the_text_that_it_was():
    assert canonical_rows(Record([user("q")], ([assistant("a")],))) == [{"messages": [user("q"), assistant("a")]}]
    assert canonical_rows(Record("q", ("a",))) == [{"prompt": "q", "completion": "a"}]
    assert canonical_rows(Record("", ("a b",))) == [{"text": "a b"}]
    assert canonical_rows(Record("q", ("a",), label=False)) == [{"prompt": "q", "completion": "a", "label": False}]


@pytest.mark.parametrize("opening", [[], [assistant("welcome")], [system("be brief"), assistant("welcome")]])
def test_a_demonstration_is_messages_where_they_would_be_split_at_the_same_place(opening):
    record = Record([*opening, user("q")], ([assistant("a"), user("r"), assistant("b")],))
    (row,) = canonical_rows(record)
    assert row == {"messages": record.prompt + record.responses[0]}
    assert read("messages", row) == record
    later = Record([*opening, user("q"), assistant("a"), user("r")], ([assistant("b")],))
    (row,) = canonical_rows(later)
    assert row == {"prompt": later.prompt, "completion": later.responses[0]}
    assert read("prompt-completion", row) == later
