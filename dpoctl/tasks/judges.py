"""Judges: which of two answers to a prompt is better, by a served model or by a command.

A pair is judged in both orders, since many judges prefer a place. Where the orders disagree, the pair is a tie. A
verdict that cannot be read is no vote: it is counted, and never guessed.
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, Self

from dpoctl import console
from dpoctl.data.cache import Cache, cache_dir, writing_to
from dpoctl.data.records import Text
from dpoctl.errors import RunError, SetupError, UsageError
from dpoctl.files import sha256
from dpoctl.tasks.served import FOLDER, Client, Endpoint, KeptAnswers, Reply, Request, Usage

FIRST, SECOND, TIE = "first", "second", "tie"
PLACES = {"pairwise": ("prompt", "first", "second"), "rubric": ("prompt", "answer")}
"""The places that a template must have, by type of judge."""
LARGEST_SCRIPT = 1 << 20
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*\d+\s*)?\]\]")
_LETTERS = {"A": FIRST, "B": SECOND, "C": TIE}
_PLACE = re.compile(r"\{(prompt|first|second|answer|lowest|highest)\}")


@dataclass(frozen=True)
class Vote:
    """A judge's vote on a pair of answers.

    Attributes:
        win: 1 if answer a is better, 0 if b is, 0.5 for a tie; None if a verdict cannot be read.
        verdicts: which place was preferred when a stood first, and when b did: `first`, `second`, `tie`, or None if
            that cannot be read; empty for a judge that sees each answer by itself.
        ratings: of a and b; empty for a judge that compares.
    """

    win: float | None
    verdicts: tuple[str | None, ...] = ()
    ratings: tuple[float | None, ...] = ()

    @classmethod
    def of_verdicts(cls, verdicts: tuple[str | None, str | None]) -> Self:
        """Combine the verdicts of both orders; two that disagree are a tie."""
        if None in verdicts:
            return cls(None, verdicts)
        preferred = {(FIRST, SECOND): 1.0, (SECOND, FIRST): 0.0}
        return cls(preferred.get((str(verdicts[0]), str(verdicts[1])), 0.5), verdicts)

    @classmethod
    def of_ratings(cls, a: float | None, b: float | None) -> Self:
        """Compare two ratings."""
        win = None if a is None or b is None else (1.0 if a > b else 0.0 if a < b else 0.5)
        return cls(win, (), (a, b))

    def row(self) -> dict[str, Any]:
        """Return the keys of a line of samples."""
        parts = {"verdicts": list(self.verdicts), "ratings": list(self.ratings)}
        return {"win": self.win, **{name: part for name, part in parts.items() if part}}


class Judge(Protocol):
    """Compares answers."""

    @property
    def usage(self) -> Usage:
        """The requests so far."""

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str], *, repeat: int = 0) -> list[Vote]:
        """Return a vote on each pair of answers.

        Args:
            prompts: text, or messages.
            a: an answer to each prompt.
            b: another answer to each prompt.
            repeat: the number of the draw: each asks anew.
        """


@dataclass(frozen=True)
class Template:
    """A text with places for a prompt and answers.

    Attributes:
        text: the text, with places such as `{prompt}`.
        digest: a hash of it.
    """

    text: str
    digest: str

    @classmethod
    def read(cls, kind: str, path: str | Path | None = None) -> Self:
        """Read the template of a type of judge, `pairwise` or `rubric`: a file of the user, or the one of dpoctl.

        Raises:
            UsageError: the file cannot be read, or a place is missing in it.
        """
        try:
            source = files("dpoctl.tasks").joinpath("judge_templates", f"{kind}.txt") if path is None else Path(path)
            text = source.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(f"{path}: this template cannot be read: {reason}") from error
        found = set(_PLACE.findall(text))
        missing = [f"{{{place}}}" for place in PLACES[kind] if place not in found]
        if missing:
            raise UsageError(f"{path}: this template of a {kind} judge has no place {', '.join(missing)}")
        return cls(text, hashlib.sha256(text.encode()).hexdigest()[:16])

    def fill(self, **values: str) -> str:
        """Put values in their places, all at once: a place that an answer names stays text."""
        return _PLACE.sub(lambda found: values.get(found[1], found[0]), self.text)


@dataclass(frozen=True)
class PairwiseJudge:
    """A served model that sees both answers, in both orders.

    Attributes:
        client: the model.
        template: the request, with the places `{prompt}`, `{first}` and `{second}`.
        sampling: further fields of the request, such as `max_tokens`.
    """

    client: Client
    template: Template
    sampling: Mapping[str, Any]

    @property
    def usage(self) -> Usage:
        """The requests so far."""
        return self.client.usage

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str], *, repeat: int = 0) -> list[Vote]:
        """Return a vote on each pair of answers."""
        filled = [
            self.template.fill(prompt=prompt_text(prompt), first=first, second=second)
            for prompt, *pair in zip(prompts, a, b, strict=True)
            for first, second in (pair, reversed(pair))
        ]
        answers = self.client.ask(_requests(filled, self.sampling, self.template, repeat), "judging by")
        verdicts = [read_verdict(answer.text) for answer in answers]
        return [Vote.of_verdicts(both) for both in zip(verdicts[::2], verdicts[1::2], strict=True)]


@dataclass(frozen=True)
class RubricJudge:
    """A served model that rates each answer by itself.

    Attributes:
        client: the model.
        template: the request, with the places `{prompt}`, `{answer}`, `{lowest}` and `{highest}`.
        sampling: further fields of the request.
        lowest: the lowest rating.
        highest: the highest rating.
    """

    client: Client
    template: Template
    sampling: Mapping[str, Any]
    lowest: int = 1
    highest: int = 10

    @property
    def usage(self) -> Usage:
        """The requests so far."""
        return self.client.usage

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str], *, repeat: int = 0) -> list[Vote]:
        """Return a vote on each pair of answers."""
        ratings = self.rate([*prompts, *prompts], [*a, *b], repeat=repeat)
        return [Vote.of_ratings(*both) for both in zip(ratings[: len(a)], ratings[len(a) :], strict=True)]

    def rate(self, prompts: Sequence[Text], answers: Sequence[str], *, repeat: int = 0) -> list[float | None]:
        """Return the rating of each answer; None if it cannot be read, or is not on the scale."""
        scale = {"lowest": str(self.lowest), "highest": str(self.highest)}
        filled = [
            self.template.fill(prompt=prompt_text(prompt), answer=answer, **scale)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found = self.client.ask(_requests(filled, self.sampling, self.template, repeat), "judging by")
        return [read_rating(answer.text, self.lowest, self.highest) for answer in found]


@dataclass
class CommandJudge:
    """A command that reads pairs as JSON lines, and writes a JSON line with the winner of each, in any order.

    It reads `{"id": 0, "prompt": ..., "first": "...", "second": "..."}` and writes `{"id": 0, "winner": "first"}`, or
    `second`, or `tie`. Each pair comes in both orders. Its verdicts are kept as those of a served model are.

    Attributes:
        command: the program and its arguments.
        usage: the pairs so far, each order by itself.
    """

    command: Sequence[str]
    usage: Usage = field(default_factory=Usage)

    def __call__(self, prompts: Sequence[Text], a: Sequence[str], b: Sequence[str], *, repeat: int = 0) -> list[Vote]:
        """Return a vote on each pair of answers.

        Raises:
            SetupError: the program cannot be started.
            RunError: it fails.
        """
        program = shutil.which(self.command[0])
        if program is None:
            raise SetupError(f"the judge {self.command[0]} is not a program that can be started")
        rows = [
            {"prompt": prompt, "first": first, "second": second}
            for prompt, *pair in zip(prompts, a, b, strict=True)
            for first, second in (pair, reversed(pair))
        ]
        endpoint = Endpoint("command", json.dumps([*self.command, *hash_files([program, *self.command[1:]])]))
        keys = [Request([row], {}, repeat=repeat).key(endpoint) for row in rows]
        folder = Cache(cache_dir()).writable(FOLDER)
        with writing_to(folder), KeptAnswers.open(folder, endpoint) as kept:
            new = {key: row for key, row in zip(keys, rows, strict=True) if key not in kept.answers}
            found = kept.answers | (self._run(program, new, kept) if new else {})
        self.usage.requests += len(set(keys))
        self.usage.sent += len(new)
        verdicts = [found[key].text if key in found else None for key in keys]
        return [Vote.of_verdicts(both) for both in zip(verdicts[::2], verdicts[1::2], strict=True)]

    def _run(self, program: str, new: Mapping[str, Any], kept: KeptAnswers) -> dict[str, Reply]:
        """Send rows to the command, and keep each verdict as it comes."""
        keys, found = list(new), dict[str, Reply]()
        lines = [json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(new.values())]
        # A file, and no pipe: a program may write before it has read everything, or end without reading.
        with TemporaryFile("w+", encoding="utf-8") as pairs:
            pairs.writelines(lines)
            pairs.seek(0)
            with (
                subprocess.Popen(
                    [program, *self.command[1:]], stdin=pairs, stdout=subprocess.PIPE, text=True, encoding="utf-8"
                ) as child,
                console.WorkProgress(f"judging by {self.command[0]}", len(new), "verdicts") as progress,
            ):
                for key, winner in _winners(child.stdout or (), keys):
                    found[key] = Reply(winner, True)
                    kept.write(key, found[key])
                    progress.advance()
        if child.returncode:
            raise RunError(
                f"the judge {self.command[0]} ended with exit code {child.returncode}; its own error is above"
            )
        return found


def read_verdict(text: str) -> str | None:
    """Return the place that a text prefers: `[[A]]`, `[[B]]` or `[[C]]`; None if it names none, or several."""
    found = set(_VERDICT.findall(text))
    return _LETTERS[found.pop()] if len(found) == 1 else None


def read_rating(text: str, lowest: float, highest: float) -> float | None:
    """Return the rating in double brackets; None if there is none, or several, or if it is not on the scale."""
    found = {float(number) for number in _RATING.findall(text)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and lowest <= rating <= highest else None


def prompt_text(prompt: Text) -> str:
    """Return a prompt as text: of messages their contents, with their roles if there are several."""
    if isinstance(prompt, str):
        return prompt
    contents = [str(message.get("content") or "") for message in prompt]
    if len(prompt) == 1:
        return contents[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(prompt, contents, strict=True))


def _requests(texts: Sequence[str], sampling: Mapping[str, Any], template: Template, repeat: int) -> list[Request]:
    return [Request([{"role": "user", "content": text}], sampling, template.digest, repeat) for text in texts]


def hash_files(arguments: Sequence[str]) -> list[str]:
    """Hash the small files among arguments: a judge whose script has changed is another one."""
    scripts = [path for path in map(Path, arguments) if path.is_file() and path.stat().st_size <= LARGEST_SCRIPT]
    return [sha256(script) for script in scripts]


def _winners(lines: Iterable[str], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the winners that can be read."""
    for line in lines:
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            number, winner = row["id"], row["winner"]
            if type(number) is int and 0 <= number < len(keys) and winner in (FIRST, SECOND, TIE):
                yield keys[number], winner
