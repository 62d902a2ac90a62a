"""`dpoctl convert-data --format sampled`: answers that a model writes to prompts are scored, and become pairs."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rich.table import Table

from dpoctl import console
from dpoctl.data.formats.trl import canonical_rows
from dpoctl.data.pairing import Pairing, pair_up
from dpoctl.data.pipeline import RowStats, Selection, select_rows
from dpoctl.data.readers import suffix_of
from dpoctl.data.records import Record, Reject, Text
from dpoctl.errors import DataError
from dpoctl.model.generate import Generation
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.pair_generation import ItemsSection
from dpoctl.recipe.sampled_pairs import ITEM, PromptsSection, SampledRecipe, load_sampled
from dpoctl.runs.metrics import Progress
from dpoctl.tasks.pair_generation import Answers, PairOutcome, Writer, read_items, sizes_of, targets_of, write_pairs
from dpoctl.tasks.paths import check_sampled_paths
from dpoctl.tasks.scorers import AnswerScorer, build_scorer
from dpoctl.tasks.served import Client, Endpoint, Request
from dpoctl.tasks.setup import quiet_libraries

LEAST_AT_ONCE = 64
"""The number of prompts that are answered before their answers are scored; more where a batch is larger."""
UNUSABLE = {
    "empty": "are empty",
    "cut_off": "did not end within sampling.max_new_tokens",
    "repeated": "repeat another one to the same prompt",
    "no_score": "have no score",
}
"""Why an answer cannot be used, by the name under which it is counted."""


def run(
    path: Path | str,
    *,
    output: Path | str,
    rejects: Path | str | None = None,
    overrides: Sequence[str] = (),
    json_output: bool = False,
) -> None:
    """Make the pairs of a recipe of sampled pairs.

    Answers are kept until all pairs are written, those of a served model and all scores for good: after an interruption
    the same command continues, and gives the same pairs.

    Args:
        path: the recipe.
        output: the file of pairs; the name of each split is added to its name.
        rejects: a file for the prompts without a pair, one JSON object each.
        overrides: `key=value` texts that replace values of the recipe.
        json_output: print the counts as one JSON object on stdout.

    Raises:
        UsageError: the recipe is wrong.
        DataError: the prompts cannot be read, or give fewer pairs than a split needs.
        SetupError: a model or a server cannot be used.
        RunError: a server or a command fails.
    """
    quiet_libraries()
    recipe = load_sampled(path, overrides)
    check_sampled_paths(recipe, Path(path))
    targets = targets_of(Path(output), recipe.splits)
    prompts, left_out = read_prompts(recipe.prompts)
    wanted = sum(recipe.splits.values()) or len(prompts)
    if len(prompts) < wanted:
        path = recipe.prompts.path
        raise DataError(f"{path}: it has {len(prompts):,} prompts, but the splits need {wanted:,} with pairs")
    # The held-out prompts must not depend on the order of the file.
    random.Random(recipe.sampling.seed).shuffle(prompts)
    outcome = SampledOutcome(left_out=left_out)
    side_file = Path(output).with_name(f"{Path(output).name}.partial")
    scorer = build_scorer(recipe.score)
    with ExitStack() as stack:
        source = _source_of(recipe, side_file, stack)
        progress = stack.enter_context(Progress(wanted, unit="prompt"))
        _sample(recipe, prompts, wanted, source, scorer, outcome, progress)
    sizes = sizes_of(outcome, recipe.splits)
    write_pairs(outcome, sizes, targets, None if rejects is None else Path(rejects))
    side_file.unlink(missing_ok=True)
    _report(outcome, sizes, targets)
    if json_output:
        console.emit(json.dumps(outcome.counts() | {"files": {name: str(file) for name, file in targets.items()}}))


@dataclass
class SampledOutcome(PairOutcome):
    """The pairs of scored answers, and the prompts without one."""

    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers: `drawn`, and those that cannot be used, by reason."""
    scores: list[float] = field(default_factory=list)
    """Of all answers that have one."""
    best: list[float] = field(default_factory=list)
    """The highest score of each prompt."""

    def counts(self) -> dict[str, Any]:
        """Return the counts, and the means of the scores."""
        counts = {name: value for name, value in super().counts().items() if name != "examples_copied"}
        answers = {name: count for name, count in sorted(self.answers.items()) if count}
        means = {name: fmean(values) for name, values in (("score", self.scores), ("best_score", self.best)) if values}
        return counts | {"pairs": sum(map(len, self.rows)), "answers": answers, **means}

    def cause(self) -> str | None:
        """Return why there are too few pairs, in words: what is wrong with the answers."""
        wrong = [f"{self.answers[name]:,} {words}" for name, words in UNUSABLE.items() if self.answers[name]]
        return f"of {self.answers['drawn']:,} answers, {', '.join(wrong)}" if wrong else super().cause()


