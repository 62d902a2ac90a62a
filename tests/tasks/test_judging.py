"""`dpoctl eval` with a judge: votes become a verdict with error bars, and bias of the judge is said."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_server import Rounds, length_biased, order_biased, scripted

from dpoctl.errors import UserError
from dpoctl.model.generate import Generation
from dpoctl.runs.gates import find_metric
from dpoctl.runs.statistics import Calibration
from dpoctl.tasks.evaluate import run as evaluate
from dpoctl.tasks.judges import Vote
from dpoctl.tasks.judging import describe_votes, judge_verdicts, read_calibration
from dpoctl.tasks.samples import Sample

Run = Callable[..., dict[str, Any]]
pytest.importorskip("openai")
SAMPLED = {
    "training.learning_rate": 0.03,
    "training.max_steps": 3,
    "eval.samples": {"num": 4, "per_prompt": 2, "max_new_tokens": 12, "temperature": 1.5},
}


def texts(count: int) -> list[Sample]:
    """Samples of as many prompts."""
    return [
        Sample(f"{index}?", Generation("w " * (5 + index % 3), True), Generation("w w w w w", True))
        for index in range(count)
    ]


def voted(samples: list[Sample], votes: list[Vote]) -> list[Sample]:
    return [Sample(one.prompt, one.policy, one.reference, 0, vote) for one, vote in zip(samples, votes, strict=True)]


def test_a_judge_that_prefers_the_first_answer_gives_exactly_one_half_and_it_is_said() -> None:
    report = describe_votes(voted(texts(10), [Vote.of_verdicts(("first", "first"))] * 10))
    assert (report["win_rate"], report["ties"], report["first_share"], report["order_ties"]) == (0.5, 1, 1, 1)
    assert report["length_controlled_win_rate"] == pytest.approx(0.5)
    assert report["follows_order"] is True
    lines = list(judge_verdicts(report))
    assert lines[0] == (
        "judge: it follows the order of the answers: in 100.0% of the pairs it prefers the same place in both orders, "
        "which is a tie; 100.0% of its verdicts are for the first answer"
    )
    assert lines[1].startswith("verdict: no difference is shown: the policy wins 50.0%")


def test_a_judge_that_prefers_the_longer_answer_gives_about_one_half_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    samples, votes = [], []
    for index in range(150):
        mine, other = (int(number) for number in rng.integers((10, 5), (40, 30)))
        samples.append(Sample(f"{index}?", Generation("w " * mine, True), Generation("w " * other, True)))
        votes.append(Vote(1.0 if mine > other else 0.0 if mine < other else 0.5))
    report = describe_votes(voted(samples, votes))
    assert report["win_rate_ci"][0] > 0.6
    low, high = report["length_controlled_win_rate_ci"]
    assert low < 0.5 < high
    assert abs(report["length_controlled_win_rate"] - 0.5) < report["length_controlled_win_rate_se"]


def test_votes_that_cannot_be_read_are_counted_and_left_out() -> None:
    votes = [Vote(1.0), Vote(None), Vote(0.0), Vote(1.0)]
    report = describe_votes(voted(texts(4), votes))
    assert (report["num"], report["num_prompts"], report["unparsable"]) == (4, 3, 1)
    assert report["win_rate"] == pytest.approx(2 / 3)
    nothing = describe_votes(voted(texts(2), [Vote(None), Vote(None)]))
    assert "win_rate" not in nothing
    assert list(judge_verdicts(nothing))[-1] == "verdict: no vote of the judge can be read: it says nothing"


def test_several_texts_of_a_prompt_are_no_further_evidence() -> None:
    samples = texts(8)
    votes = [Vote(1.0)] * 5 + [Vote(0.0)] * 3
    once, often = describe_votes(voted(samples, votes)), describe_votes(voted(samples * 9, votes * 9))
    assert often["num_prompts"] == 8
    assert often["win_rate_se"] == pytest.approx(once["win_rate_se"])
    assert often["minimum_detectable"] == pytest.approx(once["minimum_detectable"])


def test_a_calibration_corrects_the_win_rate_or_says_that_it_cannot() -> None:
    samples = voted(texts(100), [Vote(1.0)] * 60 + [Vote(0.0)] * 40)
    report = describe_votes(samples, Calibration(0.9, 0.7, 50, 50))
    assert report["corrected_win_rate"] == pytest.approx((0.6 + 0.7 - 1) / 0.6)
    assert report["calibration"] == {"sensitivity": 0.9, "specificity": 0.7, "num": 100}
    useless = describe_votes(samples, Calibration(0.5, 0.4, 50, 50))
    assert "corrected_win_rate" not in useless
    assert any("no more often than chance" in line for line in judge_verdicts(useless))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", r"labels\.jsonl:1: expected prompt, a, b, and human, which is a or b"),
        ('{"prompt": "p", "a": "x", "b": "y", "human": "c"}', r"labels\.jsonl:1: expected"),
        ('{"prompt": "p", "a": "x", "b": "y", "human": "a"}', "people must prefer a in some pairs, and b in others"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_file_of_calibration_is_named_by_its_line(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "labels.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=words):
        read_calibration(tmp_path / "labels.jsonl")


@pytest.fixture
def report(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def read(run: str, *overrides: str, **options: Any) -> dict[str, Any]:
        capfd.readouterr()
        evaluate(Path(run), json_output=True, overrides=overrides, **options)
        numbers: dict[str, Any] = json.loads(capfd.readouterr().out)
        return numbers

    return read


def judged(url: str, **keys: Any) -> str:
    return f"eval.judge={json.dumps({'type': 'pairwise', 'url': url, 'model': 'tiny', **keys})}"


def test_a_run_is_judged_with_all_that_a_result_promises(
    dpo_recipe: dict[str, Any], train: Run, report: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run = train(dpo_recipe, SAMPLED)["training"]["output_dir"]
    with scripted(length_biased) as server:
        found = report(run, judged(server.url))
        judge = found["judge"]
        # One request for each order; a pair of equal texts is one request.
        assert judge["requests"] == server.asked.total() <= 16
        assert judge["tokens"] == 7 * judge["requests"] + judge["completion_tokens"]
        assert (judge["type"], judge["model"], judge["num"], judge["num_prompts"]) == ("pairwise", "tiny", 8, 4)
        for path in ("judge.win_rate", "judge.length_controlled_win_rate", "judge.first_share", "kl"):
            value, interval = find_metric(found, path) or (None, None)
            assert value is not None, path
            assert interval is not None, path
            assert interval[0] <= value <= interval[1], path
        assert {"ties", "unparsable", "minimum_detectable", "win_rate_ci_method"} <= judge.keys()
        for name in ("length", "finished", "repetition", "refusals"):
            assert {f"{name}_policy_ci", f"{name}_reference_ci", f"{name}_difference_ci"} <= found["samples"].keys()

        (lines,) = (Path(run) / "evals").glob("*.samples.jsonl")
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        wins = [row["judge"]["win"] for row in rows]
        lengths = [len(row["policy"]) - len(row["reference"]) for row in rows]
        assert wins == [0.5 if not length else float(length > 0) for length in lengths]
        assert judge["win_rate"] == pytest.approx(sum(wins) / 8)

        again = report(run, judged(server.url))
        assert server.asked.total() == judge["requests"]
        assert {**again, "date": ""} == {**found, "date": ""}
        assert found["official"] is False
        assert "settings" in found

        repeated = report(run, judged(server.url), "eval.samples.per_prompt=1", repeats=3)["judge"]
        assert (repeated["repeats"], repeated["num"], repeated["num_prompts"]) == (3, 12, 4)
        assert repeated["noise_floor"] == pytest.approx(np.std(repeated["win_rates"], ddof=1))
    with scripted(order_biased) as server:
        labels = tmp_path / "labels.jsonl"
        labels.write_text("".join(f'{{"prompt": "p", "a": "x", "b": "y", "human": "{human}"}}\n' for human in "ab"))
        biased = report(run, judged(server.url, calibration=str(labels)))["judge"]
        assert (biased["win_rate"], biased["follows_order"]) == (0.5, True)
        assert biased["calibration"] == {"sensitivity": 0.5, "specificity": 0.5, "num": 2}
        with pytest.raises(UserError, match="requests are needed"):
            report(run, judged(server.url, max_requests=3, temperature=1))
    with pytest.raises(UserError, match="an evaluation can only change keys of the section eval"):
        report(run, "training.seed=3")


def test_an_evaluation_killed_twice_in_mid_judging_ends_as_one_that_was_not(
    dpo_recipe: dict[str, Any],
    train: Run,
    report: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train(dpo_recipe, SAMPLED)["training"]["output_dir"]
    rounds = Rounds(length_biased, answers=3)
    with scripted(rounds) as server:
        monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "killed"))
        for number in (1, 2):
            pid = os.fork()
            if not pid:
                evaluate(Path(run), overrides=[judged(server.url, concurrency=2)])
                os._exit(1)
            kept = tmp_path / "killed" / "answers"
            while sum(file.read_bytes().count(b"\n") for file in kept.glob("*.jsonl")) < 3 * number:
                assert os.waitpid(pid, os.WNOHANG) == (0, 0)
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            rounds.next(3 if number == 1 else 100)
        resumed = report(run, judged(server.url, concurrency=2))
        assert max(server.answered.values()) == 1
        monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "whole"))
        whole = report(run, judged(server.url, concurrency=2))
    assert {**resumed, "date": ""} == {**whole, "date": ""}
