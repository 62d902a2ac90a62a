"""Pages from templates: all values are escaped, and characters that cannot be shown are written out."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from dpoctl import console

TEMPLATES = Path(__file__).parent / "templates"


@cache
def template(name: str) -> Template:
    """Return a template of the folder `templates`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _printable(value: Any) -> Any:
    # What is HTML already stays so.
    return type(value)(console.printable(value)) if isinstance(value, str) else value
