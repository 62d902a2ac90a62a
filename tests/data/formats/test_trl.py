from dataclasses import replace

import pytest
from format_samples import assistant, outcome, outcomes, pair, rated, rows, system, user

from dpoctl.data.formats import read
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
        "no_prompt",
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
