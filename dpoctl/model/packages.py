"""Packages that a model needs and that are not installed: found by its files, or in the errors of libraries."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dpoctl.errors import SetupError

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_EXTRAS = {"lm-eval": "bench", "bitsandbytes": "quant", "protobuf": "sentencepiece", "sentencepiece": "sentencepiece"}
"""The extra of dpoctl that installs a package."""
_MODULES = {"protobuf": "google.protobuf"}
"""Names of modules that are not those of their packages."""
# The words, the clearest first, of transformers, of code on the hub, and of the libraries that they load.
_NEEDS = (
    r"not found in your environment: ([\w\-, ]+)",
    r"[Rr]equires? (?:the |installing )?[`'\"]?([\w\-]+)[`'\"]? (?:library|package)",
    r"[`'\"]?([\w\-]+)[`'\"]? is required to",
    r"pip install (?:-U |--upgrade )?[`'\"]?([\w\-]+)",
)


def missing_package(name: str, error: BaseException) -> SetupError | None:
    """Return the error of a model for which a library misses a package; `None` if it fails for another reason.

    Args:
        name: the model.
        error: what the library raised.
    """
    found = [package for package in dict.fromkeys(_named(error)) if not is_installed(package)]
    return needs(f"model '{name}'", found) if found else None


def needs(what: str, packages: list[str]) -> SetupError:
    """Return the error of something that needs packages, with the command that installs them."""
    extras = {f"dpoctl[{_EXTRAS[package]}]" if package in _EXTRAS else package for package in packages}
    verb = "are" if len(packages) > 1 else "is"
    wanted = " ".join(f"'{extra}'" if "[" in extra else extra for extra in sorted(extras))
    return SetupError(
        f"{what} needs {' and '.join(packages)}, which {verb} not installed", hint=f"pip install {wanted}"
    )


def missing_for_tokenizer(path: Path) -> list[str]:
    """Return the packages that are missing to read a tokenizer's file: one of SentencePiece, or one of tiktoken."""
    with path.open("rb") as file:
        start = file.read(64)
    is_text = re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", start) is not None
    return [
        package for package in (["tiktoken"] if is_text else ["sentencepiece", "protobuf"]) if not is_installed(package)
    ]


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return find_spec(_MODULES.get(package, package.replace("-", "_"))) is not None
    except (ImportError, ValueError):
        return False


def _named(error: BaseException) -> Iterator[str]:
    """Yield the packages that an error and its causes name."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ModuleNotFoundError) and seen.name:
            yield seen.name.partition(".")[0]
        matches = (re.search(pattern, str(seen)) for pattern in _NEEDS)
        if match := next(filter(None, matches), None):
            yield from (word.strip().lower() for word in match[1].split(",") if word.strip())
        seen = seen.__cause__
