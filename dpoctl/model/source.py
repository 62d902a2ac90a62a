"""Where a model comes from: a hub id or a folder, an adapter and the base under it. Decided before weights are read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from dpoctl.errors import SetupError, UsageError
from dpoctl.hub import hub_is_reachable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ATTENTION_NAMES = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder or hub id that `from_pretrained` can be pointed at.

    Attributes:
        name: hub id, or path of a folder that exists.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether code that comes with the model may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of this machine."""
        return Path(self.name).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that every `from_pretrained` call gets."""
        return {**self._hub_options, "trust_remote_code": self.trust_remote_code}

    @property
    def _hub_options(self) -> dict[str, Any]:
        offline = not self.is_local and not hub_is_reachable()
        return {"revision": self.revision or "main", "local_files_only": offline}

    def file(self, filename: str) -> Path | None:
        """Find a file of the model, downloading it where need be; `None` if the model has no such file."""
        with reading(self.name):
            found = cached_file(
                self.name,
                filename,
                _raise_exceptions_for_missing_entries=False,
                **self._hub_options,
            )
        return None if found is None else Path(found)


def find_source(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Point at a model by hub id or folder.

    Raises:
        SetupError: it looks like a path and is no folder.
        UsageError: it is a folder, and a revision is given.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"model '{name}' is a folder, which has no revision {revision!r}", hint="leave it out")
        return Source(name=str(path), trust_remote_code=trust_remote_code)
    looks_like_a_path = name.startswith((".", "~", os.sep)) or (name.count("/") != 1 and os.sep in name)
    if looks_like_a_path or path.exists():
        raise SetupError(f"model folder '{name}' does not exist")
    return Source(name=name, revision=revision, trust_remote_code=trust_remote_code)


def find_adapter(source: Source) -> Path | None:
    """The folder of a PEFT adapter, if that is what stands at the source.

    Raises:
        SetupError: the adapter has no safetensors weights.
    """
    config = source.file(ADAPTER_CONFIG)
    if config is None or (source.is_local and (config.parent / "config.json").exists()):
        return None
    weights = source.file(ADAPTER_WEIGHTS)
    if weights is None:
        raise SetupError(
            f"adapter '{source.name}' has no {ADAPTER_WEIGHTS}",
            hint="save it again with safetensors; pickled weights are never opened",
        )
    return weights.parent


def base_of(adapter: Path, *, trust_remote_code: bool = False) -> Source:
    """The model that an adapter was trained on, by its own account.

    Raises:
        SetupError: the adapter names no base, or one that is not there.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise SetupError(f"adapter '{adapter}' does not name its base model")
    revision = None if Path(name).expanduser().is_dir() else config.get("revision")
    try:
        return find_source(name, revision=revision, trust_remote_code=trust_remote_code)
    except SetupError as error:
        raise SetupError(f"adapter '{adapter}' needs its base: {error.message}") from error


def refuse_foreign_attention(source: Source) -> None:
    """Refuse a configuration that would have an attention kernel fetched from elsewhere.

    Raises:
        UsageError: the config names an attention that is none of transformers' own.
    """
    with reading(source.name):
        raw, _ = PretrainedConfig.get_config_dict(source.name, **source._hub_options)
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in _ATTENTION_KEYS:
            if part.get(key) not in ATTENTION_NAMES:
                raise UsageError(f"the config of '{source.name}' asks for {key} '{part[key]}', which is not allowed")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a model into one line that names the model."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, ImportError, StrictDataclassError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UsageError(
                f"model '{name}' comes with its own code", hint="set model.trust_remote_code: true to run it"
            ) from error
        if "gated" in text or "401 Client" in text or "403 Client" in text:
            raise SetupError(
                f"model '{name}' is gated or private", hint="ask for access on its page, then `hf auth login`"
            ) from error
        if "connect" in text and not hub_is_reachable():
            raise SetupError(
                f"model '{name}' is no folder here, and no connection to {constants.ENDPOINT} to fetch it",
                hint="give a local folder, or connect",
            ) from error
        raise SetupError(f"model '{name}' cannot be loaded: {reason(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SetupError: it cannot be read or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"'{path}' cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise SetupError(f"'{path}' is not a JSON object")
    return found


def reason(error: BaseException) -> str:
    """The first line that says what was wrong, without its full stop."""
    told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(told).__name__
