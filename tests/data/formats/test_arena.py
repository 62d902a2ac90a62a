import csv
import json
from pathlib import Path

import pytest

from dpoctl.data.formats import detect, read
from dpoctl.data.records import Record, Reject

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("arena-55k", "arena-100k", "arena-140k")


def rows(name):
    if name == "arena-55k":
        with (FIXTURES / "arena-55k.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def outcome(name, row, **options):
    """The record of a row, or the reason why there is none."""
    try:
        return read(name, row, options)
    except Reject as reject:
        return reject.reason


def pair(prompt, chosen, rejected):
    history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Record(history, tuple([{"role": "assistant", "content": text}] for text in (chosen, rejected)), ((0, 1),))


HELLO = pair("Hi?", "Hello.", "Go away.")


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(rows(name))[0] == name


def test_55k_rows_are_json_inside_csv():
    assert [outcome("arena-55k", row) for row in rows("arena-55k")] == [
        HELLO,
        "tie",
        pair("One?", "uno", "1"),
        "empty_answer",
        pair('Quote "this", please.\nNow.', '"this"', "this"),
        "bad_winner",
    ]


def test_100k_votes_of_several_turns_count_for_the_first_answers_that_differ():
    history = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    assert [outcome("arena-100k", row) for row in rows("arena-100k")] == [
        HELLO,
        "tie",
        "both_bad",
        pair("One?", "1", "uno"),
        pair(history, "2", "zwei"),
    ]


def test_140k_contents_are_parts_and_images_cannot_be_used():
    assert [outcome("arena-140k", row) for row in rows("arena-140k")] == [
        HELLO,
        "both_bad",
        "tie",
        "not_text",
        pair("One?", "uno", "1"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_votes_of_several_turns_can_be_left_out(name):
    outcomes = [outcome(name, row, multi_turn="reject") for row in rows(name)]
    expected = [outcome(name, row) for row in rows(name)]
    several = {"arena-55k": [2], "arena-100k": [3, 4], "arena-140k": [4]}[name]
    assert outcomes == ["multi_turn" if index in several else found for index, found in enumerate(expected)]


@pytest.mark.parametrize("winner", ["model_c", None, ["model_a"]])
def test_a_winner_nobody_knows_is_rejected(winner):
    assert outcome("arena-100k", rows("arena-100k")[0] | {"winner": winner}) == "bad_winner"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"response_a": "Hello."}, "wrong_shape"),
        ({"response_a": "[1]"}, "wrong_shape"),
        ({"response_a": '["a", "b"]'}, "roles_out_of_order"),
        ({"response_a": '["\\ud83d"]'}, "lone_surrogate"),
        ({"response_a": '["\\ud83d\\ude00"]'}, pair("Hi?", "\N{GRINNING FACE}", "Go away.")),
        ({"winner_tie": "maybe"}, "bad_winner"),
        ({"winner_tie": 1}, "bad_winner"),
        ({"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, HELLO),
    ],
)
def test_55k_columns_are_what_they_should_be(change, expected):
    assert outcome("arena-55k", rows("arena-55k")[0] | change) == expected
