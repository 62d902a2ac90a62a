"""`report.html`: one page about a run, without scripts or network requests, with all data escaped.

The files of `evals/` and `data_report.json` become its tables. Numbers of different eval sets are never mixed.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpoctl import __version__, console
from dpoctl.errors import UsageError, writing
from dpoctl.files import write_atomically
from dpoctl.redact import redact, redact_text
from dpoctl.runs import charts
from dpoctl.runs.best import NAME as BEST
from dpoctl.runs.charts import History, figures, losses_of, number, observations, percent
from dpoctl.runs.expected import read_comparisons
from dpoctl.runs.metrics import STANDARD_ERROR, MetricsFile
from dpoctl.runs.names import RESOLVED_RECIPE, require_run
from dpoctl.runs.pages import TEMPLATES, template
from dpoctl.runs.record_values import SUFFIX as RECORDS
from dpoctl.runs.record_values import read_record_values
from dpoctl.runs.result_tables import Cell, Table, TableRow, tables
from dpoctl.runs.results import PROVENANCE, SAMPLES, fingerprint, in_words, read_results
from dpoctl.runs.status import describe_status, read_status
from dpoctl.runs.verdicts import Part, Verdict, accuracy_by_length, verdict_of, vote_words, wins_by_length

NAME = "report.html"
MOST_SAMPLES = 24
# A larger loss gives a perplexity that means nothing.
MOST_NATS = 20
GRADES = ("error", "warning", "note")


class Tile(NamedTuple):
    """A headline number of the run."""

    label: str
    value: str
    detail: str


class SampleRow(NamedTuple):
    """The answers of reference and policy to one prompt."""

    prompt: str
    reference: str
    policy: str
    reference_finished: bool
    policy_finished: bool
    vote: str = ""


class SampleSet(NamedTuple):
    """The samples of one file."""

    title: str
    samples: tuple[SampleRow, ...]
    hidden: int
    file: str


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run: The run directory.
        output: The file to write; the default is `report.html` in the run directory.

    Raises:
        UsageError: The folder is not a run, or a file in it is damaged.
    """
    require_run(run)
    target = output or run / NAME
    if not target.parent.is_dir():
        raise UsageError(f"--output: there is no folder {str(target.parent)!r}", hint="create it first")
    try:
        page = render(run)
    except (AttributeError, LookupError, TypeError) as error:
        message = f"a file of {run} is not as dpoctl wrote it: {type(error).__name__}: {error}"
        raise UsageError(message, hint="restore it; --debug shows which value it is") from error
    with writing(target.parent):
        write_atomically(target, page)
    return target


def report_verdict(run: Path) -> Verdict | None:
    """Return the verdict of the newest result of a run's own eval sets; None if there is none of its weights."""
    return verdict_of(official_result(run, read_results(run)))


def refresh_report(run: Path) -> None:
    """Write the report of a run; an error is only a warning."""
    try:
        write_report(run)
    except Exception as error:
        console.warn(f"the report was not written: {type(error).__name__}: {error}; try `dpoctl report {run}`")


