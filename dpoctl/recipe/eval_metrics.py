"""The metrics that the evaluations of a run report, by name, as far as the recipe decides them."""

from collections.abc import Iterator, Sequence

from dpoctl.losses import TargetNLL, terms_of
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath
from dpoctl.recipe.key_errors import closest
from dpoctl.recipe.loss_section import SFT, NamedLoss
from dpoctl.recipe.schema import Recipe

KEEP_BEST: KeyPath = ("training", "keep_best")
EARLY_STOPPING: KeyPath = ("training", "early_stopping")
NO_EVAL_DATA = "there is no eval data; set data.eval or data.eval_size"
EVAL_DATA: tuple[KeyPath, ...] = (("data", "eval"), ("data", "eval_size"))
MAIN_SET = "eval"
SIDES = ("chosen", "rejected")
OF_PAIRS = (
    *(f"rewards/{name}" for name in (*SIDES, "margins", "accuracies")),
    *(f"{name}/{side}" for name in ("logps", "lengths") for side in SIDES),
)
OF_LABELS = tuple(f"{name}/{side}" for name in ("rewards", "logps", "lengths") for side in SIDES)
OF_SAMPLES = ("samples/finished", "samples/median_length")


def eval_prefix(name: str) -> str:
    """Return what stands before the metrics of an eval set."""
    return "eval_" if name == MAIN_SET else f"eval_{name}_"


def eval_metrics(recipe: Recipe, losses: Sequence[NamedLoss]) -> list[str]:
    """Return the names of the metrics of the evaluations of a run, each with its prefix.

    Args:
        recipe: A recipe whose keys are valid one by one.
        losses: Its preference losses; empty for SFT.
    """
    own = _of_task(recipe, losses)
    sets = dict(recipe.data.eval)
    if recipe.data.eval_size is not None:
        sets[MAIN_SET] = recipe.data.train
    names = []
    for name, sources in sets.items():
        groups = dict.fromkeys(source.metrics for source in sources if source.metrics is not None)
        names += [f"{eval_prefix(name)}{metric}" for metric in ("loss", *own)]
        names += [f"{eval_prefix(name)}{group}/{metric}" for group in groups for metric in own]
    samples, judge = recipe.eval.samples, recipe.eval.judge
    if samples is not None and (samples.prompts is not None or samples.num):
        names += [f"eval_{name}" for name in OF_SAMPLES]
        names += [] if judge is None or judge.target is None else [f"eval_judge/{judge.target}"]
    return list(dict.fromkeys(names))


def find_unknown_metric(recipe: Recipe, losses: Sequence[NamedLoss]) -> Iterator[Diagnostic]:
    """Find a metric of `keep_best` that no evaluation reports, and early stopping that watches none."""
    training = recipe.training
    if training.early_stopping is not None and training.keep_best is None:
        message = (
            "early_stopping needs keep_best, whose metric it watches; "
            "e.g. keep_best: {metric: eval_rewards/accuracies, mode: max}"
        )
        yield Diagnostic.error(EARLY_STOPPING, message, related=(KEEP_BEST,))
    known = eval_metrics(recipe, losses)
    if training.keep_best is None or not known or training.keep_best.metric in known:
        return
    given = training.keep_best.metric
    match = closest(given, known) or next((name for name in known if name == f"eval_{given}"), None)
    hint = f"did you mean {match!r}?" if match else f"the evaluations of this run report {', '.join(known[:12])}"
    message = f"training.keep_best.metric: no evaluation reports {given!r}, {hint}"
    yield Diagnostic.error((*KEEP_BEST, "metric"), message)


def find_misspelt_expectation(recipe: Recipe, losses: Sequence[NamedLoss]) -> Iterator[Diagnostic]:
    """Find an expected metric that nothing measures, or whose name is nearly that of a metric."""
    evals = eval_metrics(recipe, losses)
    known = ["loss", *_of_task(recipe, losses), *evals]
    for metric in recipe.expected:
        path: KeyPath = ("expected", metric)
        if metric.startswith("eval_") and not evals:
            yield Diagnostic.error(path, f"{metric} is never measured: {NO_EVAL_DATA}", related=EVAL_DATA)
        elif metric not in known and (near := closest(metric, known, cutoff=0.8)) is not None:
            yield Diagnostic.error(path, f"{metric} is no metric, did you mean {near!r}?")


def _of_task(recipe: Recipe, losses: Sequence[NamedLoss]) -> tuple[str, ...]:
    if recipe.method == "sft":
        return ("loss",) if recipe.sft.average == "tokens" else ("nll_loss",)
    of_rows = OF_LABELS if losses[0].loss.rows == "labels" else OF_PAIRS
    has_target = any(spec.get("type") == SFT for _, spec in recipe.dpo.losses)
    has_target |= any(isinstance(term.loss, TargetNLL) for one in losses for term in terms_of(one.loss, 1.0))
    return (*of_rows, *(("nll_loss",) if has_target else ()))
