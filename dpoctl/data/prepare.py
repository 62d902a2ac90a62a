"""Recipe -> token stores: found by their keys or built, with an honest account of every row."""

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpoctl import console
from dpoctl.data.account import announce, explain_nothing_used
from dpoctl.data.build import RecordEncoder, build
from dpoctl.data.grouping import Votes
from dpoctl.data.records import Record, Text
from dpoctl.data.rows import RowCount, Selection, find_rows, iter_topics, settle_format
from dpoctl.data.selection import HeldOut, is_random
from dpoctl.data.shaping import Wants, pairing_of
from dpoctl.data.sources import STDIN, fingerprint, location, read_rows
from dpoctl.data.store import StoreWriter, TokenStore, find_store
from dpoctl.data.template import Renderer
from dpoctl.data.tokenize import Encoder, Limits
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpoctl.recipe.schema import Recipe
    from dpoctl.recipe.schema_data import DataSection, Source

CODE_VERSION = 4
"""Raise it with any change that gives the same rows other tokens."""

HELD_OUT_NAME = "eval"


@dataclass(frozen=True)
class PreparedData:
    """The token stores of a recipe."""

    evals: dict[str, TokenStore]
    recipe: "Recipe"
    """The recipe with the formats that were found in place of `auto`."""
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
    recipe: "Recipe",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: Path,
    wants: Wants | None = None,
    only_eval: bool = False,
) -> PreparedData:
    """Tokenize the recipe's data, or find it tokenized.

    Args:
        recipe: Its data section, and of the others only what changes tokens.
        tokenizer: A fast tokenizer with a chat template, if the rows are messages.
        cache_dir: Where stores are kept.
        wants: What the loss learns from; None is demonstrations for sft, and pairs for dpo.
        only_eval: Leave the training set out.

    Raises:
        UsageError: A source has an option that its format does not have.
        DataError: A source cannot be read, a key of it would do nothing, or nothing in a set can be used.
        SetupError: The hub cannot be reached.
    """
    wants = wants or _wants(recipe)
    recipe, evidence = _with_formats(recipe, wants, only_eval=only_eval)
    factory = _StoreFactory(recipe, tokenizer, cache_dir, evidence)
    evals = {name: factory.store(name, selection) for name, selection in _evals(recipe, wants).items()}
    train = None if only_eval else factory.store("train", _train(recipe, wants))
    return PreparedData(
        evals=evals,
        recipe=recipe,
        report=factory.report(train, evals),
        rejects=factory.write_rejects(),
        train_store=train,
    )


def iter_texts(recipe: "Recipe", wants: Wants | None = None) -> Iterator[str]:
    """Read the texts of the training rows, to train a tokenizer on; `wants` as in `prepare`.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """
    for found in find_rows(_train(recipe, wants or _wants(recipe)), RowCount()):
        if isinstance(found.outcome, Record):
            for text in (found.outcome.prompt, *found.outcome.responses):
                yield from _strings(text)


def count_rows(recipe: "Recipe", wants: Wants | None = None) -> tuple[int, dict[str, int]]:
    """Count the rows of the training set and of each named eval set that can be understood; nothing is tokenized.

    Args:
        recipe: Its data section is read.
        wants: As in `prepare`.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """

    def count(selection: Selection) -> int:
        found = find_rows(replace(selection, eval_size=None), RowCount())
        return sum(one.copies for one in found if isinstance(one.outcome, Record))

    wants = wants or _wants(recipe)
    sets = {name: _selection(recipe, sources, wants) for name, sources in recipe.data.eval.items()}
    return count(_train(recipe, wants)), {name: count(selection) for name, selection in sets.items()}


def _strings(text: Text) -> Iterator[str]:
    if isinstance(text, str):
        yield text
    else:
        yield from (message["content"] for message in text)


def _wants(recipe: "Recipe") -> Wants:
    return "demonstrations" if recipe.method == "sft" else "pairs"


def _selection(recipe: "Recipe", sources: Sequence["Source"], wants: Wants, **split: Any) -> Selection:
    if any(source.path == STDIN for source in sources):
        raise DataError("data is read more than once, and stdin cannot be", hint="save it to a file")
    return Selection(tuple(sources), wants, recipe.training.seed, **split)


def _train(recipe: "Recipe", wants: Wants) -> Selection:
    return _selection(recipe, recipe.data.train, wants, eval_size=recipe.data.eval_size)