def render(run: Path) -> str:
    """Return the page as HTML."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return template("report.html.jinja").render(
        css=css, css_hash=f"sha256-{digest}", size=charts, version=__version__, **_contents(run)
    )


class Result(NamedTuple):
    """The tables of a result of `dpoctl eval`, and in words what it was measured on.

    Attributes:
        about: model, data, limit and baseline.
        is_official: whether it is of the run's own eval sets, all of their records, and of the weights of now.
        tables: its numbers.
    """

    about: str
    is_official: bool
    tables: tuple[Table, ...]


class DataSet(NamedTuple):
    """The row counts of one data set."""

    name: str
    rows: int
    used: int
    facts: tuple[tuple[str, str], ...]
    lengths: tuple[tuple[str, tuple[str, ...]], ...]
    sources: tuple[tuple[str, str], ...]
    first: tuple[str, ...]


LENGTHS = ("mean", "p5", "p50", "p95", "max")
FACTS = (
    *("held_out", "unsampled", "duplicates", "tied_pairs", "outvoted_pairs"),
    *("prompts_truncated", "answers_truncated", "eos_added"),
)


def data_sets(report: Mapping[str, Any]) -> list[DataSet]:
    """Return the row counts of `data_report.json`."""
    sets = {"train": report.get("train"), **(report.get("evals") or {})}
    return [_data_set(name, account) for name, account in sets.items() if isinstance(account, Mapping)]


def _contents(run: Path) -> dict[str, Any]:
    recipe = redact(yaml.safe_load(_text(run / RESOLVED_RECIPE)) or {})
    data = _json(run / "data_report.json") or {}
    results = read_results(run)
    official = official_result(run, results)
    rows = MetricsFile(run / "metrics.jsonl").rows()
    history = History.of(rows, list(data.get("evals") or {}))
    return {
        "title": run.resolve().name,
        "subtitle": describe_run(recipe, history),
        "written": _times(rows) or _day(run / "metrics.jsonl"),
        "verdict": verdict_of(official),
        "breakdowns": list(_breakdowns(run, results, official)),
        "tiles": list(_tiles(recipe, history, official)),
        "observations": [
            *_unfinished(run),
            *_best(run),
            *map(str, read_comparisons(run)),
            *observations(history, recipe),
            *_symptoms(run / "health.json"),
        ],
        "advice": _advice(run / "advice.json"),
        "figures": figures(history, recipe),
        "evaluations": _evaluations(history),
        "results": _results(results, official),
        "sample_sets": list(_sample_sets(run, results, official)),
        "data_sets": data_sets(data),
        "length_names": LENGTHS,
        "recipe_text": redact_text(_text(run / "recipe.yaml") or _text(run / RESOLVED_RECIPE)),
        "resolved_text": redact_text(_text(run / RESOLVED_RECIPE)),
        "environment": list(_environment(redact(_json(run / "env.json") or {}))),
    }


def describe_run(recipe: Mapping[str, Any], history: History) -> str:
    """Return the run in one line."""
    model, training = recipe.get("model") or {}, recipe.get("training") or {}
    lora, scratch = recipe.get("lora"), model.get("from_scratch")
    method = "SFT" if recipe.get("method") == "sft" else f"DPO ({' + '.join(map(_loss, losses_of(recipe)))})"
    name = f"a new {scratch['config'].get('model_type')}" if scratch else model.get("model_name_or_path")
    some = training.get("trainable")
    whole = f"the weights {', '.join(map(str, some))}" if some else "all weights"
    trained = f"LoRA of rank {lora.get('r', '?')}" if lora else whole
    return (
        f"{method} of {name}, {trained}; {history.last_step:,} steps of {training.get('global_batch_size')}, "
        f"learning rate {training.get('learning_rate')}"
    )


def _loss(term: Mapping[str, Any]) -> str:
    weight = f"{term['weight']:g} x " if "weight" in term else ""
    beta = f", β {term['beta']:g}" if isinstance(term.get("beta"), int | float) else ""
    return f"{weight}{term.get('type')}{beta}"


def _unfinished(run: Path) -> Iterator[str]:
    """Yield the state of a run that has not finished."""
    status = read_status(run)
    # The report of a run is written before it records that it has finished.
    if status is not None and status["state"] not in ("finished", "running"):
        yield f"The run {describe_status(status)}."


def _best(run: Path) -> Iterator[str]:
    """Yield which evaluation was the best one, if the run has the model of that one."""
    if (best := _json(run / BEST)) is not None:
        last = "not finite" if best["last_value"] is None else number(best["last_value"])
        yield (
            f"The exported model is of step {best['step']:,}, the best evaluation: {best['metric']} is "
            f"{number(best['value'])} there, and {last} at step {best['last_step']:,}, the last one."
        )


def _symptoms(path: Path) -> Iterator[str]:
    """Yield the health symptoms of the run."""
    for one in _json(path) or ():
        yield f"Step {one['step']:,}: {one['message']}; {one['hint']}."


def official_result(run: Path, results: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Return the newest result of the run's own eval sets, if it is of the weights that the run has now."""
    own = [report for _, report in results if report["official"]]
    weights = fingerprint(run) if own else ""
    return next((report for report in own if report["model"] == weights), {})


def _results(results: Sequence[tuple[Path, dict[str, Any]]], official: Mapping[str, Any]) -> list[Result]:
    """Return all results, the official one first."""
    found = []
    for _, report in sorted(results, key=lambda one: one[1] is not official):
        is_old = report["official"] and report is not official
        about = f"{in_words(report)}; {report['date'][:10]}{'; of earlier weights of this run' if is_old else ''}"
        found.append(Result(about, report is official, tuple(tables(report))))
    return found


