"""Judges: both orders, verdicts that are read or counted, templates of the user, and commands."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_server import Body, Reply, Scripted, length_biased, order_biased, scripted, two_answers

from dpoctl.errors import UserError
from dpoctl.tasks.judges import (
    CommandJudge,
    PairwiseJudge,
    RubricJudge,
    Template,
    Vote,
    prompt_text,
    read_rating,
    read_verdict,
)
from dpoctl.tasks.served import Client, Endpoint

PROMPTS = ["one?", [{"role": "user", "content": "two?"}], "three?"]
A, B = ["good", "bad thing", "good"], ["bad", "good", "good thing"]


@pytest.fixture
def pairwise(tmp_path: Path) -> Callable[..., PairwiseJudge]:
    pytest.importorskip("openai")

    def make(server: Scripted, template: Path | None = None) -> PairwiseJudge:
        client = Client(Endpoint(server.url, "tiny"), 1000, tmp_path)
        return PairwiseJudge(client, Template.read("pairwise", template), {"max_tokens": 9})

    return make


def prefers_good(body: Body) -> str:
    first, second = ("good" in answer for answer in two_answers(body))
    return f"I see. [[{'C' if first == second else 'A' if first else 'B'}]]"


def test_both_orders_are_shown_and_the_better_answer_wins(pairwise: Callable[..., PairwiseJudge]) -> None:
    with scripted(prefers_good) as server:
        votes = pairwise(server)(PROMPTS, A, B)
        assert [vote.win for vote in votes] == [1, 0, 0.5]
        assert votes[0].row() == {"win": 1, "verdicts": ["first", "second"]}
        shown = {two_answers(body) for body in server.bodies}
        assert shown == {pair for a, b in zip(A, B, strict=True) for pair in ((a, b), (b, a))}
        assert server.bodies[0]["max_tokens"] == 9
        assert all("?" in text.partition("[Answer A]")[0] for text in server.asked)
        assert server.asked.total() == 6
        pairwise(server)(PROMPTS, A, B, repeat=1)
        assert server.asked.total() == 12


def test_a_judge_of_places_gives_ties_only(pairwise: Callable[..., PairwiseJudge]) -> None:
    with scripted(order_biased) as server:
        votes = pairwise(server)(PROMPTS, A, B)
    assert [vote.win for vote in votes] == [0.5] * 3
    assert {vote.verdicts for vote in votes} == {("first", "first")}


def test_a_judge_of_lengths_prefers_the_longer(pairwise: Callable[..., PairwiseJudge]) -> None:
    with scripted(length_biased) as server:
        assert [vote.win for vote in pairwise(server)(PROMPTS, A, B)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("because. [[A]]", "first"),
        ("[[ B ]]", "second"),
        ("[[C]] and again [[C]]", "tie"),
        ("[[A]] or [[B]]", None),
        ("A", None),
        ("[A]", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_letter_in_double_brackets_or_none(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "rating"),
    [("[[7]]", 7), ("so [[7.5]]", 7.5), ("[[7/10]]", 7), ("[[11]]", None), ("[[3]] [[4]]", None), ("7", None)],
)
def test_a_rating_is_one_number_of_the_scale_in_double_brackets_or_none(text: str, rating: float | None) -> None:
    assert read_rating(text, 1, 10) == rating


def test_what_cannot_be_read_is_no_vote(pairwise: Callable[..., PairwiseJudge]) -> None:
    replies: dict[tuple[str, str], Reply] = {("good", "bad"): "no idea", ("good", "bad thing"): 400}
    with scripted(lambda body: replies.get(two_answers(body), "[[A]]")) as server:
        votes = pairwise(server)(PROMPTS, A, B)
    assert [vote.win for vote in votes] == [None, None, 0.5]
    assert votes[0].verdicts == (None, "first")


@pytest.mark.parametrize(
    ("verdicts", "win"),
    [
        (("first", "second"), 1),
        (("second", "first"), 0),
        (("first", "first"), 0.5),
        (("tie", "tie"), 0.5),
        (("first", "tie"), 0.5),
        (("tie", None), None),
    ],
)
def test_orders_that_disagree_are_a_tie(verdicts: tuple[str | None, str | None], win: float | None) -> None:
    assert Vote.of_verdicts(verdicts).win == win


def test_a_rubric_rates_each_answer_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("openai")

    def rates(body: Body) -> str:
        text = body["messages"][0]["content"]
        assert "from 0 to 5" in text
        return "[[5]]" if "\ngood\n" in text else "[[9]]" if "thing" in text else "[[2]]"

    with scripted(rates) as server:
        client = Client(Endpoint(server.url, "tiny"), 1000, tmp_path)
        votes = RubricJudge(client, Template.read("rubric"), {}, lowest=0, highest=5)(PROMPTS, A, B)
    assert [vote.row() for vote in votes] == [
        {"win": 1, "ratings": [5, 2]},
        {"win": None, "ratings": [None, 5]},
        {"win": None, "ratings": [5, None]},
    ]


def test_a_template_is_a_file_whose_places_are_filled_at_once(
    tmp_path: Path, pairwise: Callable[..., PairwiseJudge]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("{prompt}|{first}|{second}|{other}")
    with scripted(lambda body: "[[A]]") as server:
        pairwise(server, own)(["{second}"], ["{first}"], ["x"])
        assert server.asked.keys() == {"{second}|{first}|x|{other}", "{second}|x|{first}|{other}"}
    own.write_text("{prompt}: {first}")
    with pytest.raises(UserError, match=r"own\.txt: this template of a pairwise judge has no place \{second\}$"):
        Template.read("pairwise", own)
    with pytest.raises(UserError, match=r"nowhere: this template cannot be read: No such file"):
        Template.read("rubric", tmp_path / "nowhere")


def test_a_conversation_is_shown_with_its_roles() -> None:
    assert prompt_text("plain") == prompt_text([{"role": "user", "content": "plain"}]) == "plain"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert prompt_text(turns) == "user: hi\n\nassistant: yes?"


PROGRAM = """
import json, os, pathlib, sys
rows = [json.loads(line) for line in sys.stdin]
with pathlib.Path(os.environ["JUDGE_LOG"]).open("a") as log:
    log.writelines(f"{row['prompt']}\\n" for row in rows)
