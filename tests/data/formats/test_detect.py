import json
import re
from pathlib import Path

import pytest
from format_samples import FIXTURES, assistant, outcomes, rows, transcript, user

from dpoctl.data.formats import FORMATS, TEXT_FORMATS, read
from dpoctl.data.formats.detect import check_options, detect, list_formats, options_of
from dpoctl.data.records import Record
from dpoctl.errors import DataError, UsageError

EXPLICIT = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


def test_every_format_has_a_fixture():
    assert FORMATS.keys() <= FIXTURES.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(rows(name)).format == name


def test_the_evidence_is_the_columns_that_tell_and_how_many_rows_fit():
    fixture = rows("helpsteer3")
    assert detect([*fixture] * 4 + [{"context": 1}])[:2] == (
        "helpsteer3",
        "columns context, overall_preference, response1, response2; 20 of the first 21 rows fit, "
        "row 21 does not: column 'overall_preference' is missing or empty",
    )


def test_half_of_the_rows_decide_and_the_first_of_the_others_is_told():
    row = {"chosen": transcript(" q", " good"), "rejected": transcript(" q", " bad")}
    found = detect([row] * 2 + [row | {"chosen": 3}, {"other": 1}], ["line 1", "line 2", "line 4", "line 5"])
    assert found.format == "hh"
    assert found.evidence.endswith("2 of the first 4 rows fit, line 4 does not: chosen is a number, not text")
    with pytest.raises(DataError, match="no known format fits half of the first 5 rows") as error:
        detect([row] * 2 + [row | {"chosen": 3}] * 3)
    assert "closest formats: hh (2 of 5 rows fit; row 3: chosen is a number, not text)" in error.value.hint
    assert "--format hh reads those that fit" in error.value.hint


@pytest.mark.parametrize(
    "changed",
    [
        [EXPLICIT | {"chosen": None}, {"other": 1}],
        [EXPLICIT | {"prompt": ["q"]}, EXPLICIT | {"rejected": 5}, EXPLICIT | {"chosen": assistant("x")}],
        [EXPLICIT | {"rejected": [assistant("a") | {"content": {"text": "a"}}]}],
    ],
)
def test_a_few_rows_of_another_shape_do_not_decide(changed):
    assert detect(changed + [EXPLICIT] * 5).format == "trl-explicit"


def test_a_value_of_the_wrong_shape_in_every_row_is_the_reason():
    turns = [user("q"), {"role": "tool", "content": {"degrees": 21}}, assistant("a")]
    with pytest.raises(DataError, match="columns messages, tools") as error:
        detect([{"messages": turns, "tools": []}] * 5)
    assert error.value.hint.startswith("closest formats: messages (row 1: messages, message 2: content is an object)")
    assert "--column-map" not in error.value.hint


def test_rows_of_another_format_are_told():
    conversation = {"messages": [user("q"), assistant("a")]}
    found = detect([EXPLICIT] * 6 + [conversation] * 4)
    assert found.format == "trl-explicit"
    assert found.evidence.endswith("; 4 of the others fit messages")
    with pytest.raises(DataError, match="5 of the first 10 rows fit trl-explicit, and 5 others fit messages"):
        detect([EXPLICIT, conversation] * 5)


def test_a_file_with_messages_beside_pairs_is_a_preference_file():
    row = EXPLICIT | {"messages": [user("q"), assistant("good")]}
    assert detect([row])[:2] == ("trl-explicit", "columns chosen, prompt, rejected; 1 of the first 1 rows fit")


def test_columns_that_could_mean_something_else_are_named():
    row = EXPLICIT | {"conversations": [{"from": "human", "value": "q"}]}
    row |= {"responses": [[assistant("x")], [assistant("y")]], "scores": [2, 1], "pairs": [[0, 1]]}
    assert detect([row]).evidence.endswith("; also possible: ranking")


def test_two_formats_that_fit_alike_are_not_guessed_between():
    row = {"messages": [user("q"), assistant("a")], "text": "<user>q<assistant>a"}
    with pytest.raises(DataError, match="messages, text fit messages and text equally well") as error:
        detect([row])
    assert error.value.hint == "set --format messages or --format text (in a recipe, format: messages)"


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
        "closest formats: orca (no column 'rejected'), trl-implicit (no column 'rejected'), hh (no column 'rejected'); "
        "try --column-map prompt=question --column-map rejected=COLUMN "
        "(in a recipe, column_map: {prompt: question, rejected: COLUMN})"
    )


