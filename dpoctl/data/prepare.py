"""The token stores of a recipe: each is found by its key, or built, with a report on every row."""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpoctl import console
from dpoctl.data.build import RecordEncoder, build, draw
from dpoctl.data.cache import Cache, writing_to
from dpoctl.data.grouping import Majority
from dpoctl.data.output import WholeFile
from dpoctl.data.pairing import Wants, pairing_of
from dpoctl.data.pipeline import RowStats, Selection, count_units, open_source, select_rows
from dpoctl.data.records import Record, Reject, strings_of
from dpoctl.data.rendering import Renderer
from dpoctl.data.row_report import TOO_SLOW, announce, nothing_used, too_slow
from dpoctl.data.sampling import HeldOut, Tries, is_random, sample_size
from dpoctl.data.sources import STDIN, fingerprint, location
from dpoctl.data.store import StoreWriter, TokenStore, find_store
from dpoctl.data.tokenize import Encoder, Limits
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpoctl.recipe.data_section import DataSection, Source
    from dpoctl.recipe.schema import Recipe

CODE_VERSION = 9
"""Part of every store's key: raise it with any change that gives the same rows other tokens."""

HELD_OUT_NAME = "eval"
KIND = "tokens"
"""The folder of all stores in the cache folder."""


@dataclass(frozen=True)
class PreparedData:
    """The token stores of a recipe."""

    evals: dict[str, TokenStore]
    recipe: "Recipe"
    """The recipe with detected formats in place of `auto`."""
    report: dict[str, Any]
    """`{"rows", "used", "rejected"}` of all sets together, and `{"train": report, "evals": {name: report}}`."""
    sources: list[tuple[TokenStore, list[str]]]
    """Every store, with the paths of its sources."""
    train_store: TokenStore | None = None
    """None if only the eval sets were prepared."""

    @property
    def train(self) -> TokenStore:
        """The training set."""
        assert self.train_store is not None, "prepared with only_eval"
        return self.train_store

    def write_rejects(self, path: Path) -> None:
        """Write the rows that are not used as JSON lines of `{file, line, reason, detail}`.

        Raises:
            UsageError: The file cannot be written.
            RunError: The disk is full, or fails.
        """
        with WholeFile(path) as file:
            for store, paths in self.sources:
                for row in store.rejects(paths):
                    file.write(json.dumps(row, ensure_ascii=False))


def prepare(
    recipe: "Recipe",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: Path,
    spare: Path | None = None,
    wants: Wants | None = None,
    only_eval: bool = False,
    stops: Collection[int] | None = None,
) -> PreparedData:
    """Tokenize the recipe's data, or find it tokenized.

    Args:
        recipe: The recipe; only keys that change tokens have an effect.
        tokenizer: A fast tokenizer, with a chat template if rows are messages.
        cache_dir: The folder of all stores.
        spare: The folder for new stores where that folder is read-only; None refuses to go on there.
        wants: The kind of record that the loss learns from; None is demonstrations for sft, and pairs for dpo.
        only_eval: Leave the training set out.
        stops: The ids at which the model's generation stops; None if they are not known.

    Raises:
        UsageError: A source sets an option that its format does not have.
        DataError: A source cannot be read, sets a key that no row of it uses, or no row of a set can be used.
        SetupError: The hub cannot be reached, or the cache folder cannot be written.
    """
    wants = wants or _wants(recipe)
    recipe, evidence = _with_formats(recipe, wants, only_eval=only_eval)
    factory = _StoreFactory(recipe, tokenizer, Cache(cache_dir, spare), evidence, stops)
    evals = {name: factory.store(name, selection) for name, selection in _evals(recipe, wants).items()}
    train = None if only_eval else factory.store("train", _train(recipe, wants))
    if train is not None:
        _refuse_unused_think(recipe, train)
    return PreparedData(
        evals=evals,
        recipe=recipe,
        report=factory.report(train, evals),
        sources=factory.sources(),
        train_store=train,
    )


def _refuse_unused_think(recipe: "Recipe", train: TokenStore) -> None:
    """Make sure that `train_on_think` keeps something out of the loss.

    Raises:
        DataError: There is nothing of that kind in the training data.
    """
    wanted = (recipe.sft if recipe.method == "sft" else recipe.dpo).train_on_think
    if wanted != "all" and not train.report["template"].get("thinking_untrained"):
        block = "an empty thinking block" if wanted == "nonempty" else "a thinking block"
        key = f"{recipe.method}.train_on_think: {wanted}"
        raise DataError(f"{key} would do nothing: no training row has an answer with {block}", hint="leave it out")


