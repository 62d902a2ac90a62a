import json

import pytest

from dpoctl.data.formats import FORMATS, canonical_row, detect, read
from dpoctl.data.records import Record, Reject
from dpoctl.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def transcript(*turns):
    return "".join(f"\n\n{('HA'[i % 2] == 'H' and 'Human') or 'Assistant'}:{turn}" for i, turn in enumerate(turns))


SAMPLES = {
    "hh": {"chosen": transcript(" q", " good"), "rejected": transcript(" q", " bad")},
    "trl-explicit": {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "ranking": {"prompt": "q", "responses": ["a", "b", "c"], "pairs": [[0, 1], [0, 2]]},
    "trl-implicit": {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
    "prompt-completion": {"prompt": "q", "completion": "good"},
    "messages": {"messages": [user("q"), assistant("good")]},
}


def reason(name, row):
    with pytest.raises(Reject) as error:
        read(name, row)
    return error.value.reason


def test_every_format_has_a_sample():
    assert SAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_by_its_rows(name):
    assert detect([SAMPLES[name]] * 3)[0] == name


@pytest.mark.parametrize("name", FORMATS)
def test_a_canonical_row_means_the_same_record(name):
    record = read(name, SAMPLES[name])
    row = json.loads(json.dumps(canonical_row(record)))
    assert read(detect([row])[0], row) == record


def test_detection_names_the_columns_when_nothing_fits():
    with pytest.raises(DataError, match="columns better, question, worse"):
        detect([{"question": "q", "better": "a", "worse": "b"}])


def test_detection_bears_with_a_few_broken_rows():
    assert detect([SAMPLES["hh"]] * 19 + [{"chosen": None}])[0] == "hh"


def test_a_file_with_messages_beside_pairs_is_a_preference_file():
    assert detect([SAMPLES["trl-explicit"] | SAMPLES["messages"]])[0] == "trl-explicit"


def test_hh_answers_are_whole_remainders_and_keep_their_blanks():
    prefix = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record = read("hh", {"chosen": prefix + " x\n\ny ", "rejected": prefix + " x z"})
    assert record == Record(prefix, (" x\n\ny ", " x z"), ((0, 1),))


def test_hh_answers_with_a_common_start_are_not_split_by_characters():
    record = read("hh", {"chosen": transcript(" q", " I am sure"), "rejected": transcript(" q", " I am not")})
    assert record.responses == (" I am sure", " I am not")


def test_hh_markers_inside_a_line_do_not_split():
    side = "\n\nHuman: hi  Human: you\nAssistant: me\n\nAssistant:"
    assert read("hh", {"chosen": side + " a", "rejected": side + " b"}).prompt == side


def test_hh_is_cut_at_the_first_differing_turn_of_the_assistant():
    chosen = transcript(" q", " good", " more", " even better")
    rejected = transcript(" q", " bad", " what", " worse")
    assert read("hh", {"chosen": chosen, "rejected": rejected}) == read("hh", SAMPLES["hh"])


def test_hh_is_rejected_where_the_human_turns_differ():
    chosen, rejected = transcript(" q", " a", " one", " x"), transcript(" q", " a", " two", " y")
    assert reason("hh", {"chosen": chosen, "rejected": rejected}) == "prompts_differ"


def test_hh_is_rejected_where_one_side_is_the_start_of_the_other():
    chosen, rejected = transcript(" q", " a"), transcript(" q", " a", " b", " c")
    assert reason("hh", {"chosen": chosen, "rejected": rejected}) == "prompts_differ"


def test_hh_is_rejected_when_a_human_has_the_last_word():
    assert (
        reason("hh", {"chosen": transcript(" q", " a", " b"), "rejected": transcript(" q", " c")}) == "no_final_answer"
    )


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
    assert reason("hh", {"chosen": transcript(" q", chosen), "rejected": transcript(" q", rejected)}) == expected
    assert reason("trl-explicit", {"prompt": "q", "chosen": chosen, "rejected": rejected}) == expected
    messages = {"prompt": [user("q")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert reason("trl-explicit", messages) == expected


def test_two_plain_texts_without_a_prompt_are_refused():
    assert reason("trl-implicit", {"chosen": "q? yes", "rejected": "q? no"}) == "no_prompt"
    assert detect([{"chosen": "q? yes", "rejected": "q? no"}])[0] == "trl-implicit"


def test_an_implicit_prompt_is_the_shared_messages():
    head = [user("a"), assistant("b"), user("c")]
    record = read("trl-implicit", {"chosen": [*head, assistant("x")], "rejected": [*head, assistant("y")]})
    assert record == Record(head, ([assistant("x")], [assistant("y")]), ((0, 1),))


def test_later_user_turns_never_become_part_of_an_answer():
    chosen = [user("q"), assistant("good"), user("thanks"), assistant("bye")]
    rejected = [user("q"), assistant("bad"), user("no"), assistant("sorry")]
    record = read("trl-implicit", {"chosen": chosen, "rejected": rejected})
    assert record.responses == ([assistant("good")], [assistant("bad")])


def test_conversations_that_differ_in_a_user_turn_are_rejected():
    row = {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    assert reason("trl-implicit", row) == "prompts_differ"


def test_a_text_prompt_beside_whole_conversations_is_checked_and_not_repeated():
    row = SAMPLES["trl-implicit"] | {"prompt": "q"}
    assert read("trl-explicit", row) == read("trl-explicit", SAMPLES["trl-explicit"])
    assert reason("trl-explicit", row | {"prompt": "another"}) == "prompts_differ"


def test_a_text_prompt_with_message_answers_is_a_user_turn():
    row = {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert read("trl-explicit", row) == read("trl-explicit", SAMPLES["trl-explicit"])


def test_message_prompts_that_answers_repeat_are_taken_once():
    row = SAMPLES["trl-implicit"] | {"prompt": [user("q")]}
    assert read("trl-explicit", row) == read("trl-explicit", SAMPLES["trl-explicit"])


def test_nulls_inside_messages_vanish_at_any_depth():
    message = {"role": "user", "content": "q", "tool_calls": None, "extra": {"a": None, "b": 1}}
    record = read("messages", {"messages": [message, assistant("a")]})
    assert record.prompt == [{"role": "user", "content": "q", "extra": {"b": 1}}]


def test_text_parts_are_joined_and_images_refused_by_name():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    record = read("messages", {"messages": [user(parts), assistant("a")]})
    assert record.prompt == [user("one two")]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Reject, match="image_url"):
        read("messages", {"messages": [user(image), assistant("a")]})


def test_a_conversation_is_split_before_the_first_answer_and_ends_with_the_last():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert read("messages", {"messages": [*turns, user("e")]}) == Record(turns[:1], (turns[1:],))


def test_a_greeting_that_nobody_asked_for_belongs_to_the_prompt():
    turns = [assistant("welcome"), user("a"), assistant("b")]
    assert read("messages", {"messages": turns}) == Record(turns[:2], (turns[2:],))


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
    assert reason("messages", {"messages": messages}) == expected


@pytest.mark.parametrize("prompt", ["", "  ", []])
def test_an_empty_prompt_is_rejected(prompt):
    assert reason("prompt-completion", {"prompt": prompt, "completion": "a"}) == "empty_prompt"


def test_a_label_must_be_true_or_false():
    row = {"prompt": "q", "completion": "a"}
    assert read("prompt-completion", row | {"label": False}).label is False
    assert reason("prompt-completion", row | {"label": 1}) == "bad_label"


@pytest.mark.parametrize("pairs", [[], [[0, 3]], [[1, 1]], [[0]], [[True, 0]], [["0", "1"]]])
def test_a_ranking_needs_pairs_of_its_own_responses(pairs):
    assert reason("ranking", SAMPLES["ranking"] | {"pairs": pairs}) == "bad_pairs"


def test_a_ranking_of_one_pair_among_three_keeps_its_responses():
    record = read("ranking", SAMPLES["ranking"] | {"pairs": [[2, 0]]})
    assert canonical_row(record) == SAMPLES["ranking"] | {"pairs": [[2, 0]]}


def test_columns_that_would_change_what_is_trained_on_are_not_ignored():
    row = SAMPLES["messages"] | {"tools": [{"name": "search"}]}
    assert reason("messages", row) == "unsupported_column"
    assert read("messages", row | {"tools": []})


def test_the_demonstration_in_a_preference_is_its_chosen_answer():
    assert read("hh", SAMPLES["hh"]).preferred().responses == (" good",)
    with pytest.raises(Reject, match="unbeaten"):
        read("ranking", SAMPLES["ranking"] | {"pairs": [[0, 1], [2, 1]]}).preferred()
    with pytest.raises(Reject, match="bad"):
        read("prompt-completion", SAMPLES["prompt-completion"] | {"label": False}).preferred()