def _tiles(recipe: Mapping[str, Any], history: History, official: Mapping[str, Any]) -> Iterator[Tile]:
    """Yield the headline numbers, all of one eval set: of the last evaluation, or of the official result."""
    names = [*history.evals, *(official.get("sets") or {})]
    name = "eval" if "eval" in (official.get("data") or {}) else next(iter(names), "eval")
    result = official if name == "eval" else (official.get("sets") or {}).get(name, {})
    table = history.evals.get(name, {})
    last = {metric: points[-1][1] for metric, points in table.items() if points}
    last |= {key: value for key, value in result.items() if isinstance(value, int | float) and key not in PROVENANCE}
    step = max((points[-1][0] for points in table.values() if points), default=0)
    where = f"{name} set, " + ("dpoctl eval" if result else f"step {step:,.0f}")
    if (accuracy := last.get("rewards/accuracies")) is not None:
        interval, pairs = result.get("rewards/accuracies_ci"), result.get("num_pairs")
        spread = (
            f"95 % interval {percent(interval[0])} to {percent(interval[1])}, {pairs:,} pairs; " if interval else ""
        )
        yield Tile("Reward accuracy", percent(accuracy), f"{spread}{where}")
    if (margin := last.get("rewards/margins")) is not None:
        yield Tile("Reward margin", number(margin), f"chosen minus rejected; {where}")
    losses = table.get("loss") or ([] if result else history.train.get("loss"))
    if losses or "loss" in last:
        start = f"from {number(losses[0][1])}; " if losses else ""
        yield Tile(
            "Loss",
            number(last.get("loss", losses[-1][1] if losses else math.nan)),
            f"{start}{where if last else 'training'}",
        )
    if recipe.get("method") == "sft" and last.get("loss", math.inf) < MOST_NATS:
        yield Tile("Perplexity", number(math.exp(last["loss"])), f"per token; {where}")
    for side in ("chosen", "rejected"):
        if recipe.get("method") == "dpo" and (points := table.get(f"logps/{side}")):
            change = points[-1][1] - points[0][1]
            sign = "+" if change > 0 else ""
            detail = f"nats per answer since step {points[0][0]:,.0f}; {name} set, step {points[-1][0]:,.0f}"
            yield Tile(f"Log-prob of {side}", f"{sign}{number(change)}", detail)


def _breakdowns(
    run: Path, results: Sequence[tuple[Path, dict[str, Any]]], official: Mapping[str, Any]
) -> Iterator[Table]:
    """Yield tables of the official result by the length of answers, and of its rewards by source."""
    file = next((path for path, report in results if report is official), None)
    if file is None:
        return
    for name, values in read_record_values(file.with_suffix(RECORDS)).items():
        rows = [_part_row(f"chosen answer {part.name}", part) for part in accuracy_by_length(values)]
        if rows:
            yield Table(f"Reward accuracy by length, {name} set", (), tuple(rows))
    samples = [row for line in _text(file.with_suffix(SAMPLES)).splitlines() if isinstance(row := _parsed(line), dict)]
    if wins := [_part_row(f"answer of the policy {part.name}", part) for part in wins_by_length(samples)]:
        yield Table("Win rate by length", (), tuple(wins))
    accuracies = {
        key.removesuffix("/rewards/accuracies"): value
        for key, value in official.items()
        if key.endswith("/rewards/accuracies")
    }
    if accuracies:
        rows = [TableRow(source, (Cell(percent(value)),)) for source, value in accuracies.items()]
        yield Table("Reward accuracy by source", (), tuple(rows))


def _part_row(name: str, part: Part) -> TableRow:
    low, high = part.interval
    spread = f"{percent(low)} to {percent(high)}, {part.count:,}"
    return TableRow(name, (Cell(percent(part.value), spread, (part.value, low, high)),))


def _advice(path: Path) -> list[dict[str, Any]] | None:
    """Return the advice that the run started with, errors first; None if the run has none."""
    kept = _json(path)
    return None if kept is None else sorted(kept, key=lambda one: GRADES.index(one["grade"]))


def _evaluations(history: History) -> list[dict[str, Any]]:
    """Return every evaluation as numbers, one table per eval set."""
    found = []
    for name, table in history.evals.items():
        table = {metric: points for metric, points in table.items() if not metric.endswith(STANDARD_ERROR)}
        steps = sorted({step for points in table.values() for step, _ in points})
        by_step = {metric: dict(points) for metric, points in table.items()}
        rows = [
            [f"{step:,.0f}", *(number(at[step]) if step in at else "" for at in by_step.values())] for step in steps
        ]
        found.append({"name": name, "columns": ["step", *table], "rows": rows})
    return found