def iter_texts(recipe: "Recipe", wants: Wants | None = None) -> Iterator[str]:
    """Yield the texts of the training rows, to train a tokenizer on; `wants` as in `prepare`.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """
    for result in select_rows(_train(recipe, wants or _wants(recipe)), RowStats()):
        if isinstance(record := result.outcome, Record):
            yield from strings_of(record.prompt, *record.responses)


def count_rows(recipe: "Recipe", wants: Wants | None = None) -> tuple[int, dict[str, int]]:
    """Count the usable rows of the training set and of each named eval set, untokenized; `wants` as in `prepare`.

    Raises:
        DataError: A source cannot be read.
        SetupError: The hub cannot be reached.
    """

    def count(selection: Selection) -> int:
        results = select_rows(selection, RowStats())
        return sum(result.copies for result in results if isinstance(result.outcome, Record))

    wants = wants or _wants(recipe)
    sets = {name: _selection(recipe, sources, wants) for name, sources in recipe.data.eval.items()}
    return count(_train(recipe, wants)), {name: count(selection) for name, selection in sets.items()}


def _wants(recipe: "Recipe") -> Wants:
    return "demonstrations" if recipe.method == "sft" else "pairs"


def _selection(recipe: "Recipe", sources: Sequence["Source"], wants: Wants, **split: Any) -> Selection:
    if any(source.path == STDIN for source in sources):
        raise DataError("-: data is read more than once, and stdin can be read only once", hint="save it to a file")
    method: Literal["sft", "dpo"] = "sft" if wants == "demonstrations" else "dpo"
    drop = recipe.data.duplicates == "drop"
    return Selection(tuple(sources), wants, recipe.training.seed, method, drop_duplicates=drop, **split)


def _train(recipe: "Recipe", wants: Wants) -> Selection:
    return _selection(recipe, recipe.data.train, wants, eval_size=recipe.data.eval_size)


def _evals(recipe: "Recipe", wants: Wants) -> dict[str, Selection]:
    evals = {name: _selection(recipe, sources, wants) for name, sources in recipe.data.eval.items()}
    if recipe.data.eval_size is not None:
        evals[HELD_OUT_NAME] = replace(_train(recipe, wants), side="eval")
    return evals


def _with_formats(recipe: "Recipe", wants: Wants, *, only_eval: bool) -> tuple["Recipe", dict[str, str]]:
    """Put detected formats in place of `auto`.

    Returns:
        The recipe, and the evidence for each source's format, by the source as JSON.
    """
    evidence: dict[str, str] = {}

    def detected(sources: Sequence["Source"]) -> list["Source"]:
        found = []
        for source in (selection := _selection(recipe, sources, wants)).sources:
            stats, _ = open_source(source, method=selection.method)
            found.append(source.model_copy(update={"format": stats.format}))
            evidence[found[-1].model_dump_json()] = stats.evidence
        return found

    evals = {name: detected(sources) for name, sources in recipe.data.eval.items()}
    is_read = not only_eval or recipe.data.eval_size is not None
    train = detected(recipe.data.train) if is_read else recipe.data.train
    data = recipe.data.model_copy(update={"train": train, "eval": evals})
    return recipe.model_copy(update={"data": data}), evidence


