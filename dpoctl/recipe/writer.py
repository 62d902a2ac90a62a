"""Writing YAML that a YAML 1.1 and a YAML 1.2 reader understand alike."""

from typing import Any

import yaml

from dpoctl.recipe.scalars import FLOAT, INTEGER


class _Writer(yaml.SafeDumper):
    """Quotes a text that either version would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out each time: recipes have no aliases."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list under its key."""
        return super().increase_indent(flow, False)


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Writer.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def write_yaml(data: Any, *, inline: bool = False) -> str:
    """Write plain data as YAML, in its own order.

    Args:
        data: Mappings, lists and scalars.
        inline: On one line, as in an error message.
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