class AnswerSource(Protocol):
    """Answers prompts."""

    def as_prompt(self, prompt: Text) -> Text:
        """Return a prompt as it is asked, and as the pairs hold it."""

    def draw(self, prompts: Sequence[Text], count: int) -> list[list[Generation]]:
        """Return several answers to each prompt."""


@dataclass(frozen=True)
class _Served:
    """A model behind an endpoint, whose client keeps its answers."""

    client: Client
    recipe: SampledRecipe

    def as_prompt(self, prompt: Text) -> Text:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def draw(self, prompts: Sequence[Text], count: int) -> list[list[Generation]]:
        given = self.recipe.sampling
        sampling = {"max_tokens": given.max_new_tokens, "temperature": given.temperature, "top_p": given.top_p}
        more = {} if self.recipe.endpoint is None else self.recipe.endpoint.request

        def fields(number: int) -> dict[str, Any]:
            # A server that takes a seed would give the same answer again for the same one.
            body = sampling | {"seed": given.seed * count + number} | more
            return {name: value for name, value in body.items() if value is not None}

        requests = [
            Request(prompt, fields(number), repeat=number)
            for prompt in prompts
            if not isinstance(prompt, str)
            for number in range(count)
        ]
        replies = [Generation(one.text, one.finished) for one in self.client.ask(requests, "asking")]
        return [replies[start : start + count] for start in range(0, len(replies), count)]


def read_prompts(section: PromptsSection) -> tuple[list[Text], Counter[str]]:
    """Read prompts, without duplicates.

    Returns:
        The prompts in the order of their source, and the number of unused rows by reason.

    Raises:
        UsageError: A column is missing, or an option of the format does not exist.
        DataError: The source cannot be read, or has no prompts.
        SetupError: The hub cannot be reached.
    """
    if section.column is not None or suffix_of(Path(section.path)) == ".txt":
        items, left_out = read_items(
            ItemsSection(path=section.path, column=section.column, split=section.split), "prompts"
        )
        return [section.template.replace(ITEM, item) for item in items], left_out
    options = {"format": section.format, "format_options": section.format_options}
    source = Source(path=section.path, split=section.split, **options)
    found: dict[str, Text] = {}
    left_out = Counter()
    for result in select_rows(Selection((source,), None, seed=0, keep_ratings=True, labels="keep"), RowStats()):
        record = result.outcome
        if isinstance(record, Reject):
            left_out[record.reason] += len(result.places)
        elif record.tools or record.template_kwargs or not record.prompt:
            left_out["no_prompt" if not record.prompt else "has_tools"] += 1
        elif (key := json.dumps(record.prompt, sort_keys=True)) in found:
            left_out["duplicate_prompt"] += 1
        else:
            found[key] = record.prompt
    if not found:
        raise DataError(f"{section.path} has no prompts")
    return list(found.values()), left_out


def _source_of(recipe: SampledRecipe, side_file: Path, stack: ExitStack) -> AnswerSource:
    if (served := recipe.endpoint) is not None:
        endpoint = Endpoint(served.url, served.model, served.api_key_env, served.concurrency, served.timeout)
        return _Served(Client(endpoint, served.max_requests), recipe)
    assert recipe.model is not None
    return stack.enter_context(Answers(Writer.load(recipe.model, recipe.quantization, recipe.sampling), side_file))