class _StoreFactory:
    """Finds or builds the stores of one recipe."""

    def __init__(
        self,
        recipe: "Recipe",
        tokenizer: "PreTrainedTokenizerBase",
        cache: Cache,
        evidence: dict[str, str],
        stops: Collection[int] | None,
    ) -> None:
        self._recipe = recipe
        self._cache = cache
        self._encoder = Encoder(tokenizer)
        self._evidence = evidence
        trained = recipe.sft if recipe.method == "sft" else recipe.dpo
        self._trained = [trained.loss_on, trained.train_on_think]
        self._renderer = Renderer(
            tokenizer, recipe.data.chat_template_kwargs, trained.loss_on, stops, trained.train_on_think
        )
        self._stops = None if stops is None else sorted(stops)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._held_out: HeldOut | None = None
        self._tries: Mapping[int, Tries] | None = None
        self._stores: list[tuple[TokenStore, Selection]] = []

    def store(self, name: str, selection: Selection) -> TokenStore:
        """Find or build the store of a set."""
        key = self._key(selection)
        stores = (find_store(folder / key, key, _paths(selection)) for folder in self._cache.folders(KIND))
        store = next((store for store in stores if store is not None), None) or self._build(name, selection, key)
        self._stores.append((store, selection))
        return store

    def report(self, train: TokenStore | None, evals: dict[str, TokenStore]) -> dict[str, Any]:
        """Join the reports of all sets, and print their summaries and warnings."""
        reports = {id(store): self._report(store, selection) for store, selection in self._stores}
        totals = {name: sum(report[name] for report in reports.values()) for name in ("rows", "used")}
        rejected = sum(sum(report["rejected"].values()) for report in reports.values())
        joined: dict[str, Any] = {**totals, "rejected": rejected, "train": None, "evals": {}}
        if train is not None:
            joined["train"] = reports[id(train)]
            announce("train", reports[id(train)])
        for name, store in evals.items():
            joined["evals"][name] = reports[id(store)]
            if train is not None:
                joined["evals"][name]["leaked"] = _leaked(store, train)
            announce(name, reports[id(store)])
        return joined

    def sources(self) -> list[tuple[TokenStore, list[str]]]:
        """Return all stores, with the paths of their sources."""
        return [(store, _paths(selection)) for store, selection in self._stores]

    def _build(self, name: str, selection: Selection, key: str) -> TokenStore:
        paths = _paths(selection)
        console.say(f"tokenizing {name}: {', '.join(dict.fromkeys(paths))}")
        selection = replace(selection, tries=self._first_tries(selection))
        if selection.eval_size is not None:
            selection = replace(selection, held_out=self._split(selection))
        majority = Majority()
        folder = self._cache.writable(KIND)
        while True:
            encoder = self._record_encoder(selection)
            with (
                writing_to(folder.parent),
                _frozen_heap(),
                StoreWriter(folder / key, key, self._encoder.dtype) as writer,
                console.WorkProgress(f"tokenizing {name}") as progress,
            ):
                report, used = build(selection, encoder, writer, majority, progress)
                tries = selection.tries if selection.eval_size else draw(selection, encoder, progress, used)
                if tries == selection.tries and (majority.is_closed or not majority.has_conflicts):
                    return self._commit(name, selection, key, writer, report)
            if tries != selection.tries:
                console.note(f"{name}: some rows that max_samples drew cannot be used; reading again with others")
                selection, majority = replace(selection, tries=tries), Majority()
                continue
            console.note(
                f"{name}: some pairs are contradicted by other rows; reading again to keep the majority's choice"
            )
            majority.close()

    def _record_encoder(self, selection: Selection) -> RecordEncoder:
        limits = [_limits(source, self._recipe.data) for source in selection.sources]
        return RecordEncoder(self._renderer, self._encoder, limits)

    def _first_tries(self, selection: Selection) -> Mapping[int, Tries]:
        """Return the rows to try first of sources with `max_samples`; both sides of a split try the same ones."""
        if selection.eval_size is not None and self._tries is not None:
            return self._tries
        tries = {
            number: Tries(rows := count_units(selection, number, source.format), sample_size(source, rows))
            for number, source in enumerate(selection.sources)
            if source.max_samples is not None
        }
        if selection.eval_size is None or not tries:
            return tries
        with console.WorkProgress("drawing rows") as progress:
            none = {number: one._replace(stop=0) for number, one in tries.items()}
            start = replace(selection, tries=none)
            self._tries = draw(start, self._record_encoder(selection), progress, Counter())
        return self._tries

    def _commit(
        self, name: str, selection: Selection, key: str, writer: StoreWriter, report: dict[str, Any]
    ) -> TokenStore:
        paths = _paths(selection)
        if self._key(selection) != key:
            # The key is that of the old content, which this store does not hold.
            raise DataError(
                f"{name}: {', '.join(dict.fromkeys(paths))} changed while it was read",
                hint="start again once it is written",
            )
        if TOO_SLOW in report["rejected"]:
            raise too_slow(name, paths, report)
        if not report["used"]:
            raise self._nothing_used(name, selection, paths, report)
        if selection.wants == "rankings" and report["most_answers"] < 3:
            raise DataError(
                f"{name}: {', '.join(dict.fromkeys(paths))} holds pairs; a list-wise loss needs rankings",
                hint="give rows with at least three rated answers, or choose a loss of pairs, e.g. sigmoid",
            )
        return writer.commit(report, paths)

    def _nothing_used(self, name: str, selection: Selection, paths: list[str], report: dict[str, Any]) -> DataError:
        """Make the error of an empty set; a split of rows of which none can be used is not to blame for that."""
        if selection.eval_size is None or selection.side == "train" or report["rows"]:
            return nothing_used(name, paths, report)
        stats, sound = RowStats(), False
        for result in select_rows(replace(selection, side="train", eval_size=None, held_out=None), stats):
            if isinstance(result.outcome, Reject):
                stats.reject(result.outcome, result.places)
            else:
                sound = True
        if sound:
            return nothing_used(name, paths, report, held_out=selection.eval_size)
        first = {reason: [place, detail] for reason, (place, detail) in stats.first_rejected.items()}
        rows = sum(source.rows for source in stats.sources)
        counts = {"rows": rows, "rejected": dict(stats.rejected), "held_out": 0, "unsampled": 0}
        return nothing_used("train", paths, counts | {"first_rejected": first})

    def _split(self, selection: Selection) -> HeldOut:
        size = selection.eval_size
        assert size is not None
        if self._held_out is None:
            if isinstance(size, float):
                self._held_out = HeldOut(selection.seed, size)
            else:
                results = select_rows(replace(selection, side="train"), RowStats())
                topics = (result.outcome.topic for result in results if isinstance(result.outcome, Record))
                self._held_out = HeldOut.of_size(size, selection.seed, topics)
        return self._held_out

    def _key(self, selection: Selection) -> str:
        """Hash everything on which the tokens depend, and nothing else."""
        data = self._recipe.data
        parts: dict[str, Any] = {
            "code": CODE_VERSION,
            "wants": selection.wants,
            "sources": [_source_identity(source, selection, data) for source in selection.sources],
            "tokenizer": [self._encoder.state, self._encoder.bos, self._encoder.eos, self._special_tokens],
            "template": [self._renderer.templates, data.chat_template_kwargs, self._trained, self._stops],
            "duplicates": data.duplicates,
        }
        if selection.eval_size is not None:
            parts["split"] = [selection.eval_size, selection.side]
        if selection.eval_size is not None or any(map(_uses_seed, selection.sources)):
            parts["seed"] = selection.seed
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _report(self, store: TokenStore, selection: Selection) -> dict[str, Any]:
        """Return a store's report with the paths that its sources have today."""
        report, paths = {"key": store.key, **store.report}, _paths(selection)
        report["sources"] = [
            counts | {"path": source.path, "evidence": self._evidence[source.model_dump_json()]}
            for counts, source in zip(report["sources"], selection.sources, strict=True)
        ]
        report["first_rejected"] = {
            reason: {"file": location(paths[place[0]], place[1]), "line": place[2], "detail": detail}
            for reason, (place, detail) in report["first_rejected"].items()
        }
        return report


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep the garbage collector from searching the objects that exist now, such as the modules of torch.

    Those searches take a sixth of the time that it takes to tokenize. A heap that the caller froze stays as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _paths(selection: Selection) -> list[str]:
    return [source.path for source in selection.sources]


