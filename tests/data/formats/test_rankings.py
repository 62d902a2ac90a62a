import json
from pathlib import Path

import pytest

from dpoctl.data.formats import read
from dpoctl.data.formats.detect import detect
from dpoctl.data.grouping import Grouper
from dpoctl.data.html_markdown import html_to_markdown
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


def test_stack_exchange_html_becomes_markdown():
    first, *_, fourth, fifth = records("stack-exchange")
    assert first == Record(
        [user('How do I print in Python 3?\n\n```\nprint  "x"\n  y\n```')],
        answers('Use `print("x")`.', "You cannot.", "Read the [manual](https://example.com)."),
        scores=(5, -1, 2),
    )
    assert (fourth.prompt, fourth.responses) == ([user("1 < 2?")], answers("Yes.\nAlways.", "No."))
    assert fifth.prompt == [user("# Title\n\nBody")]


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
        ("<p>an <em>inner</em> word, <code>a  b</code> too</p>", "an inner word, `a  b` too"),
        ("&lt;tag&gt; &amp; &#39;more&#39;", "<tag> & 'more'"),
        ("</p></code>stray  ends", "stray ends"),
        ("a<style>p {}</style> b", "a b"),
        ("<p>unclosed <code>x", "unclosed `x`"),
        ("<h2>Use <code>x</code></h2><blockquote><p>a</p><p>b</p></blockquote>", "## Use `x`\n\n> a\n>\n> b"),
        ("10<sup>9</sup> of H<sub>2</sub>O, e<sup>-x</sup>", "10^9 of H_2O, e^(-x)"),
        ("<img src='u.png' alt='a plot'> and <img alt='none'>", "![a plot](u.png) and"),
        (
            "<table><tr><th>a<th>b</tr><tr><td>1</td><td><code>2</code></td></tr></table>",
            "| a | b |\n| --- | --- |\n| 1 | `2` |",
        ),
    ],
)
def test_html_becomes_markdown(html, expected):
    assert html_to_markdown(html) == expected


ROWS = "<tr><th>a<th>b</tr><tr><td>1</td><td>2</td></tr>"
IN_MARKDOWN = "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        (f"<table><caption>Counts</caption>{ROWS}</table>", f"Counts\n\n{IN_MARKDOWN}"),
        (
            f"<p>x</p><table>\n<caption><b>The</b> counts</caption>\n<thead>{ROWS}</thead></table>y",
            f"x\n\nThe counts\n\n{IN_MARKDOWN}\n\ny",
        ),
        (f"<table>{ROWS}stray</table>", f"stray\n\n{IN_MARKDOWN}"),
        (f"<table><caption>one<p>two</p></caption>{ROWS}</table>", f"one\n\ntwo\n\n{IN_MARKDOWN}"),
        ("<table><caption>alone</caption></table>", "alone"),
        ("<table><th>a<th>b<tr><td>1<td>2</table>", IN_MARKDOWN),
        (
            "<table><tr><th>x | y<th><code>a||b</code></tr><tr><td>p|q<td>2</tr></table>",
            "| x \\| y | `a\\|\\|b` |\n| --- | --- |\n| p\\|q | 2 |",
        ),
        ("a | b", "a | b"),
    ],
)
def test_a_table_stays_whole(html, expected):
    assert html_to_markdown(html) == expected


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<pre><code>if x:\n    y\n\n\nz\n</code></pre><p>after</p>", "```\nif x:\n    y\n\n\nz\n```\n\nafter"),
        ('<pre class="lang-py prettyprint"><code>x = 1\n</code></pre>', "```py\nx = 1\n```"),
        ("<pre>a &lt; b\n  <b>c</b></pre>", "```\na < b\n  c\n```"),
        ("<code>a`b</code> and <code>``</code>", "``a`b`` and ``` `` ```"),
        ("<pre><code>```\nfence</code></pre>", "````\n```\nfence\n````"),
        ("<code>two\nlines</code>", "```\ntwo\nlines\n```"),
    ],
)
def test_code_is_marked_and_kept_as_it_is(html, expected):
    assert html_to_markdown(html) == expected


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n<p>end</p>", "- one\n- two\n\nend"),
        ("<ol start='3'><li>three<li>four</ol>", "3. three\n4. four"),
        ("<ul><li>a<ol><li>b</li><li>c</li></ol></li><li>d</li></ul>", "- a\n  1. b\n  2. c\n- d"),
        ("<ol><li><p>a</p><pre><code>x\n  y</code></pre></li></ol>", "1. a\n\n   ```\n   x\n     y\n   ```"),
        ('see <a href="http://x.y/z">the docs </a>here', "see [the docs](http://x.y/z) here"),
        ('<a href="http://x.y">http://x.y</a>, <a name="n">no link</a>', "http://x.y, no link"),
        ('<a href="u"><code>f()</code></a>', "[`f()`](u)"),
    ],
)
def test_lists_and_links_are_kept(html, expected):
    assert html_to_markdown(html) == expected


