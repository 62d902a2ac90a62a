"""The model card of a run: `README.md`, with results, data and recipe, as the hub shows it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpoctl import __version__, console
from dpoctl.files import write_atomically
from dpoctl.recipe.document import write_yaml
from dpoctl.redact import redact_text
from dpoctl.runs.charts import History, number, percent
from dpoctl.runs.expected import read_comparisons
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.names import RESOLVED_RECIPE
from dpoctl.runs.report import data_sets, describe_run, official_result
from dpoctl.runs.results import read_results

NAME = "README.md"
MARK = "<!-- Written by dpoctl after each run and evaluation. Without this line it keeps your text. -->"
METRICS = ("loss", "rewards/accuracies", "rewards/margins")
HUB_ID = re.compile(r"(?!runs/)[\w-][\w.-]*/[\w.-]+", re.ASCII)
VERSIONS = ("torch", "transformers", "peft")


def refresh_card(run: Path) -> None:
    """Write the model card of a run, unless a person has written one; an error is only a warning."""
    card = run / NAME
    try:
        if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
            return
        write_atomically(card, model_card(run))
    except Exception as error:
        console.warn(f"the model card was not written: {type(error).__name__}: {error}")


def model_card(run: Path) -> str:
    """Return the card as Markdown, with the metadata that the hub reads."""
    resolved = (run / RESOLVED_RECIPE).read_text(encoding="utf-8")
    recipe = yaml.safe_load(resolved)
    report = _json(run / "data_report.json")
    history = History.of(MetricsFile(run / "metrics.jsonl").rows(), list(report.get("evals") or {}))
    parts = [
        f"---\n{write_yaml(_metadata(run, recipe))}---\n{MARK}",
        f"# {run.resolve().name}",
        f"{describe_run(recipe, history)}. Trained with dpoctl {__version__}.",
        *_results(run, history),
        *_data(report),
        f"## Recipe\n\n<details><summary>All keys, with their defaults</summary>\n\n{_fenced(resolved)}\n\n</details>",
        *_versions(_json(run / "env.json")),
    ]
    return redact_text("\n\n".join(parts)) + "\n"


def _metadata(run: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the hub reads; only names of the hub, since it looks them up."""
    model = str((recipe.get("model") or {}).get("model_name_or_path") or "")
    sources = (recipe.get("data") or {}).get("train") or []
    datasets = list(dict.fromkeys(str(source["path"]) for source in sources if _is_of_hub(str(source["path"]))))
    is_adapter = (run / "adapter_config.json").exists()
    return {
        "library_name": "peft" if is_adapter else "transformers",
        **({"base_model": model} if _is_of_hub(model) else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["dpoctl", str(recipe.get("method"))],
    }


def _is_of_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _results(run: Path, history: History) -> Iterator[str]:
    """Yield the last metrics of each eval set, the verdicts of `dpoctl eval`, and the expected metrics."""
    rows = [
        f"| {_cell(name)} | {metric} | {number(points[0][1])} | {number(points[-1][1])} |"
        for name, table in history.evals.items()
        for metric in METRICS
        if (points := table.get(metric))
    ]
    lines = [*_verdicts(official_result(run, read_results(run))), *(f"- {one}" for one in read_comparisons(run))]
    if rows:
        yield "\n".join(["## Results", "", "| eval set | metric | first | last |", "|---|---|--:|--:|", *rows])
    if lines:
        yield "\n".join(lines) if rows else "\n".join(["## Results", "", *lines])


def _verdicts(official: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `dpoctl eval` found out on the run's own eval sets."""
    sets = {"": official} if "rewards/accuracies" in official else dict(official.get("sets") or {})
    for name, result in sets.items():
        accuracy, interval = result.get("rewards/accuracies"), result.get("rewards/accuracies_ci")
        if accuracy is None or not interval:
            continue
        where = f" of {name}" if name else ""
        yield (
            f"- The chosen answer has the higher reward in {percent(accuracy)} of {result.get('num_pairs', 0):,} pairs"
            f"{where} (95 % interval {percent(interval[0])} to {percent(interval[1])})."
        )


def _data(report: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for one in data_sets(report):
        sources = ", ".join(f"{_cell(path)} ({about})" for path, about in one.sources)
        dropped = ", ".join(f"{key.removeprefix('dropped: ')} {value}" for key, value in one.facts if "dropped" in key)
        rows.append(f"| {_cell(one.name)} | {one.used:,} of {one.rows:,} | {_cell(dropped)} | {sources} |")
    if rows:
        yield "\n".join(["## Data", "", "| set | rows used | dropped | sources |", "|---|--:|---|---|", *rows])


def _versions(env: Mapping[str, Any]) -> Iterator[str]:
    packages = env.get("packages") or {}
    if found := [f"{name} {packages[name]}" for name in VERSIONS if name in packages]:
        yield f"Made with {', '.join(found)}."


def _cell(text: str) -> str:
    """Return a text that cannot end a cell of a table, or begin markup."""
    return re.sub(r"([|<>\[\]`*_])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Return a text in a block of code that nothing in it ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
