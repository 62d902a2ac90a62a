"""Names of the libraries as values of a recipe: schedules, optimizers, and expressions for modules of a model."""

import re
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import AfterValidator

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
    "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
Optim = Literal[
    "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "lion_32bit", "lion_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "muon", "rmsprop",
]  # fmt: skip
OPTIM_ALIASES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
}
"""Other names of optimizers -> those of `Optim`."""


def optim_name(value: Any) -> Any:
    """Read another name of an optimizer as its name here."""
    return OPTIM_ALIASES.get(value, value) if isinstance(value, str) else value


InitLoraWeights = Literal["default", "gaussian", "pissa", "olora"]


def init_name(value: Any) -> Any:
    """Read `true`, as peft calls it, as the default start of an adapter."""
    return "default" if value is True else value


def module_expression(value: str) -> str:
    """Accept a regular expression that is not the mere name of a module: peft compares it with whole names."""
    if not set(value) & set("*+?[(|\\^$"):
        raise ValueError("a name; put it in a list")
    return module_pattern(value)


def module_pattern(value: str) -> str:
    """Accept a regular expression, or a name, which is one too."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return value


ModulePattern = Annotated[str, MinLen(1), AfterValidator(module_pattern)]
