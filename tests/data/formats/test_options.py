import pytest

from dpoctl.data.formats import FORMATS, check_options, options_of, read
from dpoctl.errors import UsageError


def test_options_are_listed_with_their_types_and_defaults():
    options = options_of("pku")
    assert {name: (option.choices, option.default) for name, option in options.items()} == {
        "dimension": (("better", "safer"), "better"),
        "require_chosen_safe": ((), False),
    }
    assert options["require_chosen_safe"].type is bool
    assert options_of("hh") == {}


@pytest.mark.parametrize("name", FORMATS)
def test_the_defaults_of_a_format_are_values_that_it_takes(name):
    check_options(name, {option.name: option.default for option in options_of(name).values()})


def test_an_unknown_option_is_told_the_ones_there_are():
    with pytest.raises(UsageError, match="format pku has no option 'dimensions'") as error:
        check_options("pku", {"dimensions": "safer"})
    assert error.value.hint == (
        "pku takes dimension=better|safer (default better), require_chosen_safe=bool (default false)"
    )
    with pytest.raises(UsageError, match="hh takes no options"):
        check_options("hh", {"strip": True})


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
