"""Reading YAML 1.2 with the place of every key and value; the parts of YAML that surprise are refused."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from dpoctl.recipe.expect import Path
from dpoctl.recipe.problems import Place, Problem, RecipeError, shown
from dpoctl.recipe.scalars import read_scalar

MAX_DEPTH = 20
MAX_VALUES = 10_000
LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SYNTAX = {
    "mapping values are not allowed": "a ':' that belongs to no key; quote the value, or mend the indentation",
    "could not find expected ':'": "expected 'key: value'",
    "did not find expected key": "expected a key here; is the indentation that of the keys above?",
    "expected <block end>": "expected a key here; is the indentation that of the keys above?",
    "found unexpected end of stream": "a quote is opened and never closed",
    "did not find expected ',' or": "a bracket or brace is opened and never closed",
    "expected ',' or": "a bracket or brace is opened and never closed",
    "did not find expected '-' indicator": "expected '- item'; is the indentation that of the items above?",
    "block sequence entries are not allowed": "a list cannot start here; put it on a line of its own",
    "did not find expected node content": "expected a value here",
    "expected the node content": "expected a value here",
    "undefined tag handle": "tags (!...) are not read; write the value plainly",
    "found undefined alias": "aliases (*...) are not read; write the value out",
}


@dataclass
class Document:
    """Plain data, and where each part of it stands.

    Args:
        name: The file as the user named it.
        data: Mappings, lists and scalars.
        keys: The place of each key, by its path.
        values: The place of each value, by its path.
        problems: What was refused on the way; `data` holds null there.
    """

    name: str
    data: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def find(self, path: Path) -> Path:
        """The path as it was written: without the steps that a shorthand left out, or that are missing."""
        found: Path = ()
        node = self.data
        for part in path:
            in_mapping = isinstance(node, dict) and part in node
            if in_mapping or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
                found += (part,)
                node = node[part]
        return found

    def has(self, path: Path) -> bool:
        """Whether a key is written and not null."""
        node = self.data
        for part in path:
            if isinstance(node, list) and isinstance(part, str):
                continue  # the name of an eval set that is written as a bare list
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return False
        return node is not None

    def stands(self, path: Path, rivals: tuple[Path, ...]) -> bool:
        """Whether a key is written and not null, and no override of a rival has put the file's word aside."""
        overruled = any(self.key_place(rival).override for rival in rivals)
        return self.has(path) and not (overruled and not self.key_place(path).override)

    def key_place(self, path: Path) -> Place:
        """Where a key stands, or the nearest key above it."""
        written = self.find(path)
        while written and written not in self.keys:
            written = written[:-1]
        return self.keys.get(written) or self.values.get(()) or Place(self.name, 1, 1)

    def value_place(self, path: Path) -> Place:
        """Where a value stands."""
        return self.values.get(self.find(path)) or self.key_place(path)


def read_document(text: str, name: str) -> Document:
    """Read one YAML document.

    Raises:
        RecipeError: It is not YAML, or deeper than 20 levels.
    """
    lines = LINE_BREAK.split(text)

    def place(line: int, column: int) -> Place:
        return Place(name, line + 1, column + 1, lines[line] if line < len(lines) else "")

    return _read(text, name, place)


def read_value(text: str, place: Place) -> Document:
    """Read the value of an override; everything in it stands at the one place."""
    return _read(text, place.source, lambda line, column: place)


def _read(text: str, name: str, place: Callable[[int, int], Place]) -> Document:
    document = Document(name)
    try:
        _Composer(yaml.parse(text, Loader=LOADER), document, place).compose()
    except yaml.YAMLError as error:
        line, column, message = _syntax_error(error, text)
        raise RecipeError([Problem(place(line, column), message)]) from None
    return document


class _Composer:
    """Builds a document from parser events; PyYAML's own composer would expand aliases and forget keys."""

    def __init__(self, events: Iterator[Event], document: Document, place: Callable[[int, int], Place]) -> None:
        self._events = events
        self._document = document
        self._place = place

    def compose(self) -> None:
        """Fill the document in."""
        documents = 0
        for event in self._events:
            if not isinstance(event, DocumentStartEvent):
                continue
            documents += 1
            if documents > 1:
                self._refuse(event, (), "a second document starts here; a recipe is one document")
                return
            self._document.data = self._value(next(self._events), ())

    def _at(self, event: Event) -> Place:
        mark = event.start_mark
        return self._place(mark.line, mark.column) if mark else self._place(0, 0)

    def _refuse(self, event: Event, path: Path, message: str) -> None:
        self._document.problems.append(Problem(self._at(event), message, path))

    def _value(self, event: Event, path: Path) -> Any:
        self._document.values[path] = self._at(event)
        if len(path) > MAX_DEPTH:
            raise RecipeError([Problem(self._at(event), f"more than {MAX_DEPTH} levels deep")])
        if len(self._document.values) > MAX_VALUES:
            raise RecipeError([Problem(self._at(event), f"more than {MAX_VALUES:,} values; is this a recipe?")])
        if isinstance(event, AliasEvent):
            self._refuse(event, path, f"aliases (*{event.anchor}) are not read; write the value out")
            return None
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        if event.anchor is not None:
            self._refuse(event, path, f"anchors (&{event.anchor}) are not read; write the value plainly")
        if event.tag is not None:
            self._refuse(event, path, f"tags ({event.tag}) are not read; write the value plainly")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        return self._mapping(path) if isinstance(event, MappingStartEvent) else self._sequence(path)

    def _scalar(self, event: ScalarEvent, path: Path) -> str | int | float | bool | None:
        if not event.implicit[0]:
            if "\0" in event.value:
                self._refuse(event, path, "the character NUL can be part of no value")
                return None
            return str(event.value)
        try:
            return read_scalar(event.value)
        except ValueError as error:
            self._refuse(event, path, str(error))
            return None

    def _sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise RecipeError([Problem(self._at(event), "a key must be a plain text")])
            key = (*path, event.value)
            if event.anchor is not None or event.tag is not None:
                self._refuse(event, (), "anchors and tags are not read; write the key plainly")
            if event.value == "<<":
                self._refuse(event, key, "merge keys (<<) are not read; write the keys out")
            elif event.value in mapping:
                first = self._document.keys[key].line
                where = f" (first set on line {first})" if first else ""
                self._refuse(event, (), f"duplicate key {shown(event.value)}{where}")
            self._document.keys[key] = self._at(event)
            mapping[event.value] = self._value(next(self._events), key)
        return mapping


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, int, str]:
    """Line, column (from 0) and our words for a syntax error."""
    if isinstance(error, yaml.reader.ReaderError):
        before = LINE_BREAK.split(text[: error.position])
        return len(before) - 1, len(before[-1]), "a character that YAML does not allow"
    mark = getattr(error, "problem_mark", None)
    said = str(getattr(error, "problem", None) or "this is not YAML")
    ours = next((words for theirs, words in SYNTAX.items() if theirs in said), said)
    if "never closed" in ours:
        mark = getattr(error, "context_mark", None) or mark
    if mark is None:
        return 0, 0, ours
    lines = LINE_BREAK.split(text.rstrip())
    if mark.line >= len(lines):
        return len(lines) - 1, len(lines[-1]), "the file ends here, and more is expected; is a bracket open?"
    line = lines[mark.line]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return mark.line, line.index("\t"), "a tab cannot indent YAML; use spaces"
    if "cannot start any token" in said:
        ours = f"a value cannot start with {shown(line[mark.column :][:1])}; quote it"
    return mark.line, mark.column, ours
