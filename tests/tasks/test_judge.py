"""The keyword judge: one category's words decide, and every share comes with its interval."""

import pytest

from dpoctl.tasks.judge import KeywordJudge, wilson_interval

JUDGE = KeywordJudge({"harsh": ["reject", "no way"], "kind": ["accept", "c++"]})


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Strong REJECT.", "harsh"),
        ("reject, reject, reject", "harsh"),
        ("There is no way.", "harsh"),
        ("Accept!", "kind"),
        ("It is written in C++, good.", "kind"),
        ("rejected, unacceptable, rejection", "undecided"),
        ("Accept or reject?", "undecided"),
        ("", "undecided"),
    ],
)
def test_a_text_is_of_the_one_category_whose_whole_words_it_holds(text: str, category: str) -> None:
    assert JUDGE.category(text) == category


def test_shares_of_all_categories_come_with_wilson_intervals() -> None:
    counted = JUDGE.count(["reject", "reject", "accept", "hm"])
    assert {name: number["share"] for name, number in counted.items()} == {
        "harsh": 0.5,
        "kind": 0.25,
        "undecided": 0.25,
    }
    assert all(number["ci"] == list(wilson_interval(number["share"], 4)) for number in counted.values())
