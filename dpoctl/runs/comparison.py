"""Comparison of runs: what differs in their recipes, and by how much their results differ, record by record."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from dpoctl.errors import UsageError
from dpoctl.recipe.document import flatten
from dpoctl.recipe.eval_sections import GateSection
from dpoctl.runs.gates import GateResult, check_gates, find_metric, metric_paths
from dpoctl.runs.names import RESOLVED_RECIPE, require_run
from dpoctl.runs.record_values import SUFFIX, RecordValues, read_record_values
from dpoctl.runs.results import PROVENANCE, SAMPLES, fingerprint, in_words, read_results
from dpoctl.runs.statistics import t_quantile

Floats = NDArray[np.float64]
MAIN_SET = "eval"
IGNORED = ("training.output_dir", "training.run_name", "eval.gates")
"""Keys of recipes that say nothing about the models."""
HEADLINES = (("judge.win_rate", 1), ("rewards/accuracies", 1), ("nll_loss", -1), ("loss", -1))
"""The metrics that a verdict is about, the first that there is, and whether more is better."""
OF_DATA = ("lengths/chosen", "lengths/rejected")
"""Metrics that do not depend on the model."""
FEWEST = 5
"""With fewer prompts, no interval means anything."""
DRAWS, EXACT = 9_999, 13
"""Random signs, and the number of prompts up to which all combinations of signs are tried."""


class Paired(NamedTuple):
    """The difference of a metric between two models on the same records.

    Attributes:
        difference: the metric of the model minus that of the first one.
        interval: its 95 % interval; None with fewer than five prompts.
        p_value: the probability of so large a difference if the models are equally good.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return {**self._asdict(), "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class MeasuredRun:
    """A run with the result that it is compared by.

    Attributes:
        path: the run directory, as it was given.
        recipe_text: the resolved recipe.
        file: the result.
        report: its content.
        gates: the gates of the run's recipe.
    """

    path: Path
    recipe_text: str
    file: Path
    report: Mapping[str, Any]
    gates: Sequence[GateResult] = ()

    @property
    def name(self) -> str:
        """The folder, as it was given."""
        return str(self.path)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The keys of the resolved recipe, dotted."""
        return flatten(yaml.safe_load(self.recipe_text))

    @property
    def recipe_sha(self) -> str:
        """The SHA-256 of the resolved recipe."""
        return hashlib.sha256(self.recipe_text.encode()).hexdigest()

    @property
    def data_keys(self) -> dict[str, str]:
        """The key of the tokens of each eval set, which hashes its rows, the tokenizer and the template."""
        return {name: str(about["key"]) for name, about in self.report["data"].items()}

    @cached_property
    def records(self) -> dict[str, RecordValues]:
        """The metrics of the records of each eval set."""
        return read_record_values(self.file.with_suffix(SUFFIX))


@dataclass(frozen=True)
class RunComparison:
    """Several runs beside each other, all compared with the first.

    Attributes:
        runs: in the order in which they were given.
    """

    runs: Sequence[MeasuredRun]

    @property
    def recipe(self) -> dict[str, list[Any]]:
        """The keys of the recipes that differ, with the value of each run; None where a key is not set."""
        keys = dict.fromkeys(key for run in self.runs for key in run.recipe)
        values = {key: [run.recipe.get(key) for run in self.runs] for key in keys if key not in IGNORED}
        return {key: each for key, each in values.items() if any(value != each[0] for value in each)}

    @property
    def metrics(self) -> dict[str, list[tuple[float, tuple[float, float] | None] | None]]:
        """Every number of the results by its path, with its interval, for each run that has it."""
        plain = [
            {key: value for key, value in run.report.items() if key not in (*PROVENANCE, "gates")} for run in self.runs
        ]
        paths = dict.fromkeys(path for report in plain for path in metric_paths(report) if not path.endswith("_se"))
        return {path: [find_metric(report, path) for report in plain] for path in paths}

    @cached_property
    def paired(self) -> list[dict[str, Paired]]:
        """For each run, the differences from the first one on the same records, by the paths of the metrics."""
        return [_paired(self.runs[0], run) for run in self.runs]

    @property
    def passed(self) -> bool:
        """Whether all gates of all runs passed."""
        return all(gate.passed for run in self.runs for gate in run.gates)

    def verdicts(self) -> list[str]:
        """Say of each run but the first whether it is better, with numbers."""
        return [
            verdict(run.name, self.runs[0].name, self.metrics, index, self.paired[index])
            for index, run in enumerate(self.runs)
            if index
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        runs = [
            {
                "run": run.name,
                "recipe_sha256": run.recipe_sha,
                "data": run.data_keys,
                "model": run.report["model"],
                "result": str(run.file),
                "gates": [gate.to_dict() for gate in run.gates],
                "paired": {path: one.to_dict() for path, one in paired.items()},
            }
            for run, paired in zip(self.runs, self.paired, strict=True)
        ]
        metrics = {
            path: [None if one is None else {"value": one[0], "interval": one[1]} for one in found]
            for path, found in self.metrics.items()
        }
        recipe = json.loads(json.dumps(self.recipe, default=str))
        return {
            "runs": runs,
            "recipe": recipe,
            "metrics": metrics,
            "verdicts": self.verdicts(),
            "passed": self.passed,
        }


def measured(paths: Sequence[Path]) -> list[MeasuredRun]:
    """Choose the result of each run: on data that all of them were measured on, of the weights that they have now.

    Raises:
        UsageError: A folder is not a run, or has no result of its weights.
    """
    candidates = []
    for path in paths:
        require_run(path)
        weights = fingerprint(path)
        own = [(file, report) for file, report in read_results(path) if report["model"] == weights]
        if not own:
            raise UsageError(
                f"{path} has no result of the model that it has now", hint=f"run `dpoctl eval {path}` first"
            )
        candidates.append(sorted(own, key=lambda one: not one[1]["official"]))
    common = set.intersection(*({_measured_on(report) for _, report in own} for own in candidates))
    chosen = []
    for path, own in zip(paths, candidates, strict=True):
        file, report = next((one for one in own if _measured_on(one[1]) in common), own[0])
        text = (path / RESOLVED_RECIPE).read_text(encoding="utf-8")
        chosen.append(MeasuredRun(path, text, file, report, check_gates(report, _gates(path, text))))
    return chosen


def verdict(
    name: str,
    first: str,
    metrics: Mapping[str, Sequence[tuple[float, tuple[float, float] | None] | None]],
    index: int,
    paired: Mapping[str, Paired],
) -> str:
    """Say whether a run is better than the first one, by the first metric of `HEADLINES` that both have."""
    for path, sign in HEADLINES:
        found = metrics.get(path)
        if found is None or found[index] is None or found[0] is None:
            continue
        then, now = found[0][0], found[index][0]  # type: ignore[index]
        numbers = f"{path} {then:.4g} -> {now:.4g}"
        if (one := paired.get(path)) is None:
            return f"verdict: {name}: not comparable with {first} record by record: {numbers}"
        spread = f", {one.interval[0]:+.4g} to {one.interval[1]:+.4g}" if one.interval else ""
        if not one.difference and one.interval == (0, 0):
            return f"verdict: {name}: no difference shown from {first}: {numbers}, the same on every record"
        better = "better" if sign * one.difference > 0 else "worse"
        words = f"{better} than" if one.is_shown else "no difference shown from"
        by = f"difference {one.difference:+.4g}{spread}; p {one.p_value:.2g}"
        return f"verdict: {name}: {words} {first}: {numbers} ({by})"
    return f"verdict: {name}: no metric that {first} has too"


def paired_difference(
    first: tuple[Floats, Floats], second: tuple[Floats, Floats], prompts: NDArray[np.int64]
) -> Paired | None:
    """Compare a metric, a ratio of sums, between two models on the same records.

    With r = sum(x) / sum(y) of each model, the difference is linearised: d_i = (x_i - r y_i) / mean(y), second minus
    first, and summed by prompt. The error of the difference is sqrt(G / (G - 1) sum_g d_g^2) / n for G prompts, its
    interval that of Student's t with G - 1 degrees of freedom. The p-value is that of a sign-flip test: if the models
    are equally good, a prompt's difference is as likely as its negative.

    Args:
        first: sums x and counts y of each record, `[N]` each, under the first model.
        second: the same under the second one.
        prompts: `[N]`, records of one prompt have the same value.

    Returns:
        The difference, or None if there is nothing to count.
    """
    if not len(prompts) or not first[1].sum() or not second[1].sum():
        return None
    rates = [float(x.sum() / y.sum()) for x, y in (first, second)]
    difference, size = rates[1] - rates[0], len(prompts)
    _, cluster = np.unique(prompts, return_inverse=True)
    groups = int(cluster.max()) + 1
    sides = list(zip((-1, 1), rates, (first, second), strict=True))
    # Second model minus first, by record and then by prompt: the shares add up to n differences, the residuals to 0.
    shares = sum(sign * x / y.mean() for sign, _, (x, y) in sides)
    residuals = sum(sign * (x - rate * y) / y.mean() for sign, rate, (x, y) in sides)
    by_prompt = [np.bincount(cluster, weights=values, minlength=groups) for values in (shares, residuals)]
    interval = None
    if groups >= FEWEST:
        error = math.sqrt(groups / (groups - 1) * float(by_prompt[1] @ by_prompt[1])) / size
        spread = t_quantile(0.975, groups - 1) * error
        interval = difference - spread, difference + spread
    return Paired(difference, interval, sign_flip_p_value(by_prompt[0].astype(np.float64)))


def sign_flip_p_value(values: Floats, seed: int = 0) -> float:
    """Return the two-sided p-value of a sum of values whose signs are random: exact for few of them, else by draws."""
    values = values[values != 0]
    observed = abs(float(values.sum())) * (1 - 1e-12)
    if not len(values):
        return 1.0
    if len(values) <= EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    generator, larger = np.random.default_rng(seed), 0
    for _ in range(9):
        signs = generator.integers(0, 2, (DRAWS // 9, len(values)), dtype=np.int8) * 2.0 - 1.0
        larger += int((np.abs(signs @ values) >= observed).sum())
    return (larger + 1) / (DRAWS + 1)


def _paired(first: MeasuredRun, second: MeasuredRun) -> dict[str, Paired]:
    """Return the differences of the metrics of all eval sets that are the same records in both results."""
    if second is first:
        return {}
    found: dict[str, Paired] = {}
    if (wins := _paired_wins(first, second)) is not None:
        found["judge.win_rate"] = wins
    for name, values in second.records.items():
        others = first.records.get(name)
        same = first.data_keys.get(name) == second.data_keys.get(name)
        if others is None or not same or not np.array_equal(others.prompts, values.prompts):
            continue
        for metric in (metric for metric in values.names if metric in others.names and metric not in OF_DATA):
            at, there = values.names.index(metric), others.names.index(metric)
            pair = (others.sums[there], others.counts[there]), (values.sums[at], values.counts[at])
            if (one := paired_difference(*pair, values.prompts)) is not None:
                path = metric if name == MAIN_SET else f"sets.{name}.{metric}"
                found[_as_reported(path, second.report)] = one
    return found


def _paired_wins(first: MeasuredRun, second: MeasuredRun) -> Paired | None:
    """Return the difference of the win rates of a judge over the prompts that both runs were judged on."""
    texts = [run.file.with_suffix(SAMPLES) for run in (first, second)]
    if not all(path.is_file() for path in texts):
        return None
    pairs = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in texts]
    prompts, wins = [], []
    for rows in zip(*pairs, strict=False):
        keys = {json.dumps([row.get("prompt"), row.get("repeat")]) for row in rows}
        votes = [(row.get("judge") or {}).get("win") for row in rows]
        if len(keys) > 1:
            return None
        if all(isinstance(vote, int | float) for vote in votes):
            prompts.append(json.dumps(rows[0].get("prompt")))
            wins.append([float(vote or 0) for vote in votes])
    if len(pairs[0]) != len(pairs[1]) or not wins:
        return None
    before, after = np.array(wins).T
    clusters = np.unique(prompts, return_inverse=True)[1].astype(np.int64)
    return paired_difference((before, np.ones(len(before))), (after, np.ones(len(after))), clusters)


def _as_reported(path: str, report: Mapping[str, Any]) -> str:
    """Return the path of a metric in a result: the nats per token of SFT are its loss there."""
    return path if find_metric(report, path) is not None else path.replace("nll_loss", "loss")


def _measured_on(report: Mapping[str, Any]) -> str:
    return json.dumps([{name: about["key"] for name, about in report["data"].items()}, report["limit"]], sort_keys=True)


def _gates(path: Path, recipe_text: str) -> list[GateSection]:
    try:
        gates = (yaml.safe_load(recipe_text).get("eval") or {}).get("gates") or []
        return [GateSection.model_validate(gate) for gate in gates]
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        where = path / RESOLVED_RECIPE
        raise UsageError(f"{where} is damaged: {str(error).splitlines()[0]}", hint="copy the run again") from error


def describe(run: MeasuredRun) -> str:
    """Say in one line what a run is compared by."""
    return f"{in_words(run.report)}; recipe {run.recipe_sha[:12]}"
