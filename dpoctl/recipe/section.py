"""The base of all sections of a recipe, and the types of their values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from dpoctl.losses.base import STRICT

Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(1), Le(1_000_000_000)]
Tokens = Annotated[int, Ge(2), Le(100_000_000)]
NewTokens = Annotated[int, Ge(1), Le(65_536)]
Probability = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]


@dataclass(frozen=True)
class Expect:
    """The words for the values of a key, where those made from its type are not clear; metadata of `Annotated`."""

    words: str


@dataclass(frozen=True)
class OneOf(Expect):
    """The words for a union of types: pydantic reports an error for each type, and this makes them one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wrap the validation of the union."""
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(self.words) from None


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are not converted, and nothing changes after loading."""

    model_config = ConfigDict(**STRICT, use_attribute_docstrings=True)


def rising(value: list[float]) -> list[float]:
    """Accept two numbers, the smaller one first."""
    if len(value) != 2 or not value[0] <= value[1]:
        raise ValueError("not a range")
    return value


Range = Annotated[list[float], AfterValidator(rising), Expect("two numbers, the smaller one first")]
