"""Keep secrets out of whatever is written down or sent to a tracker."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "<redacted>"  # a plain word of YAML, and none that is hidden once more
_WORDS = r"(?:token|secret|password|passwd|api[_-]?key|access_?key|credentials?)"
# The names of a tokenizer's own tokens, which are no secrets.
_HARMLESS = r"(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video|boi|eoi|think|special|first|last|end|start)[_-]?"
_SECRET_NAME = re.compile(rf"(?:^|[_.\-]){_WORDS}$", re.IGNORECASE)
_HARMLESS_NAME = re.compile(rf"(?:^|\.){_HARMLESS}token$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?<![\w-])(?!{_HARMLESS}token\b)(?:[\w-]*[_-])?{_WORDS}[\"']?\s*[:=]\s*)([\"']?)[^\s\"',}}\]]+", re.IGNORECASE
)
_SHORTEST = 8  # a shorter value of the environment is as likely a word of its own
_SECRET_TEXT = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|sk-[\w-]{16,}|wandb_v1_\w{8,}|AKIA[0-9A-Z]{16})"
)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:token|secret|password|key|signature))=[^&\s]+", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain nested data without secrets.

    Args:
        value: Strings below a key such as `hub_token` or `api_key` are hidden, others are searched by `redact_text`.
        name: The key that `value` stands under.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and _is_secret(name) else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """Hide what looks like an access token, what the environment calls one, and the user and password of a URL."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _is_secret(name):
            text = text.replace(value, HIDDEN)
    text = _SECRET_TEXT.sub(HIDDEN, text)
    text = _USERINFO.sub(HIDDEN, text)
    return _QUERY.sub(rf"\1={HIDDEN}", text)


def redact_source(text: str) -> str:
    """Hide the secrets of YAML or of a traceback: also what stands after `hub_token:` or `password =`."""
    return _ASSIGNED.sub(rf"\1\2{HIDDEN}", redact_text(text))


def redact_command(arguments: Iterable[str]) -> list[str]:
    """Hide the secrets of a command line, given as `--token x`, `--token=x` or `some.token=x`."""
    result = []
    secret_follows = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if secret_follows:
            result.append(HIDDEN)
        elif equals and _is_secret(name):
            result.append(f"{name}={HIDDEN}")
        else:
            result.append(redact_text(argument))
        secret_follows = not equals and argument.startswith("-") and _is_secret(argument)
    return result


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _HARMLESS_NAME.search(name)
