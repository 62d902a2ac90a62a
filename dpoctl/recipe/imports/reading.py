"""Configs of other tools on disk: YAML and JSON files, and command lines in shell scripts; and whose they are."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpoctl.errors import UsageError
from dpoctl.recipe.document import read_scalar
from dpoctl.recipe.foreign_keys import tool_of

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
COMMANDS = {
    "llamafactory-cli": "LLaMA-Factory",
    "axolotl": "axolotl",
    "trl": "TRL",
    "tune": "torchtune",
    "train_bash.py": "LLaMA-Factory",
    "dpo.py": "TRL",
    "run_dpo.py": "TRL",
    "sft.py": "TRL",
    "run_sft.py": "TRL",
}
"""Words of a command line, and the tool that they start."""
PROCESSES = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node", "--num_gpus")


@dataclass
class Foreign:
    """A config of another tool.

    Attributes:
        tool: its name.
        config: keys and values.
        folder: of the file, which other files are named from.
        method: `sft` or `dpo`, where the command line says it; empty elsewhere.
        processes: that its command line starts; None if it does not say.
    """

    tool: str
    config: dict[str, Any]
    folder: Path
    method: str = ""
    processes: int | None = None


def read_foreign(path: Path) -> Foreign:
    """Read a config, or the command line in a script, and find out which tool it is for.

    Raises:
        UsageError: It cannot be read, or is for no tool that is known.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if path.suffix not in (".yaml", ".yml", ".json") and (words := _command(text)):
        return _from_command(words, path)
    config = _mapping(text, path)
    tool, _ = tool_of(config)
    if not tool or (isinstance(config.get("model"), dict) and "training" in config):
        raise UsageError(
            f"{path}: no config of TRL, axolotl, LLaMA-Factory, torchtune or the alignment-handbook",
            hint="it needs their keys, such as model_name_or_path or base_model",
        )
    return Foreign(tool, config, path.parent, _method_in(path))


def numbers(value: Any) -> Any:
    """Read texts that are numbers to every tool, such as 5e-6, which is a text in YAML 1.1."""
    if isinstance(value, dict):
        return {str(key): numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    return value


def _mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"{path}{place}: cannot be read: {reason}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: no mapping of keys to values, as configs are")
    found: dict[str, Any] = numbers(data)
    return found


def _command(text: str) -> list[str]:
    """Return the words of the line of a script that starts a known tool; none if there is none."""
    joined = re.sub(r"\\\n", " ", text)
    for line in joined.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if any(Path(word).name in COMMANDS for word in words):
            return words
    return []


def _from_command(words: list[str], path: Path) -> Foreign:
    at = next(index for index, word in enumerate(words) if Path(word).name in COMMANDS)
    start, tool = Path(words[at]).name, COMMANDS[Path(words[at]).name]
    options, flags = _options(words[at + 1 :])
    launcher, _ = _options(words[:at] + words[at + 1 :])
    counts = [launcher[name.lstrip("-")] for name in PROCESSES if name.lstrip("-") in launcher]
    method = next((word for word in (*flags, start) if word in ("sft", "dpo")), "") or _method_in(Path(start))
    config: dict[str, Any] = {}
    file = options.pop("config", None) or next((word for word in flags if word.endswith((".yaml", ".yml"))), None)
    if file is not None:
        named = next((one for one in (path.parent / str(file), Path(str(file))) if one.is_file()), None)
        if named is None:
            raise UsageError(f"{path}: its config {str(file)!r} is not there", hint="import that file instead")
        config = _mapping(named.read_text(encoding="utf-8-sig"), named)
        method = method or _method_in(named)
    for name in PROCESSES:
        options.pop(name.lstrip("-"), None)
    tool = tool_of(config)[0] or tool
    # A word that follows the number belongs to nothing.
    count = next((one[0] if isinstance(one, list) else one for one in counts), None)
    return Foreign(tool, _overlaid(config, options), path.parent, method, count if isinstance(count, int) else None)


def _options(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a command line, and the words that belong to none."""
    options: dict[str, Any] = {}
    free: list[str] = []
    key: str | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            options[key] = _scalar(value) if equals else True
            key = None if equals else key
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            name, _, value = word.partition("=")
            options[name], key = _scalar(value), None
        elif key is not None:
            held = options[key]
            options[key] = (
                _scalar(word) if held is True else [*(held if isinstance(held, list) else [held]), _scalar(word)]
            )
        else:
            free.append(word)
    return options, free


def _scalar(word: str) -> Any:
    if word.startswith(("{", "[")):
        return numbers(yaml.safe_load(word))
    return {"True": True, "False": False, "None": None}.get(word, numbers(read_scalar(word)))


def _overlaid(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        node = config
        *above, last = key.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def _method_in(path: Path) -> str:
    """Return the method that the name of a file, or of a folder above it, says; empty if none does."""
    words = re.split(r"[\W_]+", " ".join(path.parts[-3:]).lower())
    return next((method for method in ("dpo", "sft") if method in words), "")
