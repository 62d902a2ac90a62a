"""Chat templates that a recipe can name: one `.jinja` file each. To add one, add the file."""

from importlib.resources import files
from pathlib import Path

from dpoctl.errors import UsageError

NAMES = tuple(
    sorted(file.name.removesuffix(".jinja") for file in files(__package__).iterdir() if file.name.endswith(".jinja"))
)


def template_text(name_or_path: str) -> str:
    """Read a chat template, by its built-in name or from a `.jinja` file.

    Raises:
        UsageError: It is neither a built-in name nor a file that can be read.
    """
    if name_or_path in NAMES:
        return files(__package__).joinpath(f"{name_or_path}.jinja").read_text(encoding="utf-8")
    path = Path(name_or_path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a device or a pipe may have no end
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"model.chat_template: no template named {name_or_path!r}, and no such file can be read",
            hint=f"built-in names are {', '.join(NAMES)}; anything else is the path of a .jinja file",
        ) from error
