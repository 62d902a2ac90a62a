"""`report.html`: a run on one page that needs nothing else: no script, no network, all data escaped."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpoctl import __version__, console
from dpoctl.errors import UsageError
from dpoctl.runs import curves
from dpoctl.runs.curves import number, percent
from dpoctl.runs.directory import RESOLVED_RECIPE
from dpoctl.runs.figures import History, figures, losses_of, remarks
from dpoctl.runs.files import write_atomically
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.redact import redact, redact_text
from dpoctl.runs.results import LENGTHS, data_sets, tables

NAME = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
MOST_SAMPLES = 24
# A perplexity beyond this is a number for nobody.
MOST_NATS = 20
GRADES = ("error", "warning", "note")
# Control characters in data are shown, not obeyed; halves of characters cannot even be written.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


class Tile(NamedTuple):
    """A number that stands for the run."""

    label: str
    value: str
    detail: str


class Sample(NamedTuple):
    """What reference and policy answer to one prompt."""

    prompt: str
    reference: str
    policy: str
    reference_finished: bool
    policy_finished: bool


class SampleSet(NamedTuple):
    """The samples of one file."""

    title: str
    samples: tuple[Sample, ...]
    hidden: int


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run: The run directory.
        output: Where to; `report.html` in the run directory by default.

    Raises:
        UsageError: The folder is no run, or its files are not what a run writes.
    """
    if not (run / RESOLVED_RECIPE).is_file():
        raise UsageError(f"{run} is not a run of dpoctl: it has no {RESOLVED_RECIPE}", hint="name an output_dir")
    target = output or run / NAME
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {str(target.parent)!r} to write the report to")
    write_atomically(target, render(run))
    return target


def refresh_report(run: Path) -> None:
    """Write the report of a run; where it fails, that is one warning and no more."""
    try:
        write_report(run)
    except Exception as error:
        console.warn(f"the report was not written ({type(error).__name__}: {error}); see `dpoctl report {run}`")


def render(run: Path) -> str:
    """Make the page."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value.translate(VISIBLE) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        css=css, css_hash=f"sha256-{digest}", size=curves, version=__version__, **_contents(run)
    )


def _contents(run: Path) -> dict[str, Any]:
    recipe = redact(yaml.safe_load(_text(run / RESOLVED_RECIPE)) or {})
    data = _json(run / "data_report.json") or {}
    evaluation = _json(run / "eval.json") or {}
    history = History.of(MetricsFile(run / "metrics.jsonl").rows(), list(data.get("evals") or {}))
    return {
        "title": run.resolve().name,
        "subtitle": _describe(recipe, history),
        "written": _day(run / "metrics.jsonl"),
        "tiles": list(_tiles(recipe, history, evaluation)),
        "remarks": [*remarks(history, recipe), *_symptoms(run / "health.json")],
        "advice": _advice(run / "advice.json"),
        "figures": figures(history, recipe),
        "evaluations": _evaluations(history),
        "results": tables(evaluation),
        "sample_sets": list(_sample_sets(run / "samples")),
        "data_sets": data_sets(data),
        "length_names": LENGTHS,
        "recipe_text": redact_text(_text(run / "recipe.yaml") or _text(run / RESOLVED_RECIPE)),
        "resolved_text": redact_text(_text(run / RESOLVED_RECIPE)),
        "environment": list(_environment(redact(_json(run / "env.json") or {}))),
    }


def _describe(recipe: Mapping[str, Any], history: History) -> str:
    """The run in one line."""
    model, training = recipe.get("model") or {}, recipe.get("training") or {}
    lora, scratch = recipe.get("lora"), model.get("from_scratch")
    method = "SFT" if recipe.get("method") == "sft" else f"DPO ({' + '.join(map(_loss, losses_of(recipe)))})"
    name = f"a new {scratch['config'].get('model_type')}" if scratch else model.get("model_name_or_path")
    with_ = f"LoRA of rank {lora.get('r', '?')}" if lora else "all weights"
    return (
        f"{method} of {name}, {with_}; {history.last_step:,} steps of {training.get('global_batch_size')}, "
        f"learning rate {training.get('learning_rate')}"
    )


def _loss(term: Mapping[str, Any]) -> str:
    weight = f"{term['weight']:g} x " if "weight" in term else ""
    beta = f", β {term['beta']:g}" if isinstance(term.get("beta"), int | float) else ""
    return f"{weight}{term.get('type')}{beta}"


def _symptoms(path: Path) -> Iterator[str]:
    """What was seen of the run's health while it trained."""
    for one in _json(path) or ():
        yield f"Step {one['step']:,}: {one['message']}; {one['hint']}."