def test_a_column_that_holds_the_wrong_thing_is_named():
    with pytest.raises(DataError) as error:
        detect([EXPLICIT | {"prompt": 7}])
    assert error.value.hint.startswith(
        "closest formats: trl-explicit (row 1: prompt is a number, not text or messages)"
    )


def test_rows_without_columns_are_no_format():
    with pytest.raises(DataError, match="columns none"):
        detect([{}])


@pytest.mark.parametrize("name", FIXTURES)
def test_detection_does_not_change_rows(name):
    fixture = rows(name)
    before = json.dumps(fixture)
    detect(fixture)
    assert json.dumps(fixture) == before


def test_options_are_listed_with_their_types_and_defaults():
    options = options_of("pku")
    assert {name: (option.choices, option.default) for name, option in options.items()} == {
        "dimension": (("better", "safer"), "better"),
        "require_chosen_safe": ((), False),
    }
    assert options["require_chosen_safe"].type is bool
    assert options_of("orca") == {}


def test_the_list_of_formats_names_every_option_with_its_default():
    lines = list_formats().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(FORMATS)
    assert lines[lines.index(next(line for line in lines if line.startswith("shp "))) + 1] == (
        "    --option min_score_ratio=float (default 0)"
    )
    assert sum(line.startswith("    --option ") for line in lines) == sum(len(options_of(name)) for name in FORMATS)


def test_the_documents_list_every_format():
    table = DOCUMENT.read_text(encoding="utf-8").partition("| rows | `format` |")[2].partition("\n\n")[0]
    assert [name for name in FORMATS if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", [name for name in FORMATS if options_of(name)])
def test_the_documents_list_every_option_with_its_default(name):
    table = DOCUMENT.read_text(encoding="utf-8").partition("| format | option |")[2].partition("\n\n")[0]
    rows = {}
    for line in table.splitlines()[2:]:
        formats, option, default, _ = line.strip("| ").split(" | ")
        key, *values = re.findall(r"`(\w+)`", option)
        rows |= {(one, key): (values, default.strip("`")) for one in re.findall(r"`([\w-]+)`", formats)}
    for option in options_of(name).values():
        default = str(option.default).lower() if isinstance(option.default, bool) else str(option.default)
        assert rows[name, option.name] == (list(option.choices), default)


@pytest.mark.parametrize("name", FORMATS)
def test_the_defaults_of_a_format_are_values_that_it_takes(name):
    check_options(name, {option.name: option.default for option in options_of(name).values()})


def test_an_unknown_option_is_told_the_ones_there_are():
    with pytest.raises(UsageError, match="format pku has no option 'dimensions'") as error:
        check_options("pku", {"dimensions": "safer"})
    assert error.value.hint == (
        "pku takes dimension=better|safer (default better), require_chosen_safe=bool (default false)"
    )
    with pytest.raises(UsageError, match="orca takes no options"):
        check_options("orca", {"strip": True})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pku", {"dimension": "safest"}),
        ("pku", {"dimension": ["safer"]}),
        ("pku", {"require_chosen_safe": 1}),
        ("shp", {"min_score_ratio": "2"}),
        ("shp", {"min_score_ratio": True}),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(name, options):
    with pytest.raises(UsageError, match=f"option {next(iter(options))} cannot be"):
        check_options(name, options)


def test_options_reach_the_format():
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    assert [read("pku", row, {"dimension": d}).responses[0][0]["content"] for d in ("better", "safer")] == ["a", "b"]


def test_formats_whose_rows_may_be_text_can_be_read_as_messages():
    plain = {
        name for name in FORMATS for row in outcomes(name) if isinstance(row, Record) and isinstance(row.prompt, str)
    }
    assert plain == set(TEXT_FORMATS) == {name for name in FORMATS if "as" in options_of(name)}
    for name in TEXT_FORMATS:
        before, after = (
            [row for row in outcomes(name, **options) if isinstance(row, Record)]
            for options in ({}, {"as": "messages"})
        )
        assert all(isinstance(row.prompt, list) for row in after), name
        # A text without turns is no conversation, and hh has a row that is unclear about its turns.
        assert len(before) - len(after) == {"text": 3}.get(name, 0), name
