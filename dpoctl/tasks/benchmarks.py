"""Benchmarks of lm-evaluation-harness on policy and reference, and the differences between the two, item by item."""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from difflib import get_close_matches
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.generate import library_forward
from dpoctl.model.packages import is_installed, needs
from dpoctl.recipe.eval_sections import BenchmarkSection
from dpoctl.runs.comparison import paired_difference

PACKAGE = "lm-eval"
NO_FILTER = "none"
BATCH_SIZE = 8
"""Items of lm-eval in a batch; they are padded to the longest one."""
ENVIRONMENT = ("get_git_commit_hash", "add_env_info")
"""The functions by which lm-eval describes the machine in its results."""
Items = Mapping[int, float]
"""The values of a metric by item."""


def check_benchmarks(benchmarks: Sequence[BenchmarkSection], *, has_baseline: bool = False) -> None:
    """Refuse benchmarks that cannot be run, before any model is loaded.

    Args:
        benchmarks: of the recipe.
        has_baseline: whether the model is compared with another one than its reference.

    Raises:
        SetupError: lm-eval is not installed.
        UsageError: It has no task of that name, or the baseline is not the reference.
    """
    if not benchmarks:
        return
    if has_baseline:
        raise UsageError(
            "--against: eval.benchmarks compare a run with its own reference, and with no other model",
            hint="leave --against out, or the benchmarks: --set 'eval.benchmarks=[]'",
        )
    if not is_installed(PACKAGE):
        raise needs("eval.benchmarks", [PACKAGE])
    for index, one in enumerate(benchmarks):
        known = _manager(one.include_path).all_tasks
        if one.task not in known:
            near = get_close_matches(one.task, known, 1)
            raise UsageError(
                f"eval.benchmarks[{index}].task: lm-eval has no task {one.task!r}",
                hint=f"did you mean {near[0]!r}?"
                if near
                else "`lm-eval ls tasks` lists them; include_path names a folder of your own",
            )


def run_benchmarks(
    benchmarks: Sequence[BenchmarkSection],
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: AbstractContextManager[PreTrainedModel] | None,
) -> dict[str, dict[str, Any]]:
    """Run benchmarks on a model and on its reference.

    Args:
        benchmarks: of the recipe.
        tokenizer: of both models.
        policy: the trained model.
        reference: gives the reference; None if there is none.

    Returns:
        For each task its metrics: the value of each model with the standard error of lm-eval, the number of items, and
        the `delta` of policy minus reference with its 95 % interval, its standard error and its p-value over the items.
        A metric that is no mean over items has no interval.
    """
    found = {one.task: _run(one, policy, tokenizer, "policy") for one in benchmarks}
    before: dict[str, dict[str, Any]] = {}
    if reference is not None:
        with reference as model:
            before = {one.task: _run(one, model, tokenizer, "reference") for one in benchmarks}
    joined: dict[str, dict[str, Any]] = {}
    for name, result in found.items():
        for task, metrics in _values(result).items():
            others = _values(before[name]).get(task, {}) if before else {}
            pairs = {metric: (value, others.get(metric)) for metric, value in metrics.items()}
            joined[task] = {
                metric: _compared(*each, *(_items(side, task, metric) for side in (result, before.get(name))))
                for metric, each in pairs.items()
            }
    return joined


def _run(one: BenchmarkSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, side: str) -> Any:
    from lm_eval import simple_evaluate  # noqa: PLC0415 - takes seconds, and is an extra
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    was_training = model.training
    with _quiet(), _no_environment(), library_forward(model), console.WorkProgress(f"{one.task} on the {side}"):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        try:
            return simple_evaluate(
                wrapped,
                tasks=[one.task],
                num_fewshot=one.num_fewshot,
                limit=one.limit,
                apply_chat_template=one.chat_template,
                task_manager=_manager(one.include_path),
                # Errors come from the items; resampling 100,000 times takes minutes, and overflows for bad models.
                bootstrap_iters=0,
            )
        except (OSError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SetupError(
                f"eval.benchmarks: lm-eval cannot run {one.task}: {lines[0]}",
                hint="see the task's files; data of the hub must be reachable or in its cache",
            ) from error
        finally:
            model.train(was_training)


@cache
def _manager(include_path: str | None) -> Any:
    """Return lm-eval's tasks; it reads ten thousand files for them."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    with _quiet():
        return TaskManager(include_path=include_path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages and progress bars of lm-eval away; its errors come as exceptions."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    # It prints to stdout, which is for results.
    with redirect_stdout(io.StringIO()), nullcontext() if console.is_interactive() else _no_bars():
        try:
            yield
        finally:
            logger.setLevel(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    from tqdm import tqdm  # noqa: PLC0415

    original = tqdm.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options | {"disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextmanager
def _no_environment() -> Iterator[None]:
    """Keep lm-eval from describing the machine: it runs programs for that, among them git, which prints errors."""
    from lm_eval import evaluator  # noqa: PLC0415

    originals = {name: getattr(evaluator, name) for name in ENVIRONMENT if hasattr(evaluator, name)}
    for name in originals:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(evaluator, name, original)


def _values(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task and group."""
    found: dict[str, dict[str, float]] = {}
    for task, values in {**result["results"], **(result.get("groups") or {})}.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                found.setdefault(task, {})[metric if filtered == NO_FILTER else key] = float(value)
    return found


def _items(result: Mapping[str, Any] | None, task: str, metric: str) -> Items:
    """Return the value of a metric for each item of a task; empty if it has none for single items."""
    name, _, filtered = metric.partition(",")
    rows = [] if result is None else (result.get("samples") or {}).get(task) or []
    rows = [row for row in rows if row.get("filter", NO_FILTER) == (filtered or NO_FILTER)]
    values = {row["doc_id"]: row.get(name) for row in rows}
    return {item: float(value) for item, value in values.items() if isinstance(value, int | float)}


def _compared(policy: float, reference: float | None, after: Items, before: Items) -> dict[str, Any]:
    """Return the values of a metric for both models, and their difference, with errors if they are means over items."""
    result = {"policy": policy, **_error("policy", policy, after)}
    if reference is None:
        return result
    result |= {"reference": reference, **_error("reference", reference, before), "delta": policy - reference}
    if "policy_se" not in result or "reference_se" not in result or after.keys() != before.keys():
        return result
    items = np.array(sorted(after))
    sides = [(np.array([side[item] for item in items]), np.ones(len(items))) for side in (before, after)]
    paired = paired_difference(sides[0], sides[1], items)
    if paired is None or paired.interval is None:
        return result
    error = float((sides[1][0] - sides[0][0]).std(ddof=1)) / math.sqrt(len(items))
    return result | {"delta_ci": list(paired.interval), "delta_se": error, "delta_p": paired.p_value}


def _error(side: str, value: float, items: Items) -> dict[str, float]:
    """Return the standard error of a metric and the number of items, if it is their mean."""
    values = np.array(list(items.values()))
    if len(values) < 2 or not np.isclose(values.mean(), value):
        return {}
    return {f"{side}_se": float(values.std(ddof=1)) / math.sqrt(len(values)), "num": len(values)}
