"""Secrets: how they are recognised, and how they are kept out of what is printed and logged.

Nothing here is applied to files that are read back, such as the recipe of a run or its checkpoints: a recipe with a
secret is refused instead (`dpoctl.recipe.secrets`). docs/reliability.md has the policy.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "<redacted>"
HUGGING_FACE, WANDB = "an access token of Hugging Face", "a key of Weights & Biases"
# Words that end the name of a secret, with `_` between their parts.
_WORDS = (
    r"(?:token|secrets?|passwords?|passwd|passphrases?|passcodes?|pass|pwd|pat|api_?keys?|access_?keys?(?:_?id)?"
    r"|(?:private|secret|signing|encryption|account|auth|ssh|shared|service|deploy|master|license|storage)_?keys?"
    r"|(?:shared_?)?access_?signature|credentials?|authorization|auth|bearer|cookies?|connection_?string|dsn|jwt|sas)"
)
_SUFFIX = r"(?:_?\d+|_(?:value|base64|b64|json|prod|production|staging|dev|test|read|write|ro|rw|old|new))?"
# Names of a tokenizer's tokens, which are no secrets.
_HARMLESS = (
    r"(?:bos|eos|eot|eom|pad|unk|sep|cls|mask|image|audio|video|boi|eoi|think|special|first|last|next|end|start"
    r"|begin|stop|role|user|assistant|system|tool|call|response|separator|prefix|suffix|new|per)_?tokens?"
)
_SECRET_NAME = re.compile(rf"(?:^|_){_WORDS}{_SUFFIX}$")
_VAGUE_NAME = re.compile(r"(?:^|_)(?:keys?|tokens|pin|otp|signature)$")
_HARMLESS_NAME = re.compile(rf"(?:^|_){_HARMLESS}{_SUFFIX}$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# `name = "value"`, `name=value` and, in JSON and headers, `"name": "value"`.
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?:--?)?(?P<name>[A-Za-z_][\w.-]*)(?P<sign>[\"']?(?:\s*[:=]\s*(?=[\"'])|=))"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?|\{[^}]*\}|[^\s\"'&;,)}\]]+)"
)
_NAMED = re.compile(r"(?:^|[\s\"'{,\[(#;])-{0,2}(?P<name>[A-Za-z_][\w.-]*)[\"']?\s*[:=]")
_PLACEHOLDER = re.compile(
    r"<[^>]*>|</?\S+>|\[.*\]|\{.*\}|\|.*\||\$\{?\w+\}?|[*.]+|x{3,}|\W*", re.IGNORECASE | re.DOTALL
)
_START, _APART = r"(?<![A-Za-z0-9])", r"(?<![\w-])"
_SHAPES = {
    HUGGING_FACE: rf"{_START}(?:hf|api_org)_[A-Za-z0-9]{{8,}}",
    "a token of GitHub": rf"{_START}gh[pousr]_[A-Za-z0-9]{{16,}}|{_APART}github_pat_\w{{16,}}",
    "a token of GitLab": rf"{_APART}glpat-[\w-]{{16,}}",
    WANDB: rf"{_APART}wandb_v1_\w{{8,}}",
    "a secret key": rf"{_APART}(?:[sr]k[-_][\w-]{{16,}}|(?:gsk|r8|tgp_v1|npm|dop_v1|shpat|dckr_pat)_[\w-]{{16,}}"
    r"|nvapi-[\w-]{16,}|pypi-[\w-]{16,}|hvs\.[\w-]{16,}|SG\.[\w-]{8,}\.[\w-]{8,}|xox[abeprs]-[\w-]{8,}"
    r"|xapp-[\w-]{8,}|AGE-SECRET-KEY-1\w{16,})",
    "a key of Amazon": rf"{_START}A(?:KIA|SIA)[0-9A-Z]{{16}}",
    "a key of Google": rf"{_APART}(?:AIza[\w-]{{30,}}|ya29\.[\w-]{{16,}})",
    "a JSON web token": rf"{_APART}eyJ[\w-]{{8,}}\.[\w-]{{8,}}(?:\.[\w-]*)?",
    "an authorization header": rf"{_START}(?i:bearer|basic|digest)\s+[\w.~+/=-]{{8,}}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|[\s\S]*)|PuTTY-User-Key-File-\d[\s\S]*",
}
_SHAPE = re.compile("|".join(rf"(?P<k{number}>{shape})" for number, shape in enumerate(_SHAPES.values())))
_KINDS = tuple(_SHAPES)
# The part before @ of a URL: with a password, which may hold @ and / by mistake, or long enough to be a token.
_LOGIN = re.compile(
    r"(?<=://)(?:[^/\s:\"'<>]{1,99}:(?!\d{1,5}/)[^\s\"'<>]{0,999}|[^/\s@:\"'<>]{0,99}:[^/\s\"'<>]{0,999}"
    r"|[^/\s@:\"'<>]{16,999})(?=@)"
)
_USER = re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)")
_QUERY = re.compile(
    r"(?<=[?&])([\w.-]*(?:token|secret|password|passwd|pwd|key|sig|signature|credential|auth|sas|code))=[^&\s\"'<>]+",
    re.I,
)
# A part of a connection string, whose values may have blanks.
_CONNECTION = re.compile(r"(?<=;)(?P<sign>\s*)(?P<name>[A-Za-z][\w .-]*)=(?P<value>[^;\"'<>\n]+)")
_PAIR = re.compile(r"[a-z][A-Z0-9]|[A-Z][0-9]|[0-9][A-Za-z]|[A-Z]{2}[a-z]")
_OPENING = "|>-+[{\"'"
_SHORTEST = 8  # a shorter value of an environment variable may be an ordinary word
_CUT, _LONG = 12, 20  # of a value that is at least so long, the first characters are hidden without the rest too
_OPEN_NAMES = re.compile(
    r"(?:LANG|LANGUAGE|TERM|COLORTERM|TZ|SHELL|SHLVL|USER|LOGNAME|USERNAME|HOSTNAME|HOSTTYPE|HOME|PWD|OLDPWD|PATH|DISPLAY"
    r"|EDITOR|VISUAL|PAGER|LESS|LS_COLORS|TMPDIR|TEMP|TMP|VIRTUAL_ENV|DEBIAN_FRONTEND|_"
    r"|(?:LC|XDG|CONDA|OMP|GOMP|KMP|MKL|OPENBLAS|CUDA|NCCL|NVIDIA|GLOO|TORCH|PYTORCH|HF|TRANSFORMERS|TOKENIZERS|ACCELERATE"
    r"|DPOCTL|FSDP|DEEPSPEED|MEGATRON|PARALLELISM|SLURM|OMPI|PMI|MASTER|RANK|LOCAL|WORLD|GROUP|NODE|TERM|PYTEST|PIP|UV"
    r"|MAKE)_\w*|PYTHON\w*|MAKE\w*)"
)
"""Names of environment variables whose values may be printed, unless the name is one of a secret too."""


def is_secret_name(name: str) -> bool:
    """Whether a key, option or variable of this name holds a secret."""
    plain = _plain(name)
    return bool(_SECRET_NAME.search(plain)) and not _HARMLESS_NAME.search(plain)


def is_secret_value(name: str, value: object) -> bool:
    """Whether what stands under a name is a secret by that name."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    text = str(value)
    if _PLACEHOLDER.fullmatch(text.strip()):
        return False
    plain = _plain(name)
    if _VAGUE_NAME.search(plain) and not _HARMLESS_NAME.search(plain):
        return _is_random(text) or is_secret_name(name)
    # A token may be a number: that of a tokenizer.
    return is_secret_name(name) and (isinstance(value, str) or not plain.endswith("token"))