def _limits(source: "Source", data: "DataSection") -> Limits:
    """Return the length limits of a source's rows."""
    truncate = (source.overlong or data.overlong) == "truncate"
    return Limits(
        max_length=source.max_length or data.max_length,
        max_prompt_length=source.max_prompt_length or data.max_prompt_length,
        truncate=truncate,
        keep_start=truncate and (source.prompt_truncation or data.prompt_truncation) == "keep_start",
    )


def _source_identity(source: "Source", selection: Selection, data: "DataSection") -> list[Any]:
    """List everything that decides which rows a source gives, and which records they become."""
    pairing = pairing_of(source, selection.wants, seed=0)
    return [
        fingerprint(source, method=selection.method),
        *(source.format, source.format_options, source.weight, source.max_samples, source.column_map),
        pairing and asdict(pairing),
        asdict(_limits(source, data)),
    ]


def _uses_seed(source: "Source") -> bool:
    """Whether the rows or pairs of a source depend on the seed."""
    return is_random(source) or source.pairs == "best-random" or source.max_pairs_per_prompt is not None


def _leaked(store: TokenStore, train: TokenStore) -> dict[str, int]:
    """Count the prompts of a set that the training set holds too, and the records that have them."""
    known = store.prompt_hash[np.isin(store.prompt_hash, train.prompt_hash)]
    return {"prompts": len(np.unique(known)), "records": len(known)}