def _sample(
    recipe: SampledRecipe,
    prompts: Sequence[Text],
    wanted: int,
    source: AnswerSource,
    scorer: AnswerScorer,
    outcome: SampledOutcome,
    progress: Progress,
) -> None:
    """Answer prompts until enough of them have pairs, and warn if most answers are the same."""
    size = max(LEAST_AT_ONCE, recipe.sampling.batch_size)
    for start in range(0, len(prompts), size):
        chunk = [source.as_prompt(prompt) for prompt in prompts[start : start + size]]
        for record in _scored(chunk, source.draw(chunk, recipe.sampling.num), scorer, outcome):
            if len(outcome.rows) < wanted:
                _add_pairs(record, recipe, outcome)
        progress.update(len(outcome.rows), {})
        if len(outcome.rows) >= wanted:
            break
    if 2 * (repeated := outcome.answers["repeated"]) > (drawn := outcome.answers["drawn"]):
        console.warn(
            f"{repeated:,} of {drawn:,} answers repeat another one to the same prompt: raise sampling.temperature; "
            "`transformers serve` samples only if the generation_config.json of its model has do_sample: true"
        )


def _scored(
    prompts: Sequence[Text], drawn: Sequence[Sequence[Generation]], scorer: AnswerScorer, outcome: SampledOutcome
) -> list[Record]:
    """Score the answers that can be used; return a record for each prompt, with the answers that have a score."""
    texts = [_usable(answers, outcome) for answers in drawn]
    records = []
    for prompt, answers, scores in zip(prompts, texts, scorer(prompts, texts), strict=True):
        known = [(text, score) for text, score in zip(answers, scores, strict=True) if score is not None]
        outcome.answers["no_score"] += len(answers) - len(known)
        outcome.scores += [score for _, score in known]
        outcome.best += [max(score for _, score in known)] if known else []
        is_text = isinstance(prompt, str)
        responses: tuple[Text, ...] = tuple(
            text if is_text else [{"role": "assistant", "content": text}] for text, _ in known
        )
        records.append(Record(prompt, responses, scores=tuple(score for _, score in known)))
    return records


def _usable(answers: Sequence[Generation], outcome: SampledOutcome) -> list[str]:
    """Return the texts that can be in a pair: finished ones, each once."""
    texts: list[str] = []
    for one in answers:
        text = one.text.strip()
        reason = "empty" if not text else "cut_off" if not one.finished else "repeated" if text in texts else None
        if reason is None:
            texts.append(text)
        else:
            outcome.answers[reason] += 1
    outcome.answers["drawn"] += len(answers)
    return texts


def _add_pairs(record: Record, recipe: SampledRecipe, outcome: SampledOutcome) -> None:
    """Add the pairs of a prompt, or the reason why it has none."""
    pairing = Pairing(
        mode=recipe.pairs,
        min_margin=recipe.min_margin or 0.0,
        max_pairs=recipe.max_pairs_per_prompt,
        seed=recipe.sampling.seed,
    )
    try:
        if len(record.responses) < 2:
            raise Reject("too_few_answers", f"{len(record.responses)} of the {recipe.sampling.num} answers can be used")
        paired, _ = pair_up(record, pairing)
    except Reject as reject:
        scores = list(record.scores)
        row = {"prompt": record.prompt, "reason": reject.reason, "detail": reject.detail, "scores": scores}
        outcome.rejects.append(row)
        return
    outcome.rows.append(canonical_rows(paired))


def _report(outcome: SampledOutcome, sizes: dict[str, int], targets: dict[str, Path]) -> None:
    counts = outcome.counts()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{counts['asked']:,}", "prompts answered")
    table.add_row(f"{counts['answers']['drawn']:,}", "answers")
    for reason in UNUSABLE:
        if count := counts["answers"].get(reason):
            table.add_row(f"{count:,}", f"  not used: {reason}")
    table.add_row(f"{counts['pairs']:,}", f"pairs of {counts['used']:,} prompts")
    for name, file in targets.items():
        table.add_row(f"{sizes[name]:,}", f"  prompts in {file}")
    for reason, count in {**counts["rejected"], **counts["left_out"]}.items():
        table.add_row(f"{count:,}", f"prompts not used: {reason}")
    for name, words in (("score", "mean score of all answers"), ("best_score", "of the best to each prompt")):
        if name in counts:
            table.add_row(f"{counts[name]:.3f}", words)
    console.say(table)
