import json

import pytest
from format_samples import FIXTURES, assistant, rows, transcript, user

from dpoctl.data.formats import FORMATS, detect
from dpoctl.errors import DataError

EXPLICIT = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}


def test_every_format_has_a_fixture():
    assert FORMATS.keys() <= FIXTURES.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(rows(name)).format == name


def test_the_evidence_is_the_columns_that_tell_and_how_many_rows_fit():
    fixture = rows("helpsteer3")
    assert detect([*fixture] * 4 + [{"context": 1}])[:2] == (
        "helpsteer3",
        "columns context, overall_preference, response1, response2; 20 of the first 21 rows fit",
    )


def test_detection_bears_with_a_few_broken_rows_and_not_with_many():
    row = {"chosen": transcript(" q", " good"), "rejected": transcript(" q", " bad")}
    assert detect([row] * 19 + [{"chosen": None}]).format == "hh"
    with pytest.raises(DataError, match="no known format"):
        detect([row] * 8 + [{"chosen": None}] * 2)


def test_a_file_with_messages_beside_pairs_is_a_preference_file():
    row = EXPLICIT | {"messages": [user("q"), assistant("good")]}
    assert detect([row])[:2] == ("trl-explicit", "columns chosen, prompt, rejected; 1 of the first 1 rows fit")


def test_columns_that_could_mean_something_else_are_named():
    row = EXPLICIT | {"conversations": [{"from": "human", "value": "q"}]}
    row |= {"responses": [[assistant("x")], [assistant("y")]], "scores": [2, 1], "pairs": [[0, 1]]}
    assert detect([row]).evidence.endswith("; also possible: ranking")


def test_two_formats_that_fit_alike_are_not_guessed_between():
    row = {"messages": [user("q"), assistant("a")], "text": "<user>q<assistant>a"}
    with pytest.raises(DataError, match="messages, text fit messages and text alike") as error:
        detect([row])
    assert error.value.hint == "say --format messages or --format text (in a recipe, format: messages)"


def test_synonyms_apply_where_only_one_column_each_can_be_meant():
    assert detect([{"query": "q", "better": "a", "worse": "b"}] * 2)[:2] == (
        "generic",
        "query -> prompt, better -> chosen, worse -> rejected; 2 of the first 2 rows fit",
    )
    assert detect([{"prompt": "q", "winner": "a", "rejected": "b"}]).evidence.startswith("winner -> chosen;")


def test_synonyms_that_could_be_either_are_an_error_that_asks():
    with pytest.raises(DataError, match="prompt could be question or query") as error:
        detect([{"question": "q", "query": "r", "better": "a", "worse": "b"}])
    assert "--column-map prompt=question --column-map chosen=better --column-map rejected=worse" in error.value.hint


def test_rows_in_no_format_are_told_the_nearest_and_what_to_try():
    row = {"question": "q", "system": "", "chosen": "a", "reject_text": "b"}
    with pytest.raises(DataError, match="columns chosen, question, reject_text, system") as error:
        detect([row])
    assert error.value.hint == (
        "nearest are orca: no column 'rejected'; hh: no column 'rejected'; trl-implicit: no column 'rejected'; "
        "try --column-map prompt=question --column-map rejected=COLUMN "
        "(in a recipe, column_map: {prompt: question, rejected: COLUMN})"
    )


def test_a_column_that_holds_the_wrong_thing_is_named():
    with pytest.raises(DataError) as error:
        detect([EXPLICIT | {"prompt": 7}])
    assert error.value.hint.endswith("trl-explicit: prompt is a number, not text or messages")


def test_rows_without_columns_are_no_format():
    with pytest.raises(DataError, match="columns none"):
        detect([{}])


@pytest.mark.parametrize("name", FIXTURES)
def test_detection_does_not_change_rows(name):
    fixture = rows(name)
    before = json.dumps(fixture)
    detect(fixture)
    assert json.dumps(fixture) == before
