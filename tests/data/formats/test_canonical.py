import json

import pytest
from format_samples import FIXTURES, assistant, outcome, pair, rated, rows, user

from dpoctl.data.formats import canonical_rows, detect, read
from dpoctl.data.records import Record

RANKING = Record("q", ("a", "b", "c"), ((0, 1), (0, 2)), scores=(3.0, 2.5, 1.0), target=2)


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
    assert canonical_rows(RANKING) == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "meta": {"margin": 0.5}},
        {"prompt": "q", "chosen": "a", "rejected": "c", "meta": {"margin": 2.0}},
    ]


def test_a_ranking_can_stay_one_row():
    expected = {"pairs": [[0, 1], [0, 2]], "scores": [3.0, 2.5, 1.0], "sft_target": 2}
    assert canonical_rows(RANKING, split=False) == [{"prompt": "q", "responses": ["a", "b", "c"]} | expected]


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
