"""A comparison as tables: on the terminal, as markdown for a pull request, and as a page."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpoctl import __version__
from dpoctl.redact import redact
from dpoctl.runs import charts
from dpoctl.runs.charts import Figure, History, Mark, Series, number
from dpoctl.runs.comparison import MeasuredRun, Paired, RunComparison, describe
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.pages import TEMPLATES, template
from dpoctl.runs.results import SAMPLES
from dpoctl.runs.verdicts import vote_words

MOST_PROMPTS = 12
CURVES = {
    "loss": ("Loss", "Of the main eval set."),
    "rewards/accuracies": ("Reward accuracy", "Share of pairs whose chosen answer has the higher reward."),
    "rewards/margins": ("Reward margin", "In units of each run's own reward: another beta is another unit."),
    "logps/chosen": ("Log-probability of chosen answers", "Of whole answers, in nats."),
}
LOOKS = 4
LONGEST = 60
_SPECIAL = re.compile(r"([|<>@`*_\[\]\\])")


@dataclass(frozen=True)
class Block:
    """A table of texts.

    Attributes:
        title: its heading.
        columns: the names of the columns; the first column names the rows.
        rows: the texts.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def blocks(comparison: RunComparison) -> list[Block]:
    """Return the tables of a comparison, without empty ones: recipes, numbers, and differences on the same records."""
    names = short_names(comparison.runs)
    recipe = redact(comparison.recipe)
    found = [Block("recipes", ("key", *names), tuple((key, *map(_value, each)) for key, each in recipe.items()))]
    numbers = tuple((path, *map(_cell, each)) for path, each in comparison.metrics.items())
    found.append(Block("results, with 95 % intervals", ("metric", *names), numbers))
    paths = dict.fromkeys(path for paired in comparison.paired for path in paired)
    differences = tuple((path, *(_difference(each.get(path)) for each in comparison.paired[1:])) for path in paths)
    found.append(Block(f"difference from {names[0]} on the same records", ("metric", *names[1:]), differences))
    return [block for block in found if block.rows]


def short_names(runs: Sequence[MeasuredRun]) -> list[str]:
    """Return the names of the folders, or the paths as they were given if two have the same name."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


def to_markdown(comparison: RunComparison) -> str:
    """Return the comparison for a comment on a pull request, bound to the recipes, data and weights by their hashes."""
    names = short_names(comparison.runs)
    lines = ["### dpoctl compare", ""]
    lines += [f"- {_plain(line)}" for line in comparison.verdicts()]
    lines += [
        f"- {_plain(name)}: {_plain(str(gate))}"
        for name, run in zip(names, comparison.runs, strict=True)
        for gate in run.gates
    ]
    for block in blocks(comparison):
        lines += ["", f"**{_plain(block.title)}**", "", _row(block.columns), _row(["---"] * len(block.columns))]
        lines += [_row(row) for row in block.rows]
    lines += ["", "<details><summary>What this is about</summary>", ""]
    for name, run in zip(names, comparison.runs, strict=True):
        data = ", ".join(f"{key} `{value}`" for key, value in run.data_keys.items())
        lines.append(
            f"- {_plain(name)}: recipe sha256 `{run.recipe_sha}`, data {data}, model `{run.report['model']}`: "
            f"{_plain(describe(run))}"
        )
    lines += ["", f"dpoctl {__version__}", "", "</details>", ""]
    return "\n".join(lines)


class ShownAnswer(NamedTuple):
    """The answer of a model, and how a judge voted on it, if one did."""

    name: str
    text: str
    vote: str


class ShownPrompt(NamedTuple):
    """A prompt with the answers of the reference of the first run, and of all runs."""

    prompt: str
    answers: tuple[ShownAnswer, ...]


def to_page(comparison: RunComparison) -> str:
    """Return the comparison as one HTML page without scripts or requests."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    names = short_names(comparison.runs)
    return template("compare.html.jinja").render(
        css=css,
        css_hash=f"sha256-{digest}",
        size=charts,
        version=__version__,
        title=" · ".join(names),
        verdicts=[line.removeprefix("verdict: ") for line in comparison.verdicts()],
        gates=[
            (name, gate.passed, str(gate))
            for name, run in zip(names, comparison.runs, strict=True)
            for gate in run.gates
        ],
        blocks=blocks(comparison),
        figures=list(_figures(comparison.runs, names)),
        prompts=_prompts(comparison.runs, names),
        about=[describe(run) for run in comparison.runs],
    )


def _figures(runs: Sequence[MeasuredRun], names: Sequence[str]) -> Iterator[Figure]:
    histories = [History.of(MetricsFile(run.path / "metrics.jsonl").rows(), list(run.data_keys)) for run in runs]
    for metric, (title, caption) in CURVES.items():
        series = [
            Series(name, f"eval-{index % LOOKS}", history.evals.get("eval", {}).get(metric, []), is_sparse=True)
            for index, (name, history) in enumerate(zip(names, histories, strict=True))
        ]
        shares = metric == "rewards/accuracies"
        mark, bounds = (Mark(0.5, "chance"), (0.0, 1.0)) if shares else (None, None)
        if (figure := charts.draw(title, caption, series, mark=mark, bounds=bounds, are_shares=shares)) is not None:
            yield figure


def _prompts(runs: Sequence[MeasuredRun], names: Sequence[str]) -> list[ShownPrompt]:
    """Return the first prompts that every run answered, each with the first answer of each run."""
    answered = [_answers(run) for run in runs]
    common = [prompt for prompt in answered[0] if all(prompt in each for each in answered)]
    found = []
    for prompt in common[:MOST_PROMPTS]:
        rows = [each[prompt] for each in answered]
        before = ShownAnswer(f"before {names[0]}", str(rows[0].get("reference", "")), "")
        after = [
            ShownAnswer(name, str(row.get("policy", "")), vote_words(row))
            for name, row in zip(names, rows, strict=True)
        ]
        found.append(ShownPrompt(prompt_text(rows[0].get("prompt")), (before, *after)))
    return found


def _answers(run: MeasuredRun) -> dict[str, Mapping[str, Any]]:
    path = run.file.with_suffix(SAMPLES)
    found: dict[str, Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        found.setdefault(json.dumps(row.get("prompt")), row)
    return found


def prompt_text(prompt: Any) -> str:
    """Return a prompt, or a conversation, as text."""
    if isinstance(prompt, list):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt if isinstance(m, dict))
    return "" if prompt is None else str(prompt)


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _cell(found: tuple[float, tuple[float, float] | None] | None) -> str:
    if found is None:
        return ""
    value, interval = found
    return number(value) if interval is None else f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def _difference(one: Paired | None) -> str:
    if one is None:
        return "not the same records"
    spread = "" if one.interval is None else f" ({number(one.interval[0])} to {number(one.interval[1])})"
    sign = "+" if one.difference > 0 else ""
    return f"{sign}{number(one.difference)}{spread}, p {one.p_value:.2g}"


def _plain(text: str) -> str:
    """Escape what markdown or HTML would read, and mentions."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("@", "@\u200b")


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text if text == '---' else _plain(text) for text in texts)} |"