def find_secret(text: str) -> str | None:
    """Return what kind of secret a text holds, in words; None if it holds none that is known."""
    for found in _SHAPE.finditer(text):
        if _is_meant(found):
            return _KINDS[int((found.lastgroup or "k0")[1:])]
    if _LOGIN.search(text):
        return "a user with a password in a URL"
    if any(not _PLACEHOLDER.fullmatch(found[0].partition("=")[2]) for found in _QUERY.finditer(text)):
        return "a signed URL, or one with a key"
    for found in [*_CONNECTION.finditer(text), *_ASSIGNED.finditer(text)]:
        if ":" not in found["sign"] and is_secret_value(found["name"], found["value"].strip("\"'")):
            return f"a value of {found['name']}"
    return None


def redact(value: Any) -> Any:
    """Return a copy of plain nested data whose texts went through `redact_text`."""
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Hide values of environment variables, tokens of known shapes, logins in URLs, and `password=...`."""
    text = hide_environment(text)
    text = _SHAPE.sub(lambda found: _hidden(found[0]) if _is_meant(found) else found[0], text)
    text = _USER.sub(HIDDEN, _LOGIN.sub(HIDDEN, text))
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    return _ASSIGNED.sub(_hide_assigned, _CONNECTION.sub(_hide_assigned, text))


def redact_source(text: str) -> str:
    """Hide the secrets in YAML or in the text of an error: also what follows `hub_token:` on its line, or below it."""
    lines, indent = [], -1
    for line in redact_text(text).split("\n"):
        own = len(line) - len(line.lstrip())
        if indent >= 0 and (own > indent or not line.strip() or line.lstrip().startswith("- ")):
            lines.append(line[:own] + HIDDEN if line.strip() else line)
            continue
        indent = -1
        found = next((found for found in _NAMED.finditer(line) if is_secret_name(found["name"])), None)
        rest = line[found.end() :].strip() if found else ""
        if found and not (rest and _PLACEHOLDER.fullmatch(rest) and rest.strip(_OPENING)):
            # What begins here may go on below.
            indent = own if rest[:1] in _OPENING else -1
            line = f"{line[: found.end()]} {HIDDEN}" if rest else line
        lines.append(line)
    return "\n".join(lines)


def redact_traceback(text: str) -> str:
    """Hide the secrets in a traceback; its lines of code keep what is no literal."""
    parts = re.split(r"(?m)^(Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*)", text)
    return "".join(redact_text(part) if number % 2 else redact_source(part) for number, part in enumerate(parts))


def redact_command(arguments: Iterable[str]) -> list[str]:
    """Hide the secrets in a command line: `--token x`, `--token=x` and `some.token=x`."""
    result = []
    secret_follows = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if secret_follows:
            result.append(HIDDEN)
        elif equals and is_secret_name(name):
            result.append(f"{name}={HIDDEN}")
        else:
            result.append(redact_source(argument))
        secret_follows = not equals and argument.startswith("-") and is_secret_name(argument)
    return result


def hide_environment(text: str) -> str:
    """Hide the values of environment variables: all of 8 or more characters, except paths and those of known names."""
    values = _values(tuple(os.environ.items()))
    for value in values:
        at = 0
        while (at := text.find(value, at)) >= 0:
            if not _continues(text, at, at + len(value), value):
                text = f"{text[:at]}{_hidden(value)}{text[at + len(value) :]}"
            at += 1
    # Messages quote long values by their first characters.
    for value in (value for value in values if len(value) >= _LONG and "://" not in value):
        while (at := text.find(value[:_CUT])) >= 0:
            more = (n for n in range(_CUT, len(value)) if text[at + n : at + n + 1] != value[n])
            end = at + next(more, len(value))
            text = f"{text[:at]}{_hidden(text[at:end])}{text[end:]}"
    return text


@lru_cache(maxsize=8)
def _values(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return the texts to hide, the longest first."""
    found: set[str] = set()
    for name, value in environment:
        is_open = bool(_OPEN_NAMES.fullmatch(name)) and not is_secret_name(name)
        if not is_open and not _is_path(value):
            found.update(form for part in _parts(value) for form in _forms(part) if len(part) >= _SHORTEST)
    return tuple(sorted(found - {HIDDEN}, key=len, reverse=True))


