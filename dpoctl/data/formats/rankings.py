"""Formats that rate answers: several in one row, or one a row that `dpoctl.data.grouping` brings together.

The scores go into the record, and which answers are compared is decided later. An answer that is empty or was not
rated is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, Literal

from dpoctl.data.conversation import SHAPE, read_messages
from dpoctl.data.formats.pairs import nemo_turns
from dpoctl.data.formats.parts import (
    assistant,
    checked,
    columns,
    compare_conversations,
    number,
    question,
    text_columns,
    user,
)
from dpoctl.data.formats.transcripts import TURN
from dpoctl.data.records import Message, Record, Reject, Row, squeeze

SPEAKER = re.compile(r"\b(?:Human|Assistant):")
BLOCKS = {"p", "div", "pre", "ul", "ol", "blockquote", "table", "hr", "h1", "h2", "h3", "h4", "h5", "h6"}
LINES = {"br", "li", "tr", "dt", "dd"}

Rated = tuple[list[Message], float | None]
"""An answer, and its score where somebody gave it one."""


def ultrafeedback_raw(row: Row, *, score: Literal["mean", "overall_score"] = "mean") -> Record:
    """UltraFeedback as it was collected: `instruction` and `completions`, each with four ratings.

    `mean` scores by the mean of those ratings that are numbers, `overall_score` by the column of that name. The
    system messages of the completions differ from each other and are no part of the prompt.
    """
    (instruction,) = text_columns(row, "instruction")
    completions = _objects(row, "completions", "response", "annotations")
    rate = _mean_rating if score == "mean" else _overall_score
    return _ranking(question(instruction), [(_answer(one["response"]), rate(one)) for one in completions])


def nectar(row: Row) -> Record:
    """Nectar: a transcript that ends with `Assistant:`, and up to seven ranked answers, 1 the best.

    Answers that go on to speak for `Human:` or `Assistant:` are left out.
    """
    (prompt,) = text_columns(row, "prompt")
    answers = [
        ([] if SPEAKER.search(str(one["answer"])) else _answer(one["answer"]), _from_rank(one["rank"]))
        for one in _objects(row, "answers", "answer", "rank")
    ]
    return _ranking(_transcript(prompt), answers)


def nemo_ranking(row: Row) -> Record:
    """NeMo-RL: `context`, and `completions` of messages with a `rank`, the lowest the best."""
    (context,) = columns(row, "context")
    completions = _objects(row, "completions", "completion", "rank")
    answers = [(read_messages(one["completion"], "completion"), _from_rank(one["rank"])) for one in completions]
    return _ranking(read_messages(context, "context"), answers)


def stack_exchange(row: Row, *, target: Literal["none", "best"] = "none") -> Record:
    """StackExchange questions: HTML, and answers scored by their votes in `pm_score`.

    With `target: best` the answer to imitate is one of the highest score, the accepted one among equals, the first
    otherwise; with `none` it is the answer that no other equals, where there is one.
    """
    (asked,) = text_columns(row, "question")
    answers = _objects(row, "answers", "text", "pm_score")
    record = _ranking(
        question(html_text(asked)), [(_answer(html_text(one["text"])), one["pm_score"]) for one in answers]
    )
    if target == "none":
        return record
    accepted = [_answer(html_text(one["text"])) for one in answers if one.get("selected") in (True, "True", "true")]
    best = max(range(len(record.scores)), key=lambda k: (record.scores[k], record.responses[k] in accepted))
    return replace(record, target=best)


def helpsteer2(
    row: Row,
    *,
    attribute: Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"] = "helpfulness",
) -> Record:
    """HelpSteer2: one answer a row with five ratings, of which `attribute` is the score."""
    _, *_, score = columns(row, "helpfulness", "correctness", "coherence", "complexity", "verbosity", attribute)
    prompt, response = text_columns(row, "prompt", "response")
    return checked(Record(nemo_turns(prompt), (_answer(response),), scores=(number(score, attribute),)))


def snorkel(row: Row, *, use: Literal["explicit", "scores"] = "explicit") -> Record:
    """Snorkel's PairRM sets: a pair, and the scores of all the answers that it was chosen from.

    `explicit` takes `chosen` and `rejected`, with their scores where both are among all answers; `scores` makes a
    ranking of all answers.
    """
    chosen, rejected, texts, scores = columns(row, "chosen", "rejected", "all_generated_responses", "all_rm_scores")
    if not isinstance(texts, list) or not isinstance(scores, list):
        raise Reject(SHAPE, "all_generated_responses and all_rm_scores are not lists")
    if len(texts) != len(scores) or not all(isinstance(text, str) for text in texts):
        raise Reject("bad_score", f"{len(scores)} scores for {len(texts)} texts")
    pair = compare_conversations(read_messages(chosen, "chosen"), read_messages(rejected, "rejected"))
    if use == "scores":
        assert not isinstance(pair.prompt, str)
        return _ranking(pair.prompt, [(_answer(text), score) for text, score in zip(texts, scores, strict=True)])
    known = {squeeze(_answer(text)): number(score, "a score") for text, score in zip(texts, scores, strict=True)}
    found = tuple(known[text] for text in map(squeeze, pair.responses) if text in known)
    return replace(pair, scores=found if len(found) == len(pair.responses) else ())


def html_text(html: str) -> str:
    """Reduce HTML to its text: paragraphs apart, the contents of `<code>` as they stand."""
    reader = _Text()
    reader.feed(html)
    reader.close()
    return reader.text()


class _Text(HTMLParser):
    """Collects text; white space counts in `<pre>` and `<code>` alone."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._verbatim = 0
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._break(tag)
        self._verbatim += tag in ("pre", "code")
        self._hidden += tag in ("script", "style")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._verbatim = max(0, self._verbatim - (tag in ("pre", "code")))
        self._hidden = max(0, self._hidden - (tag in ("script", "style")))
        if tag in BLOCKS:
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self._pieces or self._pieces[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self._pieces.append(data)

    def text(self) -> str:
        """What was read, without blanks at its ends."""
        return "".join(self._pieces).strip()

    def _break(self, tag: str) -> None:
        wanted = 2 if tag in BLOCKS else int(tag in LINES)
        if not wanted or not self._pieces:
            return
        written = self._pieces[-1] if self._verbatim else self._pieces[-1].rstrip(" ")
        there = len(written) - len(written.rstrip("\n"))
        self._pieces[-1] = written + "\n" * (wanted - there)


def _objects(row: Row, name: str, *keys: str) -> list[dict[str, Any]]:
    """Look up a column of objects that all have these keys."""
    (values,) = columns(row, name)
    if not isinstance(values, list) or not all(isinstance(value, dict) and value.keys() >= {*keys} for value in values):
        raise Reject(SHAPE, f"{name} is not a list of objects with {' and '.join(keys)}")
    return values


def _answer(text: Any) -> list[Message]:
    return [assistant(text)] if isinstance(text, str) and text.strip() else []


def _ranking(prompt: list[Message], answers: Iterable[Rated]) -> Record:
    answers = list(answers)
    rated = [(answer, number(score, "a score")) for answer, score in answers if answer and score is not None]
    if len(rated) < 2:
        raise Reject("too_few_answers", f"{len(rated)} of {len(answers)} answers are rated and can be used")
    responses, scores = zip(*rated, strict=True)
    return checked(Record(prompt, responses, scores=scores))


def _mean_rating(completion: dict[str, Any]) -> float | None:
    annotations = completion["annotations"]
    if not isinstance(annotations, dict):
        raise Reject("bad_score", "annotations is not an object")
    ratings = [aspect.get("Rating") for aspect in annotations.values() if isinstance(aspect, dict)]
    numbers = [number(rating, "Rating") for rating in ratings if rating not in (None, "N/A")]
    return sum(numbers) / len(numbers) if numbers else None


def _overall_score(completion: dict[str, Any]) -> float | None:
    score = completion.get("overall_score")
    return None if score in (None, "N/A") else number(score, "overall_score")


def _from_rank(rank: Any) -> float | None:
    # 0 - x and not -x: rank 0 becomes 0.0, which JSON writes without a sign.
    return None if rank is None else 0.0 - number(rank, "rank")


def _transcript(prompt: str) -> list[Message]:
    """Read a transcript of `Human:` and `Assistant:` turns that leaves the last one to be written."""
    first, *pieces = TURN.split(prompt)
    turns = [(role, text.strip()) for role, text in zip(pieces[::2], pieces[1::2], strict=True)]
    if first.strip() or not turns:
        raise Reject(SHAPE, r"prompt does not start with \n\nHuman:")
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    return [user(text) if role == "Human" else assistant(text) for role, text in turns]