for row in reversed(rows):
    first, second = ("good" in row[name] for name in ("first", "second"))
    winner = "tie" if first == second else "first" if first else "second"
    print("noise" if "thing" in row["first"] else json.dumps({"id": row["id"], "winner": winner}), flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judge in a file of its own, and the places for what it keeps."""
    monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_LOG", str(tmp_path / "log"))
    (tmp_path / "judge.py").write_text(PROGRAM)
    return tmp_path / "judge.py"


def test_a_command_judges_json_lines_in_any_order_and_is_asked_once(program: Path, tmp_path: Path) -> None:
    judge = CommandJudge([sys.executable, str(program), "0"])
    votes = judge(PROMPTS, A, B)
    assert [vote.row() for vote in votes] == [
        {"win": 1, "verdicts": ["first", "second"]},
        {"win": None, "verdicts": [None, "first"]},
        {"win": None, "verdicts": ["tie", None]},
    ]
    assert (judge.usage.requests, judge.usage.sent) == (6, 6)
    again = CommandJudge([sys.executable, str(program), "0"])
    assert again(PROMPTS, A, B) == votes
    # Only what it gave no verdict on is asked again.
    assert again.usage.sent == 2
    program.write_text(PROGRAM + "\n# changed\n")
    assert judge(PROMPTS, A, B) == votes
    assert len((tmp_path / "log").read_text().splitlines()) == 6 + 2 + 6


def test_a_command_that_fails_or_is_missing_is_named(program: Path) -> None:
    with pytest.raises(UserError, match="ended with exit code 3; its own error is above"):
        CommandJudge([sys.executable, str(program), "3"])(PROMPTS, A, B)
    with pytest.raises(UserError, match="the judge no-such-judge is not a program that can be started"):
        CommandJudge(["no-such-judge"])(PROMPTS, A, B)
