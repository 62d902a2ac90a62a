import pytest
from format_samples import outcome, outcomes, transcript

from dpoctl.data.formats import read
from dpoctl.data.records import Record

ONE_TURN = {"chosen": transcript(" q", " good"), "rejected": transcript(" q", " bad")}


def plain(prompt, chosen, rejected):
    return Record(prompt, (chosen, rejected), ((0, 1),))


def test_hh_rows_are_plain_text_split_before_the_last_answer():
    egg = "\n\nHuman: Hi\n\nAssistant: Hello \n\nHuman: How do I boil an egg?\n\nAssistant:"
    assert outcomes("hh") == [
        plain("\n\nHuman: Is tea good?\n\nAssistant:", " Many say so.", " No"),
        plain(egg, " Seven minutes.\n\nThen cool it. ", " In water."),
        plain("\n\nHuman: A joke\n\nAssistant:", " Knock knock.", " No."),
        "empty_answer",
    ]


def test_hh_answers_are_whole_remainders_and_keep_their_blanks():
    prefix = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert read("hh", {"chosen": prefix + " x\n\ny ", "rejected": prefix + " x z"}) == plain(prefix, " x\n\ny ", " x z")


def test_hh_answers_with_a_common_start_are_not_split_by_characters():
    record = read("hh", {"chosen": transcript(" q", " I am sure"), "rejected": transcript(" q", " I am not")})
    assert record.responses == (" I am sure", " I am not")


def test_hh_markers_inside_a_line_do_not_split():
    side = "\n\nHuman: hi  Human: you\nAssistant: me\n\nAssistant:"
    assert read("hh", {"chosen": side + " a", "rejected": side + " b"}).prompt == side


def test_hh_is_cut_at_the_first_differing_turn_of_the_assistant():
    chosen = transcript(" q", " good", " more", " even better")
    rejected = transcript(" q", " bad", " what", " worse")
    assert read("hh", {"chosen": chosen, "rejected": rejected}) == read("hh", ONE_TURN)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([" q", " a", " one", " x"], [" q", " a", " two", " y"], "prompts_differ"),
        ([" q", " a"], [" q", " a", " b", " c"], "prompts_differ"),
        ([" q", " a", " b"], [" q", " c"], "no_final_answer"),
        ([" q", " "], [" q", " b"], "empty_answer"),
        ([" q", " a  b"], [" q", " a b\n"], "identical_answers"),
    ],
)
def test_hh_rows_that_teach_nothing_are_rejected(chosen, rejected, expected):
    assert outcome("hh", {"chosen": transcript(*chosen), "rejected": transcript(*rejected)}) == expected


def test_tools_beside_plain_text_are_refused_for_no_template_would_tell_of_them():
    assert outcome("hh", ONE_TURN | {"tools": [{"name": "search"}]}) == "unsupported_column"
    assert outcome("hh", ONE_TURN | {"tools": []}) == read("hh", ONE_TURN)