def _tiles(recipe: Mapping[str, Any], history: History, evaluation: Mapping[str, Any]) -> Iterator[Tile]:
    """The numbers that stand for the run: of the last evaluation, with their intervals where `eval` measured them."""
    name, table = next(iter(history.evals.items()), ("", {}))
    last = {metric: points[-1][1] for metric, points in table.items() if points}
    last |= {key: value for key, value in evaluation.items() if isinstance(value, int | float)}
    first = {metric: points[0][1] for metric, points in table.items() if points}
    if (accuracy := last.get("rewards/accuracies")) is not None:
        interval = evaluation.get("rewards/accuracies_ci")
        detail = f"95 % interval {percent(interval[0])} to {percent(interval[1])}" if interval else f"on {name}"
        pairs = evaluation.get("num_pairs")
        yield Tile("Reward accuracy", percent(accuracy), f"{detail}, {pairs:,} pairs" if pairs else detail)
    if (margin := last.get("rewards/margins")) is not None:
        yield Tile("Reward margin", number(margin), "chosen minus rejected, held-out")
    losses = [points for points in (table.get("loss"), history.train.get("loss")) if points]
    if losses:
        start, end = losses[0][0][1], last.get("loss", losses[0][-1][1])
        yield Tile("Loss", number(end), f"from {number(start)}{', held-out' if 'loss' in table else ''}")
    if recipe.get("method") == "sft" and losses and last.get("loss", math.inf) < MOST_NATS:
        yield Tile("Perplexity", number(math.exp(last["loss"])), "held-out, per token")
    for side in ("chosen", "rejected"):
        if recipe.get("method") == "dpo" and f"logps/{side}" in first:
            change = table[f"logps/{side}"][-1][1] - first[f"logps/{side}"]
            sign = "+" if change > 0 else ""
            yield Tile(f"Log-prob of {side}", f"{sign}{number(change)}", "nats per answer, since the start")


def _advice(path: Path) -> list[dict[str, Any]] | None:
    """The findings that the run started with, the gravest first; None where it kept none."""
    kept = _json(path)
    return None if kept is None else sorted(kept, key=lambda one: GRADES.index(one["grade"]))


def _evaluations(history: History) -> list[dict[str, Any]]:
    """Every evaluation as numbers, one table an eval set."""
    found = []
    for name, table in history.evals.items():
        steps = sorted({step for points in table.values() for step, _ in points})
        by_step = {metric: dict(points) for metric, points in table.items()}
        rows = [
            [f"{step:,.0f}", *(number(at[step]) if step in at else "" for at in by_step.values())] for step in steps
        ]
        found.append({"name": name, "columns": ["step", *table], "rows": rows})
    return found


def _sample_sets(folder: Path) -> Iterator[SampleSet]:
    """The samples of a run, the newest first: those of `dpoctl eval`, then by falling step."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: (file.name == "eval.jsonl", file.name), reverse=True)
    for file in files:
        rows = [row for line in _text(file).splitlines() if isinstance(row := _parsed(line), dict)]
        shown = tuple(
            Sample(
                _flat(row.get("prompt")),
                _flat(row.get("reference")),
                _flat(row.get("policy")),
                bool(row.get("reference_finished", True)),
                bool(row.get("policy_finished", True)),
            )
            for row in rows[:MOST_SAMPLES]
        )
        if shown:
            step = rows[0].get("step")
            title = "after training" if file.name == "eval.jsonl" else f"step {step}" if step is not None else file.stem
            yield SampleSet(title, shown, len(rows) - len(shown))


def _flat(text: Any) -> str:
    """A text, or a conversation as text."""
    if isinstance(text, list):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in text if isinstance(m, dict))
    return "" if text is None else str(text)


def _environment(env: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in env.items():
        if isinstance(value, Mapping):
            yield from ((str(name), str(version)) for name, version in value.items())
        elif value is not None:
            yield key.replace("_", " "), " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    if not path.is_file():
        return None
    if (value := _parsed(_text(path))) is None:
        raise UsageError(f"{path} is not JSON", hint="delete it, and what it tells is left out")
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat() if path.is_file() else ""