@pytest.mark.parametrize(
    ("html", "tag"),
    [
        ("<p>a</p><script>x <p>the rest</p>", "script"),
        ("<p>a <STYLE type='text/css'>p {} </p>the rest", "style"),
        ("<pre><code><script>f()</code></pre><p>the rest</p>", "script"),
        ("<style>p {}</style>a<script>x</style>the rest", "script"),
        ("a<script>x</script", "script"),
    ],
)
def test_html_that_hides_the_rest_of_a_text_is_rejected(html, tag):
    sound = {"text": "<script>x</script><p>b</p>", "pm_score": 1}
    for asked, answer in ((html, "a"), ("a", html)):
        row = {"question": asked, "answers": [sound, {"text": answer, "pm_score": 2}]}
        with pytest.raises(Reject) as error:
            read("stack-exchange", row)
        assert error.value.reason == "unclosed_html"
        assert error.value.detail == f"<{tag}> does not end, and hides the rest of the text"


@pytest.mark.parametrize("tag", ["<ul><li>", "<code>", "<a href='x'>", "<p>", "</p>", "<table><tr><td>", "<b>x"])
def test_html_that_never_ends_is_read_in_linear_time(tag):
    assert len(html_to_markdown(tag * 20_000)) <= 20_000


def compared(*texts, **others):
    return read("comparison-gpt4", {"instruction": "Name a bird.", "input": "", "output": [*texts]} | others)


def test_more_than_two_compared_answers_are_a_ranking_with_the_best_first():
    three = compared(" A wren.", "A bird.", "No.")
    assert three == Record([user("Name a bird.")], answers("A wren.", "A bird.", "No."), scores=(-1, -2, -3))
    assert three.preferred().responses == answers("A wren.")
    assert pair_up(three, Pairing("all"))[0].pairs == ((0, 1), (0, 2), (1, 2))
    assert pair_up(three, Pairing("adjacent"))[0].pairs == ((0, 1), (1, 2))
    assert compared("A wren.", "No.").pairs == ((0, 1),)
    assert compared("A wren.", " ", "A bird.", "No.").scores == (-1, -3, -4), "the empty answer is left out"
    later = compared("A wren.", "A bird.", "No.", history=[["Hi", "Hello."]])
    assert later.prompt == [user("Hi"), assistant("Hello."), user("Name a bird.")]


@pytest.mark.parametrize(("texts", "reason"), [(["A wren."], "missing_answer"), (["A", "", " "], "too_few_answers")])
def test_one_answer_is_no_comparison(texts, reason):
    with pytest.raises(Reject) as reject:
        compared(*texts)
    assert reject.value.reason == reason


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
    groups = list(grouper.records())
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


def test_a_stack_exchange_answer_that_is_no_text_is_left_out():
    row = {"question": "<p>q</p>", "answers": [{"text": text, "pm_score": 1} for text in ("<p>a</p>", None, 3, "b")]}
    assert read("stack-exchange", row).responses == answers("a", "b")
