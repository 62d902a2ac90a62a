"""Formats that rate answers: several in one row, or one a row that `dpoctl.data.grouping` groups by prompt.

The record holds the scores; pairs are chosen later. An answer that is empty or has no score is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from dpoctl.data.formats.common import (
    assistant,
    checked,
    columns,
    compare_answers,
    compare_conversations,
    number,
    question,
    text_columns,
    user,
)
from dpoctl.data.formats.demonstrations import alpaca_prompt
from dpoctl.data.formats.pairs import TURN, nemo_turns
from dpoctl.data.html_markdown import html_to_markdown
from dpoctl.data.messages import SHAPE, read_messages
from dpoctl.data.records import Message, Record, Reject, Row, squeeze

SPEAKER = re.compile(r"\b(?:Human|Assistant):")

Rated = tuple[list[Message], float | None]
"""An answer, and its score if it has one."""


def ultrafeedback_raw(row: Row, *, score: Literal["mean", "overall_score"] = "mean") -> Record:
    """The original UltraFeedback: `instruction` and `completions`, each with four ratings.

    The score is the mean of those ratings that are numbers, or the column `overall_score`. The system messages of the
    completions differ from each other and are not part of the prompt.
    """
    (instruction,) = text_columns(row, "instruction")
    completions = _objects(row, "completions", "response", "annotations")
    rate = _mean_rating if score == "mean" else _overall_score
    return _ranking(question(instruction), [(_answer(one["response"]), rate(one)) for one in completions])


def nectar(row: Row) -> Record:
    """Nectar: a transcript that ends with `Assistant:`, and up to seven ranked answers, 1 the best.

    Answers that hold further turns of `Human:` or `Assistant:` are left out.
    """
    columns(row, "prompt", "answers")
    (prompt,) = text_columns(row, "prompt")
    answers = [
        ([] if SPEAKER.search(str(one["answer"])) else _answer(one["answer"]), _from_rank(one["rank"]))
        for one in _objects(row, "answers", "answer", "rank")
    ]
    return _ranking(_transcript(prompt), answers)


def comparison_gpt4(row: Row, *, input_role: Literal["user", "system"] = "user") -> Record:
    """GPT-4-LLM comparisons: `output` holds two or more answers, the best first; `input` is the context of the task.

    Of more than two answers the scores are their ranks, -1 the best.
    """
    (output,) = columns(row, "output")
    (instruction,) = text_columns(row, "instruction")
    if not isinstance(output, list) or not all(isinstance(answer, str) for answer in output):
        raise Reject(SHAPE, "output is not a list of texts")
    if len(output) < 2:
        raise Reject("missing_answer", f"output holds {len(output)} answers, and a comparison needs two")
    instruction, context = instruction.strip(), str(row.get("input") or "")
    if input_role == "system":
        prompt = question(instruction, context.strip())
    else:
        prompt = alpaca_prompt(row | {"instruction": instruction, "input": context})
    if len(output) == 2:
        return compare_answers(prompt, output[0].strip(), output[1].strip())
    return _ranking(prompt, [(_answer(text.strip()), -rank) for rank, text in enumerate(output, start=1)])


def nemo_ranking(row: Row) -> Record:
    """NeMo-RL: `context`, and `completions` of messages with a `rank`, the lowest the best."""
    (context,) = columns(row, "context")
    completions = _objects(row, "completions", "completion", "rank")
    answers = [(read_messages(one["completion"], "completion"), _from_rank(one["rank"])) for one in completions]
    return _ranking(read_messages(context, "context"), answers)


def stack_exchange(row: Row, *, target: Literal["none", "best"] = "none") -> Record:
    """StackExchange questions in HTML, which becomes Markdown, and answers with their votes in `pm_score`.

    With `target: best` the answer to imitate has the highest score; among equals it is the accepted one, or else the
    first. With `none` it is the answer whose score no other reaches, if there is one.
    """
    (asked,) = text_columns(row, "question")
    rows = _objects(row, "answers", "text", "pm_score")
    answers = [_answer(html_to_markdown(one["text"]) if isinstance(one["text"], str) else None) for one in rows]
    scores = [one["pm_score"] for one in rows]
    record = _ranking(question(html_to_markdown(asked)), list(zip(answers, scores, strict=True)))
    if target == "none":
        return record
    accepted = [
        answer for answer, one in zip(answers, rows, strict=True) if one.get("selected") in (True, "True", "true")
    ]
    best = max(range(len(record.scores)), key=lambda k: (record.scores[k], record.responses[k] in accepted))
    return replace(record, target=best)


def helpsteer2(
    row: Row,
    *,
    attribute: Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"] = "helpfulness",
) -> Record:
    """HelpSteer2: one answer a row with five ratings; the rating `attribute` is the score."""
    _, *_, score = columns(row, "helpfulness", "correctness", "coherence", "complexity", "verbosity", attribute)
    prompt, response = text_columns(row, "prompt", "response")
    return checked(Record(nemo_turns(prompt), (_answer(response),), scores=(number(score, attribute),)))


def snorkel(row: Row, *, use: Literal["explicit", "scores"] = "explicit") -> Record:
    """Snorkel's PairRM sets: a pair, and all answers from which it was chosen with their scores.

    `explicit` reads `chosen` and `rejected`, with their scores where both are among all answers; `scores` makes a
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


def _objects(row: Row, name: str, *keys: str) -> list[dict[str, Any]]:
    """Look up a column of objects that have these keys."""
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
    """Read a transcript of `Human:` and `Assistant:` turns that ends with an empty turn of the assistant."""
    first, *pieces = TURN.split(prompt)
    turns = [(role, text.strip()) for role, text in zip(pieces[::2], pieces[1::2], strict=True)]
    if first.strip() or not turns:
        raise Reject(SHAPE, r"prompt does not start with \n\nHuman:")
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    return [user(text) if role == "Human" else assistant(text) for role, text in turns]
