"""Recipes as YAML 1.2: reading with the place of every key and value, applying overrides, and writing."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
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

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, Place, RecipeError, dotted, shown
from dpoctl.redact import redact_source

MAX_DEPTH = 20
MAX_VALUES = 10_000
LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SYNTAX = {
    "mapping values are not allowed": "unexpected ':'; quote the value, or fix the indentation",
    "could not find expected ':'": "expected 'key: value'",
    "did not find expected key": "expected a key here; indent it like the keys above",
    "expected <block end>": "expected a key here; indent it like the keys above",
    "found unexpected end of stream": "this quote is never closed",
    "did not find expected ',' or": "this bracket is never closed",
    "expected ',' or": "this bracket is never closed",
    "did not find expected '-' indicator": "expected '- item' here; indent it like the items above",
    "block sequence entries are not allowed": "a list cannot start here; put it on its own line",
    "did not find expected node content": "expected a value here",
    "expected the node content": "expected a value here",
    "undefined tag handle": "tags (!...) are not supported; remove the tag",
    "found undefined alias": "aliases (*...) are not supported; repeat the value",
}
INTEGER = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
CONSTANTS: dict[str, bool | None] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
MAX_DIGITS = 40
VARIABLE = re.compile(r"\$(?:\{\w+\}|[A-Za-z_]\w*)", re.ASCII)
"""A variable of the shell."""
WriteOut = Callable[[KeyPath, Any, str | int], Any]


@dataclass
class Document:
    """A YAML document as plain data, with the places of its parts.

    Args:
        name: The file as the user named it.
        data: Mappings, lists and scalars.
        keys: The place of each key, by its path.
        values: The place of each value, by its path.
        problems: The errors of reading and of overrides; `data` has null in place of a refused value.
    """

    name: str
    data: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)

    def find(self, path: KeyPath) -> KeyPath:
        """Return the path as written: without the parts that a short form leaves out, or that are missing."""
        found: KeyPath = ()
        node = self.data
        for part in path:
            in_mapping = isinstance(node, dict) and part in node
            if in_mapping or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
                found += (part,)
                node = node[part]
        return found

    def at(self, path: KeyPath) -> Any:
        """Return the value at a path as written; None where there is none."""
        node = self.data
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node

    def has(self, path: KeyPath) -> bool:
        """Return whether a key is written and not null."""
        node = self.data
        for part in path:
            if isinstance(node, list) and isinstance(part, str):
                continue  # the name of an eval set that is written as a list without a name
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return False
        return node is not None

    def is_in_force(self, path: KeyPath, rivals: tuple[KeyPath, ...]) -> bool:
        """Return whether a key is set; a value of the file does not count if an override sets one of its rivals."""
        overruled = any(self.key_place(rival).override for rival in rivals)
        return self.has(path) and not (overruled and not self.key_place(path).override)

    def key_place(self, path: KeyPath) -> Place:
        """Return the place of a key, or of the nearest key above it."""
        written = self.find(path)
        while written and written not in self.keys:
            written = written[:-1]
        return self.keys.get(written) or self.values.get(()) or Place(self.name, 1, 1)

    def value_place(self, path: KeyPath) -> Place:
        """Return the place of a value."""
        return self.values.get(self.find(path)) or self.key_place(path)

    def locate(self, diagnostic: Diagnostic) -> Diagnostic:
        """Return a diagnostic with the place of its key."""
        return replace(diagnostic, place=self.key_place(diagnostic.path))


def read_document(text: str, name: str) -> Document:
    """Read one YAML document.

    Raises:
        RecipeError: The text is not YAML, nested too deeply, or too large.
    """
    # The whole text at once: what is secret may stand on other lines than its name.
    lines = LINE_BREAK.split(redact_source(text))

    def place(line: int, column: int) -> Place:
        return Place(name, line + 1, column + 1, lines[line] if line < len(lines) else "")

    return _read(text, name, place)


def read_value(text: str, place: Place) -> Document:
    """Read the value of an override, all of which has the same place."""
    return _read(text, place.source, lambda line, column: place)


def apply_overrides(
    document: Document,
    overrides: Sequence[str],
    known: Iterable[KeyPath],
    write_out: WriteOut = lambda path, value, part: value,
) -> None:
    """Apply overrides to a document, in their order.

    Args:
        document: A recipe whose root is a mapping; wrong overrides are added to its problems.
        overrides: `key=value` texts: a full key, or its last part if that is unique; the value is YAML.
        known: All keys of the schema.
        write_out: Writes out the short form of a value at a path, if a part is to be set inside of it.
    """
    paths = list(known)
    for number, text in enumerate(overrides, start=1):
        place = Place(document.name, excerpt=text, override=number)
        try:
            _apply(document, text, place, paths, write_out)
        except RecipeError as error:
            document.problems += error.problems


def read_scalar(text: str) -> str | int | float | bool | None:
    """Read a plain scalar.

    Raises:
        ValueError: The number is infinite, not a number, or too long.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if not (INTEGER.match(text) or FLOAT.match(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    if INTEGER.match(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    number = math.inf if text[-1] in "fFnN" else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys."""
    if not isinstance(value, Mapping):
        return {path: value}
    items = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    return {name: leaf for key, item in items for name, leaf in flatten(item, key).items()}


def write_yaml(data: Any, *, inline: bool = False) -> str:
    """Write plain data as YAML, with keys in the given order.

    Args:
        data: Mappings, lists and scalars.
        inline: Write it on one line, for an error message.
    """
    text = yaml.dump(
        data,
        Dumper=_Writer,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=inline,
        width=10**6 if inline else 110,
    )
    return text.removesuffix("\n").removesuffix("\n...") if inline else text


def _read(text: str, name: str, place: Callable[[int, int], Place]) -> Document:
    document = Document(name)
    try:
        _Composer(yaml.parse(text, Loader=LOADER), document, place).compose()
    except yaml.YAMLError as error:
        line, column, message = _syntax_error(error, text)
        raise RecipeError([Diagnostic.error((), message, place(line, column))]) from None
    return document


class _Composer:
    """Builds a document from parser events.

    `yaml.compose` is not used: it loses anchors, resolves aliases, and has no limit on nesting. In its C form, a file
    of 100,000 open brackets overflows the stack and ends the process.
    """

    def __init__(self, events: Iterator[Event], document: Document, place: Callable[[int, int], Place]) -> None:
        self._events = events
        self._document = document
        self._place = place

    def compose(self) -> None:
        """Fill the document."""
        documents = (event for event in self._events if isinstance(event, DocumentStartEvent))
        if next(documents, None):
            self._document.data = self._value(next(self._events), ())
        if second := next(documents, None):
            self._refuse(second, (), "a second document starts here; a recipe is a single document")

    def _at(self, event: Event) -> Place:
        mark = event.start_mark
        return self._place(mark.line, mark.column) if mark else self._place(0, 0)

    def _refuse(self, event: Event, path: KeyPath, message: str) -> None:
        self._document.problems.append(Diagnostic.error(path, message, self._at(event)))

    def _value(self, event: Event, path: KeyPath) -> Any:
        self._document.values[path] = self._at(event)
        if len(path) > MAX_DEPTH:
            raise RecipeError([Diagnostic.error((), f"nested more than {MAX_DEPTH} levels deep", self._at(event))])
        if len(self._document.values) > MAX_VALUES:
            message = f"more than {MAX_VALUES:,} values; is this a recipe?"
            raise RecipeError([Diagnostic.error((), message, self._at(event))])
        if isinstance(event, AliasEvent):
            self._refuse(event, path, f"aliases (*{event.anchor}) are not supported; repeat the value")
            return None
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        if event.anchor is not None:
            self._refuse(event, path, f"anchors (&{event.anchor}) are not supported; remove the anchor")
        if event.tag is not None:
            self._refuse(event, path, f"tags ({event.tag}) are not supported; remove the tag")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        return self._mapping(path) if isinstance(event, MappingStartEvent) else self._sequence(path)

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> str | int | float | bool | None:
        if not event.implicit[0]:
            if "\0" in event.value:
                self._refuse(event, path, "the character NUL is not allowed in a value")
                return None
            return str(event.value)
        try:
            return read_scalar(event.value)
        except ValueError as error:
            self._refuse(event, path, str(error))
            return None

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise RecipeError([Diagnostic.error((), "a key must be plain text", self._at(event))])
            key = (*path, event.value)
            if event.anchor is not None or event.tag is not None:
                self._refuse(event, (), "anchors and tags are not supported; write the key without them")
            if event.value == "<<":
                self._refuse(event, key, "merge keys (<<) are not supported; repeat the keys")
            elif event.value in mapping:
                first = self._document.keys[key].line
                where = f" (first set on line {first})" if first else ""
                self._refuse(event, (), f"duplicate key {shown(event.value)}{where}; remove one")
            self._document.keys[key] = self._at(event)
            mapping[event.value] = self._value(next(self._events), key)
        return mapping


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, int, str]:
    """Return line and column (from 0) of a syntax error, and the message."""
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
        return len(lines) - 1, len(lines[-1]), "the file ends too early; is a bracket or a quote still open?"
    line = lines[mark.line]
    if variable := VARIABLE.search(line):
        message = f"variables are not expanded in recipes, and {variable[0]} is one; write its value, or use --set"
        return mark.line, mark.column, message
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return mark.line, line.index("\t"), "YAML cannot be indented with tabs; use spaces"
    if "cannot start any token" in said:
        ours = f"a value cannot start with {shown(line[mark.column :][:1])}; quote it"
    return mark.line, mark.column, ours


def _apply(document: Document, text: str, place: Place, known: list[KeyPath], write_out: WriteOut) -> None:
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise RecipeError([Diagnostic.error((), f"expected key=value, got {shown(text)}", place)])
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError([Diagnostic.error((), f"not UTF-8 text: {shown(text)}", place)])
    given = read_value(value, place)
    path = _assign(document, _resolve(name.strip(), place, known), given.data, place, write_out)
    document.problems += [replace(problem, path=(*path, *problem.path)) for problem in given.problems]
    document.values |= dict.fromkeys(((*path, *inner) for inner in given.values), place)
    document.keys |= dict.fromkeys(((*path, *inner) for inner in given.keys), place)


def _resolve(name: str, place: Place, known: list[KeyPath]) -> KeyPath:
    # An item of a list is `train[0]`, as messages write it, or `train.0`.
    parts = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in parts)
    if any(candidate[0] == path[0] for candidate in known):
        return path
    for end in range(len(path), 0, -1):
        matches = [candidate for candidate in known if candidate[-end:] == path[:end]]
        # Settings of training take precedence over those of evaluation: `seed` is training.seed.
        matches = [match for match in matches if match[0] != "eval"] or matches
        if len(matches) > 1:
            several = ", ".join(dotted(match) for match in matches)
            message = f"{name!r} is ambiguous ({several}); write the full key"
            raise RecipeError([Diagnostic.error((), message, place)])
        if matches:
            return (*matches[0], *path[end:])
    return path


def _assign(document: Document, path: KeyPath, value: Any, place: Place, write_out: WriteOut) -> KeyPath:
    """Set a value, and create the sections above it; return the path as it is written now."""
    node = document.data
    written: KeyPath = ()
    for part, inner in pairwise(path):
        written += (_checked_part(node, part, written, place),)
        if isinstance(node, dict) and node.get(written[-1]) is None:
            node[written[-1]] = {}
            document.keys[written] = document.values[written] = place
        node[written[-1]] = write_out(written, node[written[-1]], inner)
        node = node[written[-1]]
    written += (_checked_part(node, path[-1], written, place),)
    node[written[-1]] = value
    for places in (document.keys, document.values):
        for stale in [other for other in places if other[: len(written)] == written]:
            del places[stale]
    document.keys[written] = place
    return written


def _checked_part(node: Any, part: str | int, above: KeyPath, place: Place) -> str | int:
    """Return a part of a path as the key or index of its container, if the container can have it."""
    if isinstance(node, dict):
        return str(part)
    if not isinstance(node, list):
        raise RecipeError([Diagnostic.error((), f"{dotted(above)} is {shown(node)}, which has no keys", place)])
    if not isinstance(part, int):
        message = f"{dotted(above)} is a list of {len(node)}; add an index, e.g. {dotted(above)}[0].{part}"
        raise RecipeError([Diagnostic.error((), message, place)])
    if part >= len(node):
        items = f"{len(node)} item{'s' * (len(node) != 1)}"
        message = f"{dotted(above)} has {items}, so there is no item {part} (the first is 0)"
        raise RecipeError([Diagnostic.error((), message, place)])
    return part


class _Writer(yaml.SafeDumper):
    """Writes YAML that versions 1.1 and 1.2 read alike: text that one of them takes for a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a repeated value again: recipes have no aliases."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list under its key."""
        return super().increase_indent(flow, False)


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Writer.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
