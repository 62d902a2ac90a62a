"""What all sections of a recipe are made of: their base class, words for their values, and types of several keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from dpoctl.losses.base import STRICT

Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(1), Le(1_000_000_000)]
NewTokens = Annotated[int, Ge(1), Le(65_536)]


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
