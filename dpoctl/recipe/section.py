"""What the sections of a recipe are made of."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict

DType = Literal["auto", "float32", "bfloat16", "float16"]
Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Probability = Annotated[float, Ge(0), Lt(1)]


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no coercion, no changes after it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
