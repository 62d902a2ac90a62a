import json
from pathlib import Path

import pytest

from dpoctl.data.formats import detect, read
from dpoctl.data.formats.rankings import html_text
from dpoctl.data.grouping import Grouper
from dpoctl.data.pairing import Pairing, pair_up
from dpoctl.data.records import Record, Reject

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("ultrafeedback-raw", "nectar", "nemo-ranking", "stack-exchange", "helpsteer2", "snorkel")


def rows(name):
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def records(name, **options):
    """The record of each row of a fixture, or the reason why there is none."""
    found = []
    for row in rows(name):
        try:
            found.append(read(name, row, options))
        except Reject as reject:
            found.append(reject.reason)
    return found


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answers(*texts):
    return tuple([assistant(text)] for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(rows(name))[0] == name


def test_ultrafeedback_scores_by_the_mean_of_the_ratings_that_are_numbers():
    first, second, third, *others = records("ultrafeedback-raw")
    assert first == Record(
        [user("Name a prime.")],
        answers("Four.", "Seven.", "Eleven, or thirteen.", "Maybe nine?"),
        scores=(2.0, 5.0, 4.5, 2.0),
    )
    assert second == Record([user("Say hello.")], answers("Hello.", "Hi."), scores=(4.0, 4.0))
    assert third.prompt == [user("What is 2+2?")], "the system messages of completions are not the prompt's"
    assert others == ["too_few_answers", "empty_prompt"]


def test_ultrafeedback_can_score_by_the_overall_score():
    first, second, *_ = records("ultrafeedback-raw", score="overall_score")
    assert (first.scores, second.scores) == ((3.0, 8.5, 9.0, 2.0), (7.0, 7.5))
    assert (records("ultrafeedback-raw")[0].best, first.best) == (1, 2)


def test_nectar_ranks_become_scores_and_its_transcript_messages():
    first, second, third, *_ = records("nectar")
    assert first.prompt == [user("Count to three.")]
    assert (len(first.responses), first.scores) == (7, (-1, -2, -3, -4, -5, -6, -7))
    assert second.prompt == [user("Hi"), assistant("Hello!"), user("How are you?")]
    assert pair_up(third, Pairing(mode="all"))[0].pairs == ((0, 2), (1, 2))


def test_nectar_answers_that_speak_for_others_are_left_out():
    _, second, _, fourth, _ = records("nectar")
    assert (second.responses, second.scores) == (answers("Fine.", "Very well, thank you."), (-2, -1))
    assert fourth == "too_few_answers"


def test_the_lowest_rank_is_the_best():
    first, second, third, *others = records("nemo-ranking")
    assert first == Record([user("Best fruit?")], answers("Apples.", "Bricks."), scores=(0, -1))
    assert str(first.scores[0]) == "0.0"
    assert second.prompt == [{"role": "system", "content": "Be brief."}, user("2*3?")]
    assert (second.scores, second.best) == ((-2, 0, -1), 1)
    assert (third.scores, third.best) == ((0, 0, -1), None)
    assert others == ["too_few_answers", "roles_out_of_order"]


def test_stack_exchange_html_becomes_text_and_code_stays():
    first, *_, fourth, fifth = records("stack-exchange")
    assert first == Record(
        [user('How do I print in Python 3?\n\nprint  "x"\n  y')],
        answers('Use print("x").', "You cannot.", "Read the manual."),
        scores=(5, -1, 2),
    )
    assert (fourth.prompt, fourth.responses) == ([user("1 < 2?")], answers("Yes.\nAlways.", "No."))
    assert fifth.prompt == [user("Title\n\nBody")]


def test_stack_exchange_can_name_the_best_answer_as_the_target():
    assert [record.best for record in records("stack-exchange") if isinstance(record, Record)] == [0, None, 0, None]
    targets = [getattr(record, "target", record) for record in records("stack-exchange", target="best")]
    assert targets == [0, 1, "too_few_answers", 0, 0], "the accepted answer among equals, else the first"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ("<p>a</p><p>b</p>", "a\n\nb"),
        ("<p>a</p>\n\n<hr>\n<p>b</p>", "a\n\nb"),
        ("a<br/>b<br>c", "a\nb\nc"),
        ("<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n<p>end</p>", "one\ntwo\n\nend"),
        ("<p>an <em>inner</em> word, <code>a  b</code> too</p>", "an inner word, a  b too"),
        ("<pre><code>if x:\n    y\n\n\nz\n</code></pre><p>after</p>", "if x:\n    y\n\n\nz\n\nafter"),
        ("&lt;tag&gt; &amp; &#39;more&#39;", "<tag> & 'more'"),
        ("</p></code>stray  ends", "stray ends"),
        ("a<style>p {}</style> b", "a b"),
    ],
)
def test_html_is_reduced_to_its_text(html, expected):
    assert html_text(html) == expected


def test_helpsteer2_rows_hold_one_rated_answer():
    first, second, *_, empty = records("helpsteer2")
    assert first == Record([user("What is C#?")], answers("A language."), scores=(3,))
    assert second.prompt == [user("Hi"), assistant("Hello."), user("Name a colour.")]
    assert empty == "empty_answer"


def test_helpsteer2_scores_by_the_attribute_that_is_asked_for():
    assert [record.scores for record in records("helpsteer2", attribute="verbosity")[:5]] == [
        (1,),
        (0,),
        (1,),
        (0,),
        (2,),
    ]


def test_helpsteer2_answers_become_pairs_by_prompt():
    grouper = Grouper()
    for line, record in enumerate(records("helpsteer2")[:5], start=1):
        grouper.add(record, line)
    groups = list(grouper.rankings())
    assert [lines for lines, _ in groups] == [(1, 3), (2, 4), (5,)]
    assert pair_up(groups[0][1], Pairing())[0] == Record(
        [user("What is C#?")], answers("A language.", "A note."), ((0, 1),), scores=(3, 1)
    )


def test_snorkel_pairs_carry_the_scores_of_both_answers():
    first, second, third, fourth, _ = records("snorkel")
    assert first == Record([user("Sky?")], answers("Blue.", "Green."), ((0, 1),), scores=(1.5, -2.0))
    assert second.scores == (2.0, -0.5)
    assert third.scores == (), "the chosen answer is not among those that were scored"
    assert fourth == "identical_answers"


def test_snorkel_can_be_read_as_a_ranking():
    first, *_, fifth = records("snorkel", use="scores")
    assert (first.scores, first.pairs, first.best) == ((1.5, 0.25, -2.0, 0.5, -1.0), (), 0)
    assert fifth == Record([user("Sea?")], answers("Salty.", "Sweet."), scores=(3.0, -1.0))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ultrafeedback-raw", {"completions": ["text"]}),
        ("nectar", {"answers": [{"answer": "a"}]}),
        ("nectar", {"prompt": "no transcript"}),
        ("nemo-ranking", {"completions": {}}),
        ("stack-exchange", {"answers": None}),
        ("helpsteer2", {"response": None}),
        ("snorkel", {"all_rm_scores": None}),
    ],
)
def test_a_row_of_another_shape_is_not_in_the_format(name, change):
    with pytest.raises(Reject) as error:
        read(name, rows(name)[0] | change)
    assert error.value.reason == "wrong_shape"


@pytest.mark.parametrize("rank", ["first", float("nan"), True])
def test_a_rank_that_is_no_number_is_rejected(rank):
    row = rows("nemo-ranking")[0]
    row["completions"][0]["rank"] = rank
    with pytest.raises(Reject) as error:
        read("nemo-ranking", row)
    assert error.value.reason == "bad_score"
