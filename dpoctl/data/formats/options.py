"""Options of formats: the keyword-only parameters of their functions."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpoctl.data.records import Record
from dpoctl.errors import UsageError

Format = Callable[..., Record]


class Option(NamedTuple):
    """What a format can be told."""

    name: str
    type: Any
    """`bool`, `int`, `float`, `str`, or a `Literal` of words."""
    default: Any

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(self.choices) or self.type.__name__} (default {_written(self.default)})"

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it can be, or nothing where any value of the type will do."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else ()

    def takes(self, value: Any) -> bool:
        """Whether a value is one of those that the option can have."""
        if self.choices:
            return value in self.choices
        if self.type is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return type(value) is self.type


def options_of(function: Format) -> dict[str, Option]:
    """List the options of the function of a format, by name."""
    hints = typing.get_type_hints(function)
    return {
        name: Option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def check_options(name: str, function: Format, options: Mapping[str, Any]) -> None:
    """Make sure that a format can be told this.

    Args:
        name: What the format is called.
        function: The format.
        options: Values as YAML gives them.

    Raises:
        UsageError: The format has no such option, or the option no such value.
    """
    known = options_of(function)
    hint = f"{name} takes {', '.join(map(str, known.values()))}" if known else f"{name} takes no options"
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"format {name} has no option {key!r}", hint=hint)
        if not known[key].takes(value):
            raise UsageError(f"format {name}: option {key} cannot be {_written(value)}", hint=hint)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
