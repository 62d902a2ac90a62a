"""Keep secrets out of whatever is written down or sent to a tracker."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(
    r"(^|[_.\-])(token|secret|password|passwd|api_?key|api-key|access_?key|credentials?)$", re.IGNORECASE
)
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
        return HIDDEN if value and _SECRET_NAME.search(name) else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """Hide what looks like an access token, and the user and password of a URL."""
    text = _SECRET_TEXT.sub(HIDDEN, text)
    text = _USERINFO.sub(HIDDEN, text)
    return _QUERY.sub(rf"\1={HIDDEN}", text)


def redact_command(arguments: Iterable[str]) -> list[str]:
    """Hide the secrets of a command line, given as `--token x`, `--token=x` or `some.token=x`."""
    result = []
    secret_follows = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if secret_follows:
            result.append(HIDDEN)
        elif equals and _SECRET_NAME.search(name):
            result.append(f"{name}={HIDDEN}")
        else:
            result.append(redact_text(argument))
        secret_follows = not equals and argument.startswith("-") and bool(_SECRET_NAME.search(argument))
    return result