def _sample_sets(
    run: Path, results: Sequence[tuple[Path, dict[str, Any]]], official: Mapping[str, Any]
) -> Iterator[SampleSet]:
    """Yield the samples of a run: of the official result, by descending step of the training, of other results."""
    ordered = sorted(results, key=lambda one: one[1] is not official)
    measured = [(in_words(report), path.with_suffix(SAMPLES)) for path, report in ordered]
    first = measured[: len(official) > 0]
    steps = sorted((run / "samples").glob("*.jsonl"), reverse=True)
    for title, file in [*first, *(("", file) for file in steps), *measured[len(first) :]]:
        rows = [row for line in _text(file).splitlines() if isinstance(row := _parsed(line), dict)]
        shown = tuple(
            SampleRow(
                _flat(row.get("prompt")),
                _flat(row.get("reference")),
                _flat(row.get("policy")),
                bool(row.get("reference_finished", True)),
                bool(row.get("policy_finished", True)),
                vote_words(row),
            )
            for row in rows[:MOST_SAMPLES]
        )
        if shown:
            step = rows[0].get("step")
            of_step = f"step {step}" if step is not None else file.stem
            yield SampleSet(title or of_step, shown, len(rows) - len(shown), str(file.relative_to(run)))


def _flat(text: Any) -> str:
    """Return a text, or a conversation as text."""
    if isinstance(text, list):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in text if isinstance(m, dict))
    return "" if text is None else str(text)


def _environment(env: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in env.items():
        if key == "forecast":
            yield from _forecast(value)
        elif isinstance(value, Mapping):
            yield from ((str(name), str(version)) for name, version in value.items())
        elif value is not None:
            yield key.replace("_", " "), " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _forecast(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield predicted and measured memory and speed of the run."""
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        predicted, measured = found["memory_predicted"], found["memory_measured"]
        share = f"{measured / predicted - 1:+.0%}"
        yield "memory", f"{predicted / 1e9:.2f} GB predicted, {measured / 1e9:.2f} GB measured ({share})"
        low, usual, high = found["tokens_per_second_predicted"]
        speed = found["tokens_per_second_measured"]
        yield "tokens a second", f"{usual:,.0f} predicted ({low:,.0f} to {high:,.0f}), {speed:,.0f} measured"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is no file."""
    if not path.is_file():
        return None
    if (value := _parsed(_text(path))) is None:
        raise UsageError(f"{path} is not JSON", hint="delete it; the report then leaves it out")
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return when the first and the last row of metrics were written, and the time between them."""
    times = [str(row["time"]) for row in rows if "time" in row]
    try:
        first, last = (datetime.fromisoformat(time) for time in (times[0], times[-1]))
    except (IndexError, ValueError):
        return ""
    day = "" if first.date() == last.date() else f"{last:%Y-%m-%d} "
    return f"{first:%Y-%m-%d %H:%M} to {day}{last:%H:%M} UTC ({console.duration((last - first).total_seconds())})"


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat() if path.is_file() else ""


def _data_set(name: str, account: Mapping[str, Any]) -> DataSet:
    tokens = dict(account.get("tokens") or {})
    facts = [(key.replace("_", " "), account.get(key)) for key in FACTS]
    facts += [(f"dropped: {reason}", count) for reason, count in (account.get("rejected") or {}).items()]
    shown = [(key, f"{value:,}") for key, value in facts if isinstance(value, int) and value]
    shown += [(f"tokens, {key}", f"{tokens[key]:,}") for key in ("total", "scored") if isinstance(tokens.get(key), int)]
    first = account.get("first_rejected") or {}
    return DataSet(
        name=name,
        rows=int(account.get("rows") or 0),
        used=int(account.get("used") or 0),
        facts=tuple(shown),
        lengths=tuple(
            (side, tuple(f"{lengths.get(key, 0):,}" for key in LENGTHS))
            for side, lengths in tokens.items()
            if isinstance(lengths, Mapping)
        ),
        sources=tuple(
            (str(source.get("path")), f"{source.get('format')}, {source.get('rows', 0):,} rows")
            for source in account.get("sources") or []
        ),
        first=tuple(
            f"{reason}: {at.get('file')}:{at.get('line')} {at.get('detail') or ''}".rstrip()
            for reason, at in first.items()
        ),
    )