def _evals(recipe: "Recipe", wants: Wants) -> dict[str, Selection]:
    evals = {name: _selection(recipe, sources, wants) for name, sources in recipe.data.eval.items()}
    if recipe.data.eval_size is not None:
        evals[HELD_OUT_NAME] = replace(_train(recipe, wants), side="eval")
    return evals


def _with_formats(recipe: "Recipe", wants: Wants, *, only_eval: bool) -> tuple["Recipe", dict[str, str]]:
    """Put the formats that rows are found to be in for `auto`.

    Returns:
        The recipe, and the evidence by the source, as JSON.
    """
    evidence: dict[str, str] = {}

    def settled(sources: Sequence["Source"]) -> list["Source"]:
        found = []
        for source in (selection := _selection(recipe, sources, wants)).sources:
            name, why, _ = settle_format(source, read_rows(source, method=selection.method))
            found.append(source.model_copy(update={"format": name}))
            evidence[found[-1].model_dump_json()] = why
        return found

    evals = {name: settled(sources) for name, sources in recipe.data.eval.items()}
    is_read = not only_eval or recipe.data.eval_size is not None
    train = settled(recipe.data.train) if is_read else recipe.data.train
    data = recipe.data.model_copy(update={"train": train, "eval": evals})
    return recipe.model_copy(update={"data": data}), evidence


class _StoreFactory:
    """Finds or builds the stores of one recipe."""

    def __init__(
        self, recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase", cache_dir: Path, evidence: dict[str, str]
    ) -> None:
        self._recipe = recipe
        self._folder = cache_dir / "tokens"
        self._encoder = Encoder(tokenizer)
        self._evidence = evidence
        self._loss_on = recipe.sft.loss_on if recipe.method == "sft" else recipe.dpo.loss_on
        self._renderer = Renderer(tokenizer, recipe.data.chat_template_kwargs, self._loss_on)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._held_out: HeldOut | None = None
        self._stores: list[tuple[TokenStore, Selection]] = []

    def store(self, name: str, selection: Selection) -> TokenStore:
        """Find or build the store of a set."""
        key = self._key(selection)
        store = find_store(self._folder / key, key, _paths(selection))
        if store is None:
            store = self._build(name, selection, key)
        self._stores.append((store, selection))
        return store

    def report(self, train: TokenStore | None, evals: dict[str, TokenStore]) -> dict[str, Any]:
        """Put the accounts of all sets together, and say what the user should know."""
        accounts = {id(store): self._account(store, selection) for store, selection in self._stores}
        totals = {name: sum(account[name] for account in accounts.values()) for name in ("rows", "used")}
        rejected = sum(sum(account["rejected"].values()) for account in accounts.values())
        report: dict[str, Any] = {**totals, "rejected": rejected, "train": None, "evals": {}}
        if train is not None:
            report["train"] = accounts[id(train)]
            announce("train", accounts[id(train)])
        for name, store in evals.items():
            report["evals"][name] = accounts[id(store)]
            if train is not None:
                report["evals"][name]["leaked"] = _leaked(store, train)
            announce(name, accounts[id(store)])
        return report

    def write_rejects(self) -> Path:
        """Write one file of all sets' rejected rows, with the names of their files."""
        keys = json.dumps([[store.key, _paths(selection)] for store, selection in self._stores])
        target = self._folder.parent / "rejects" / f"{hashlib.sha256(keys.encode()).hexdigest()[:32]}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for store, selection in self._stores:
                    for row in store.rejects(_paths(selection)):
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _build(self, name: str, selection: Selection, key: str) -> TokenStore:
        paths = _paths(selection)
        console.say(f"tokenizing {name}: {', '.join(dict.fromkeys(paths))}")
        if selection.eval_size is not None:
            selection = replace(selection, held_out=self._split(selection))
        limits = [_limits(source, self._recipe.data) for source in selection.sources]
        encoder = RecordEncoder(self._renderer, self._encoder, limits)
        drop_duplicates = self._recipe.data.duplicates == "drop"
        votes = Votes()
        with _only_own_garbage(), StoreWriter(self._folder / key, key, self._encoder.dtype) as writer:
            report = build(selection, encoder, writer, drop_duplicates=drop_duplicates, votes=votes, settle=False)
            if not votes.contradicted:
                return self._commit(name, selection, key, writer, report)
        console.note(f"{name}: some pairs stand there both ways round; read again, to keep what the majority says")
        with _only_own_garbage(), StoreWriter(self._folder / key, key, self._encoder.dtype) as writer:
            report = build(selection, encoder, writer, drop_duplicates=drop_duplicates, votes=votes, settle=True)
            return self._commit(name, selection, key, writer, report)

    def _commit(
        self, name: str, selection: Selection, key: str, writer: StoreWriter, report: dict[str, Any]
    ) -> TokenStore:
        paths = _paths(selection)
        if self._key(selection) != key:
            # Kept under that key, it would be taken for the data as it was before.
            raise DataError(
                f"{name}: {', '.join(dict.fromkeys(paths))} changed while it was read",
                hint="start again once it is written",
            )
        if not report["used"]:
            raise explain_nothing_used(name, paths, report)
        if selection.wants == "rankings" and report["most_answers"] < 3:
            raise DataError(
                f"{name}: {', '.join(dict.fromkeys(paths))} holds pairs; a list-wise loss needs rankings",
                hint="give rows with at least three rated answers, or choose a loss of pairs, e.g. sigmoid",
            )
        return writer.commit(report, paths)

    def _split(self, selection: Selection) -> HeldOut:
        size = selection.eval_size
        assert size is not None
        if self._held_out is None:
            if isinstance(size, float):
                self._held_out = HeldOut(selection.seed, size)
            else:
                whole = replace(selection, side="train", held_out=None)
                self._held_out = HeldOut.of_size(size, selection.seed, iter_topics(whole))
        return self._held_out

    def _key(self, selection: Selection) -> str:
        """Hash everything that the tokens depend on, and nothing else."""
        data = self._recipe.data
        parts: dict[str, Any] = {
            "code": CODE_VERSION,
            "wants": selection.wants,
            "sources": [_identity(source, selection, data) for source in selection.sources],
            "tokenizer": [self._encoder.state, self._encoder.bos, self._encoder.eos, self._special_tokens],
            "template": [self._renderer.templates, data.chat_template_kwargs, self._loss_on],
            "duplicates": data.duplicates,
        }
        if selection.eval_size is not None:
            parts["split"] = [selection.eval_size, selection.side]
        if selection.eval_size is not None or any(map(_draws, selection.sources)):
            parts["seed"] = selection.seed
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _account(self, store: TokenStore, selection: Selection) -> dict[str, Any]:
        """Read a store's report, with the names that its sources have today."""
        account, paths = dict(store.report), _paths(selection)
        account["sources"] = [
            facts | {"path": source.path, "evidence": self._evidence[source.model_dump_json()]}
            for facts, source in zip(account["sources"], selection.sources, strict=True)
        ]
        account["first_rejected"] = {
            reason: {"file": location(paths[at[0]], at[1]), "line": at[2], "detail": detail}
            for reason, (at, detail) in account["first_rejected"].items()
        }
        return account


