"""A config of another tool on its way to a recipe: what is still to be read, the recipe so far, and the report."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter

from dpoctl.recipe.diagnostics import dotted
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.foreign_keys import changes_nothing, translate_value, why_not_offered
from dpoctl.recipe.key_errors import hint_at, hints, unwrap
from dpoctl.recipe.loader import known_paths
from dpoctl.recipe.schema import Recipe

OFF: tuple[Any, ...] = (None, False, "", "no", "none", "None", [], {})
"""Values by which a key is switched off, or left to its default."""
SECTIONS = ("model", "lora", "data", "sft", "dpo", "training")
SAME = {
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "neft_alpha": "sft.neftune_noise_alpha",
}
"""Other names of keys that a recipe has, or may have."""
QUIET = ("training.logging_steps", "training.eval_on_start", "training.ddp_timeout")
"""Keys that do not change the result, whose values may have another form here."""
UNKNOWN = "dpoctl does not know this key: look up what it does"


@dataclass
class Fate:
    """The fate of a key, a line of the report.

    Attributes:
        theirs: the key of the other tool, with its value.
        ours: the key of the recipe, with its value; empty if there is none.
        why: what is to be known about it.
    """

    theirs: str
    ours: str = ""
    why: str = ""

    def __str__(self) -> str:
        """Write it as text."""
        return "".join((self.theirs, f" -> {self.ours}" if self.ours else "", f": {self.why}" if self.why else ""))


@dataclass
class Report:
    """The fate of every key of a config.

    Attributes:
        tool: that the config is for.
        carried: keys with the same meaning in a recipe, and the tool's defaults that are written out.
        changed: keys whose value has another form or another meaning in a recipe.
        lost: keys without equivalent that change the result.
        needless: keys without equivalent that do not change the result.
        unset: keys that are switched off.
    """

    tool: str
    carried: list[Fate] = field(default_factory=list)
    changed: list[Fate] = field(default_factory=list)
    lost: list[Fate] = field(default_factory=list)
    needless: list[Fate] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        parts = ("carried", "changed", "lost", "needless")
        found = {part: [vars(line) for line in getattr(self, part)] for part in parts}
        return {"tool": self.tool, **found, "unset": self.unset}

    def text(self) -> str:
        """Return the report for people."""
        titles = {
            "carried over": self.carried,
            "changed in form or meaning": self.changed,
            "WITHOUT EQUIVALENT, and it changes the result": self.lost,
            "without equivalent; the result is the same": self.needless,
        }
        blocks = [
            "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in titles.items() if lines
        ]
        if self.unset:
            blocks.append(f"switched off, and left out:\n  {', '.join(self.unset)}")
        return "\n".join(blocks)


class Translation:
    """A config whose keys are taken one after the other.

    Args:
        tool: that the config is for.
        config: its keys and values.
        processes: the number of processes that it is for; None if nothing says it.
        template: the path of a file for a chat template that stands in the config.
    """

    def __init__(self, tool: str, config: Mapping[str, Any], processes: int | None, template: str) -> None:
        self.report = Report(tool)
        self.recipe: dict[str, Any] = {}
        self.processes, self.is_counted, self.template = processes or 1, processes is not None, template
        self.templates: dict[str, str] = {}
        self._left = dict(config)

    @property
    def devices(self) -> str:
        """The number of devices in words."""
        if self.is_counted:
            return "1 device" if self.processes == 1 else f"{self.processes} devices"
        return "1 device, which the config does not say: --num-processes N for more"

    def has(self, *keys: str) -> bool:
        """Whether one of these keys is still there, and switched on."""
        return any(self._left.get(key) not in OFF for key in keys)

    def peek(self, key: str, default: Any = None) -> Any:
        """Return the value of a key that stays to be taken; the default if it is not set."""
        value = self._left.get(key)
        return default if value is None else value

    def take(self, *keys: str, default: Any = None) -> Any:
        """Take keys that mean the same, and return the value of the first that is set."""
        values = [self._left.pop(key) for key in keys if key in self._left]
        return next((value for value in values if value is not None), default)

    def take_named(self, *keys: str) -> tuple[str, Any]:
        """Take keys that mean the same; return the first that is set and its value, or the first and None."""
        name = next((key for key in keys if self._left.get(key) is not None), keys[0])
        return name, self.take(*keys)

    def put(self, path: str, value: Any) -> None:
        """Set a key of the recipe, without a line in the report."""
        *sections, key = path.split(".")
        node = self.recipe
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value

    def get(self, path: str) -> Any:
        """Return a value of the recipe so far; None if it has none."""
        node: Any = self.recipe
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def replace(self, change: Callable[[Any], Any]) -> None:
        """Change the values of all keys that are still there."""
        self._left = {key: change(value) for key, value in self._left.items()}

    def note(self, theirs: str, ours: str) -> None:
        """Report something that is carried over."""
        self.report.carried.append(Fate(theirs, ours))

    def carry(self, key: str, path: str, *, default: Any = None, also: Iterable[str] = ()) -> None:
        """Carry a key over under its name here, with the tool's default if it is not set.

        Args:
            key: of the other tool.
            path: of the recipe.
            default: of the other tool, which is written out; None leaves dpoctl's.
            also: other names of the key.
        """
        names = [name for name in (key, *also) if name in self._left]
        value = self.take(key, *also)
        if value is None and default is None:
            return
        theirs = f"{names[0]}: {short(value)}" if value is not None else f"{key}: {short(default)} (its default)"
        value = default if value is None else value
        meant, remark = value, ""
        if not fits(path, value):
            meant, remark = translate_value(path.rpartition(".")[2], str(value)) or (value, "")
        if not fits(path, meant):
            self.report.lost.append(Fate(theirs, why=f"{path} does not take this value"))
            return
        meant = validated(path, meant)
        self.put(path, meant)
        lines = self.report.changed if remark else self.report.carried
        lines.append(Fate(theirs, f"{path}: {short(meant)}", remark))

    def change(self, theirs: str, path: str, value: Any, why: str) -> None:
        """Set a key of the recipe to something that is not what the other tool has."""
        self.put(path, value)
        self.report.changed.append(Fate(theirs, f"{path}: {short(value)}", why))

    def alter(self, theirs: str, ours: str, why: str) -> None:
        """Report something whose form or meaning changes, and that the caller sets."""
        self.report.changed.append(Fate(theirs, ours, why))

    def lose(self, theirs: str, why: str) -> None:
        """Report something without equivalent that changes the result."""
        self.report.lost.append(Fate(theirs, why=why))

    def drop(self, theirs: str, why: str) -> None:
        """Report something without equivalent that does not change the result."""
        self.report.needless.append(Fate(theirs, why=why))

    def finish(self) -> None:
        """Carry over what is left and has a key of its name here, and report the rest."""
        for key, value in list(self._left.items()):
            target = known_target(key)
            if value in OFF and not isinstance(value, int | float):
                self.report.unset.append(key)
            elif target is not None and target.startswith("lora.") and "lora" not in self.recipe:
                self.drop(f"{key}: {short(value)}", "there is no adapter")
            elif target is not None and target.partition(".")[0] in {"sft", "dpo"} - {self.get("method")}:
                self.lose(f"{key}: {short(value)}", f"here it is a key of `dpoctl {target.partition('.')[0]}`")
            elif target is not None and self.get(target) is None and is_taken(target, value):
                self.carry(key, target)
            elif value is False:
                self.report.unset.append(key)
            elif changes_nothing(key) or target in QUIET:
                self.drop(f"{key}: {short(value)}", why_not_offered(key) or "this value has no counterpart here")
            else:
                self.lose(f"{key}: {short(value)}", why_not_offered(key) or UNKNOWN)
        self._left.clear()


@cache
def known_target(key: str) -> str | None:
    """Return the key of the schema that is the only one of this last name, or known to mean the same; None without one.

    What the schema has is asked, and not listed here: a key that it gets later is carried over from then on.
    """
    if key in SAME:
        return SAME[key]
    found = [dotted(path) for path in known_paths() if path[-1] == key and len(path) > 1 and path[0] in SECTIONS]
    return found[0] if len(found) == 1 else None


def validated(path: str, value: Any) -> Any:
    """Return the value of a key as the schema reads it.

    Raises:
        ValueError: The schema has no such key, or does not take the value.
    """
    *above, key = path.split(".")
    section, _ = unwrap(hint_at(Recipe, above))
    if not (isinstance(section, type) and issubclass(section, BaseModel) and key in hints(section)):
        raise ValueError(path)
    try:
        return TypeAdapter(hints(section)[key], config=ConfigDict(strict=True)).validate_python(value)
    except PydanticUserError:  # a section, whose own settings count
        return TypeAdapter(hints(section)[key]).validate_python(value)


def fits(path: str, value: Any) -> bool:
    """Whether the schema has a key, and takes a value for it."""
    try:
        validated(path, value)
    except ValueError:
        return False
    return True


def is_taken(path: str, value: Any) -> bool:
    """Whether the schema takes a value for a key, as it is or under another name."""
    meant = translate_value(path.rpartition(".")[2], str(value))
    return fits(path, value) or (meant is not None and fits(path, meant[0]))


def short(value: Any) -> str:
    """Write a value as in YAML, on one line, cut where it is long."""
    text = " ".join((value if isinstance(value, str) else write_yaml(value, inline=True)).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
