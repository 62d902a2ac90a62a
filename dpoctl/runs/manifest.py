"""What makes a folder a good checkpoint: a list of its files with sizes and SHA-256 sums, written last."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dpoctl.runs.files import sha256, to_json, write_atomically

NAME = "manifest.json"
FORMAT = 1


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, as they stand on the disk."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Declare a folder complete.

    Args:
        folder: Where its files lie already.
        content: Anything JSON can say; its `files` are what `describe_files` returned.
    """
    body = {"format": FORMAT, **content}
    write_atomically(folder / NAME, to_json({**body, "checksum": _checksum(body)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: There is none, it is damaged, or a newer version wrote it; says which in the user's words.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{NAME} cannot be read") from None
    if checksum != _checksum(content):
        raise ValueError(f"{NAME} is damaged")
    if content["format"] != FORMAT:
        raise ValueError(f"{NAME} has format {content['format']}, this version reads {FORMAT}")
    return dict(content)


def find_damage(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a folder, or None if it is as its manifest says.

    Args:
        folder: Where its manifest lies.
        hashes: Whether to read every byte; without, only names and sizes are compared.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink():
            return f"{name} is not a file of this checkpoint"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if hashes and sha256(file) != expected["sha256"]:
            return f"{name} has a wrong checksum"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
