"""Rows of the formats as their data sets have them, and short names for messages."""

from pathlib import Path

from dpoctl.data.formats import read
from dpoctl.data.readers import read_file
from dpoctl.data.records import Record, Reject

FIXTURES = {file.name.partition(".")[0]: file for file in (Path(__file__).parent / "data" / "fixtures").iterdir()}
"""One file a format, by its name."""


def rows(name):
    """Read the rows of a fixture, without the nulls that a table has for absent values."""
    return [
        {column: value for column, value in row.items() if value is not None}
        for _, row in read_file(FIXTURES[name])
        if not isinstance(row, Reject)
    ]


def outcome(name, row, **options):
    """The record of a row, or the reason why there is none."""
    try:
        return read(name, row, options)
    except Reject as reject:
        return reject.reason


def outcomes(name, **options):
    """What becomes of each row of a fixture."""
    return [outcome(name, row, **options) for row in rows(name)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def pair(prompt, chosen, rejected, **fields):
    """The record of a comparison in messages."""
    history = [user(prompt)] if isinstance(prompt, str) else prompt
    return Record(history, ([assistant(chosen)], [assistant(rejected)]), ((0, 1),), **fields)


def rated(prompt, *answers):
    """The record of answers with scores."""
    texts, scores = zip(*answers, strict=True)
    history = [user(prompt)] if isinstance(prompt, str) else prompt
    return Record(history, tuple([assistant(text)] for text in texts), scores=scores)


def transcript(*turns):
    """Turns of a human and an assistant, as HH writes them."""
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}:{turn}" for number, turn in enumerate(turns))
