"""What a key takes besides its type: short forms that are read as long ones, and choices that types cannot say."""

import re
from typing import Any

from pydantic_core import PydanticCustomError

HUB_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def refuse(expected: str) -> PydanticCustomError:
    """Make the error that says what was expected."""
    return PydanticCustomError("expectation", "expected {expected}", {"expected": expected})


def exactly_one(value: Any) -> Any:
    """Take the number 1 alone."""
    # To pydantic's Literal, True and 1.0 are the number 1.
    if type(value) is not int:
        raise refuse("1")
    return value


def source_list(value: Any) -> Any:
    """Read a bare string as a list of one source."""
    return [value] if isinstance(value, str) else value


def source_path(value: Any) -> Any:
    """Read a bare string as the path of a source."""
    return {"path": value} if isinstance(value, str) else value


def eval_sets(value: Any) -> Any:
    """Read a bare list as the one eval set named `eval`, and null as none."""
    if value is None:
        return {}
    return {"eval": value} if isinstance(value, str | list) else value


def name_list(value: Any) -> Any:
    """Read a bare name as a list of one, and `none` as an empty list."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


def one_or_several(value: Any) -> Any:
    """Take a mapping, or a list of mappings."""
    if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(one, dict) for one in value)):
        return value
    raise refuse("a mapping such as {type: sigmoid, beta: 0.1}, or a list of them")


def lora_targets(value: Any) -> Any:
    """Take all-linear, or a list of names."""
    if value == "all-linear" or (
        isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    ):
        return value
    raise refuse("all-linear, or a list of module names")


def auto_or_count(value: Any) -> Any:
    """Take auto, or a whole number."""
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise refuse("auto, or a whole number of at least 1")


def auto_or_flag(value: Any) -> Any:
    """Take auto, or a flag."""
    if value == "auto" or isinstance(value, bool):
        return value
    raise refuse("auto, true or false")


def held_out(value: Any) -> Any:
    """Take a share or a number of rows."""
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    if value is None:
        return None
    raise refuse("a share above 0 and below 1, a whole number of rows of at least 1, or null")


def hub_repository(value: Any) -> Any:
    """Take the name of a repository on the hub with its owner's."""
    if value is None or (isinstance(value, str) and HUB_REPOSITORY.fullmatch(value)):
        return value
    raise refuse("owner/name, or null")


def typed_config(value: dict[str, Any]) -> dict[str, Any]:
    """Take a config that names its type."""
    if not isinstance(value.get("model_type"), str):
        raise refuse("a transformers config that names its model_type")
    return value
