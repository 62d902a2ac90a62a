"""Recipe -> token stores: found by their keys or built, with an honest account of every row."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpoctl import console
from dpoctl.data.account import announce, explain_nothing_used
from dpoctl.data.build import RecordEncoder, build
from dpoctl.data.records import Record, Text
from dpoctl.data.rows import RowCount, Selection, find_rows, iter_prompts
from dpoctl.data.selection import HeldOut, is_random
from dpoctl.data.sources import STDIN, fingerprint, location
from dpoctl.data.store import StoreWriter, TokenStore, find_store
from dpoctl.data.template import Renderer
from dpoctl.data.tokenize import Encoder, Limits
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpoctl.recipe.schema import Recipe, Source

CODE_VERSION = 2
"""Raise it with any change that gives the same rows other tokens."""

HELD_OUT_NAME = "eval"


@dataclass(frozen=True)
class PreparedData:
    """The token stores of a recipe."""

    evals: dict[str, TokenStore]
    report: dict[str, Any]
    """`{"rows", "used", "rejected"}` of all sets together, and `{"train": account, "evals": {name: account}}`."""
    rejects: Path
    """JSON lines of `{file, line, reason, detail}`, one a row that is not used."""
    train_store: TokenStore | None = None
    """Absent when only the eval sets were asked for."""

    @property
    def train(self) -> TokenStore:
        """The training set."""
        assert self.train_store is not None, "prepared with only_eval"
        return self.train_store


def cache_dir() -> Path:
    """Find the folder that everything derived from data is kept in."""
    if own := os.environ.get("DPOCTL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "dpoctl"


def prepare(
    recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase", *, cache_dir: Path, only_eval: bool = False
) -> PreparedData:
    """Tokenize the recipe's data, or find it tokenized.

    Args:
        recipe: Its data section, and of the others only what changes tokens.
        tokenizer: A fast tokenizer with a chat template, if the rows are messages.
        cache_dir: Where stores are kept.
        only_eval: Leave the training set out.

    Raises:
        DataError: A source cannot be read, or nothing in a set can be used.
        SetupError: The hub cannot be reached.
    """
    factory = _StoreFactory(recipe, tokenizer, cache_dir)
    evals = {name: factory.store(name, selection) for name, selection in _evals(recipe).items()}
    train = None if only_eval else factory.store("train", _train(recipe))
    return PreparedData(
        evals=evals,
        report=factory.report(train, evals),
        rejects=factory.write_rejects(),
        train_store=train,
    )


def iter_texts(recipe: "Recipe") -> Iterator[str]:
    """Read the texts of the training rows, to train a tokenizer on.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """
    for found in find_rows(_train(recipe), RowCount()):
        if isinstance(found.outcome, Record):
            for text in (found.outcome.prompt, *found.outcome.responses):
                yield from _strings(text)


def count_rows(recipe: "Recipe") -> tuple[int, dict[str, int]]:
    """Count the rows of the training set and of each named eval set that can be understood; nothing is tokenized.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """

    def count(selection: Selection) -> int:
        found = find_rows(replace(selection, eval_size=None), RowCount())
        return sum(one.copies for one in found if isinstance(one.outcome, Record))

    sets = {name: _selection(recipe, sources) for name, sources in recipe.data.eval.items()}
    return count(_train(recipe)), {name: count(selection) for name, selection in sets.items()}


def _strings(text: Text) -> Iterator[str]:
    if isinstance(text, str):
        yield text
    else:
        yield from (message["content"] for message in text)


def _selection(recipe: "Recipe", sources: Sequence["Source"], **split: Any) -> Selection:
    if any(source.path == STDIN for source in sources):
        raise DataError("data is read more than once, and stdin cannot be", hint="save it to a file")
    return Selection(tuple(sources), recipe.method, recipe.training.seed, **split)


def _train(recipe: "Recipe") -> Selection:
    return _selection(recipe, recipe.data.train, eval_size=recipe.data.eval_size)


def _evals(recipe: "Recipe") -> dict[str, Selection]:
    evals = {name: _selection(recipe, sources) for name, sources in recipe.data.eval.items()}
    if recipe.data.eval_size is not None:
        evals[HELD_OUT_NAME] = replace(_train(recipe), side="eval")
    return evals


class _StoreFactory:
    """Finds or builds the stores of one recipe."""

    def __init__(self, recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase", cache_dir: Path) -> None:
        data = recipe.data
        self._recipe = recipe
        self._folder = cache_dir / "tokens"
        self._encoder = Encoder(tokenizer)
        loss_on = recipe.sft.loss_on if recipe.method == "sft" else "assistant"
        self._renderer = Renderer(tokenizer, data.chat_template_kwargs, loss_on)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._limits = Limits(
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            truncate=data.overlong == "truncate",
            keep_start=data.prompt_truncation == "keep_start",
        )
        self._held_out: HeldOut | None = None
        self._stores: list[tuple[TokenStore, list[str]]] = []

    def store(self, name: str, selection: Selection) -> TokenStore:
        """Find or build the store of a set."""
        paths = [source.path for source in selection.sources]
        key = self._key(selection)
        store = find_store(self._folder / key, key, paths)
        if store is None:
            store = self._build(name, selection, key, paths)
        self._stores.append((store, paths))
        return store

    def report(self, train: TokenStore | None, evals: dict[str, TokenStore]) -> dict[str, Any]:
        """Put the accounts of all sets together, and say what the user should know."""
        accounts = {id(store): _account(store, paths) for store, paths in self._stores}
        totals = {name: sum(account[name] for account in accounts.values()) for name in ("rows", "used")}
        rejected = sum(sum(account["rejected"].values()) for account in accounts.values())
        report: dict[str, Any] = {**totals, "rejected": rejected, "train": None, "evals": {}}
        if train is not None:
            report["train"] = accounts[id(train)]
            announce("train", accounts[id(train)])
        for name, store in evals.items():
            report["evals"][name] = accounts[id(store)]
            announce(name, accounts[id(store)])
        return report

    def write_rejects(self) -> Path:
        """Write one file of all sets' rejected rows, with the names of their files."""
        keys = json.dumps([[store.key, paths] for store, paths in self._stores])
        target = self._folder.parent / "rejects" / f"{hashlib.sha256(keys.encode()).hexdigest()[:32]}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for store, paths in self._stores:
                    for row in store.rejects(paths):
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _build(self, name: str, selection: Selection, key: str, paths: list[str]) -> TokenStore:
        console.say(f"tokenizing {name}: {', '.join(dict.fromkeys(paths))}")
        if selection.eval_size is not None:
            selection = replace(selection, held_out=self._split(selection.eval_size))
        encoder = RecordEncoder(self._renderer, self._encoder, self._limits)
        with StoreWriter(self._folder / key, key, self._encoder.dtype) as writer:
            report = build(selection, encoder, writer, drop_duplicates=self._recipe.data.duplicates == "drop")
            if not report["used"]:
                raise explain_nothing_used(name, paths, report)
            return writer.commit(report, paths)

    def _split(self, size: float | int) -> HeldOut:
        if self._held_out is None:
            seed = self._recipe.training.seed
            if isinstance(size, float):
                self._held_out = HeldOut(seed, size)
            else:
                self._held_out = HeldOut.of_size(size, seed, iter_prompts(_train(self._recipe)))
        return self._held_out

    def _key(self, selection: Selection) -> str:
        """Hash everything that the tokens depend on, and nothing else."""
        recipe, data = self._recipe, self._recipe.data
        parts: dict[str, Any] = {
            "code": CODE_VERSION,
            "method": recipe.method,
            "sources": [_identity(source, recipe.method) for source in selection.sources],
            "tokenizer": [self._encoder.state(), self._encoder.bos, self._encoder.eos, self._special_tokens],
            "template": [self._renderer.template, data.chat_template_kwargs],
            "limits": [data.max_length, data.max_prompt_length, data.overlong],
            "duplicates": data.duplicates,
        }
        if recipe.method == "sft":
            parts["loss_on"] = recipe.sft.loss_on
        if data.overlong == "truncate":
            parts["prompt_truncation"] = data.prompt_truncation
        if selection.eval_size is not None:
            parts["split"] = [selection.eval_size, selection.side]
        if selection.eval_size is not None or any(is_random(source) for source in selection.sources):
            parts["seed"] = selection.seed
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _identity(source: "Source", method: str) -> list[Any]:
    content = fingerprint(source, method=method)
    return [content, source.format, source.weight, source.max_samples, source.column_map]


def _account(store: TokenStore, paths: list[str]) -> dict[str, Any]:
    """Read a store's report, with the names that its sources have today."""
    account = dict(store.report)
    account["sources"] = [facts | {"path": path} for facts, path in zip(account["sources"], paths, strict=True)]
    account["first_rejected"] = {
        reason: {"file": location(paths[at[0]], at[1]), "line": at[2], "detail": detail}
        for reason, (at, detail) in account["first_rejected"].items()
    }
    return account