@contextmanager
def _only_own_garbage() -> Iterator[None]:
    """Keep the garbage collector out of what is loaded already: a search of that takes a tenth of a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _paths(selection: Selection) -> list[str]:
    return [source.path for source in selection.sources]


def _limits(source: "Source", data: "DataSection") -> Limits:
    """Say how long the rows of a source may be."""
    truncate = (source.overlong or data.overlong) == "truncate"
    return Limits(
        max_length=source.max_length or data.max_length,
        max_prompt_length=source.max_prompt_length or data.max_prompt_length,
        truncate=truncate,
        keep_start=truncate and (source.prompt_truncation or data.prompt_truncation) == "keep_start",
    )


def _identity(source: "Source", selection: Selection, data: "DataSection") -> list[Any]:
    """List what decides which rows a source gives, and what becomes of them."""
    pairing = pairing_of(source, selection.wants, seed=0)
    return [
        fingerprint(source, method=selection.method),
        *(source.format, source.format_options, source.weight, source.max_samples, source.column_map),
        pairing and asdict(pairing),
        asdict(_limits(source, data)),
    ]


def _draws(source: "Source") -> bool:
    """Whether the rows or pairs of a source depend on the seed."""
    return is_random(source) or source.pairs == "best-random" or source.max_pairs_per_prompt is not None


def _leaked(store: TokenStore, train: TokenStore) -> dict[str, int]:
    """Count the prompts of a set that are trained on, and the records that have them."""
    known = store.prompt_hash[np.isin(store.prompt_hash, train.prompt_hash)]
    return {"prompts": len(np.unique(known)), "records": len(known)}