def _parts(value: str) -> Iterator[str]:
    """Yield a value, and what of it is a secret by itself: a login, a password, a line, a long random word."""
    yield value.strip()
    for pattern in (_LOGIN, _SHAPE):
        yield from (found[0] for found in pattern.finditer(value))
    for login in _LOGIN.findall(value):
        yield login.partition(":")[2]
    yield from (found["value"].strip("\"'") for found in _ASSIGNED.finditer(value) if is_secret_name(found["name"]))
    yield from (line.strip() for line in value.splitlines())
    yield from (word for word in re.findall(r"[^\s\"'{}\[\],;=&]{16,}", value) if _is_random(word))


def _forms(value: str) -> Iterator[str]:
    """Yield a value as it stands in texts, in URLs, in JSON and in Python."""
    yield from (value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1])
    yield json.dumps(value, ensure_ascii=False)[1:-1]


def _continues(text: str, start: int, end: int, value: str) -> bool:
    """Whether a value that is one word is a part of a longer word here."""
    around = text[max(0, start - 1) : start] + text[end : end + 1]
    return value.isalnum() and any(letter.isalnum() for letter in around)


def _is_path(value: str) -> bool:
    """Whether a value is a path, or a list of paths."""
    parts = [part for part in value.split(os.pathsep) if part]
    return bool(parts) and "\n" not in value and all(_exists(part) for part in parts)


def _exists(part: str) -> bool:
    """Whether a path is there, or the first of its folders."""
    try:
        first = "/".join(part.split("/")[:2]) if part.startswith("/") else part
        return os.path.lexists(Path(first).expanduser()) and first != "/"
    except (ValueError, RuntimeError):
        return False


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", _CAMEL.sub("_", name.strip("-_. \"'")).lower())


def _is_meant(found: "re.Match[str]") -> bool:
    """Whether a shape is a secret, and not the name of a file that begins alike: hf_checkpoints, sk-learn-data."""
    kind, text = int((found.lastgroup or "k0")[1:]), found[0]
    value = re.sub(r"^(?:hf|api_org)_|^[sr]k[-_]|^\w+\s+", "", text)
    longest = max(re.split(r"[_\W]+", value), key=len)
    if _KINDS[kind] == HUGGING_FACE:
        return len(longest) >= 20 or _is_random(longest)
    if _KINDS[kind] == "a secret key" and text[1:3] in ("k-", "k_"):
        return len(longest) >= 16 or _is_random(value)
    if _KINDS[kind] == "an authorization header":
        return len(value) >= 16 or any(letter.isdigit() or letter.isupper() for letter in value[1:])
    return True


def _is_random(text: str) -> bool:
    """Whether a text looks drawn by chance: letters of both cases and digits alternate in it."""
    return len(text) >= 8 and not re.search(r"\s", text) and len(_PAIR.findall(text)) >= 4


def _hidden(text: str) -> str:
    """Return what stands in place of a text, on as many lines."""
    return HIDDEN + "\n" * text.count("\n")


def _hide_assigned(found: "re.Match[str]") -> str:
    value = found["value"].strip("\"'")
    if not is_secret_value(found["name"], value) or HIDDEN in value:
        return found[0]
    mark = found["value"][0] if found["value"][0] in "\"'" else ""
    return found[0].removesuffix(found["value"]) + f"{mark}{HIDDEN}{mark}"
