"""Which figures a run's metrics make, and what its curves say in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpoctl.runs.curves import Figure, Mark, Point, Series, draw, number

LN2 = Mark(math.log(2), "ln 2")
SUMS = "Mean over pairs of beta times log(policy / reference), summed over an answer's tokens, not averaged per token."
STATE = ("epoch", "learning_rate", "grad_norm", "tokens_per_second")
PAIRED = {
    "Rewards": ("rewards/chosen", "rewards/rejected", SUMS),
    "Log-probabilities": (
        "logps/chosen",
        "logps/rejected",
        "Of whole answers under the policy, in nats, summed over tokens. Both may fall; only their gap is trained.",
    ),
}
# What a run has risen above its best evaluation by, relative to all it has learned, before it is worth a word.
RISEN = 0.1
# How far from ln 2 a loss of preferences stays that has learned nothing.
STUCK = 0.003


@dataclass(frozen=True)
class History:
    """Metrics by series.

    Attributes:
        train: metric to its points.
        evals: name of an eval set to metric to its points; `eval` is the main one.
    """

    train: dict[str, list[Point]] = field(default_factory=dict)
    evals: dict[str, dict[str, list[Point]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "History":
        """Sort the rows of a metrics file.

        Args:
            rows: one a step, of training or of one evaluation.
            names: of the eval sets.
        """
        history = cls()
        for row in rows:
            for key, value in row.items():
                point = _value(value)
                if key == "step" or point is None:
                    continue
                history._series(key, names).append((float(row["step"]), point))
        return history

    @property
    def last_step(self) -> int:
        """Where the run is, or has ended."""
        steps = [points[-1][0] for table in (self.train, *self.evals.values()) for points in table.values()]
        return int(max(steps, default=0))

    def evaluations(self, metric: str) -> list[tuple[str, list[Point]]]:
        """The points of a metric on every eval set that has it."""
        return [(name, table[metric]) for name, table in self.evals.items() if metric in table]

    def _series(self, key: str, names: Sequence[str]) -> list[Point]:
        if not key.startswith("eval_"):
            return self.train.setdefault(key, [])
        rest = key.removeprefix("eval_")
        name = next(
            (n for n in sorted(names, key=len, reverse=True) if n != "eval" and rest.startswith(f"{n}_")), "eval"
        )
        metric = rest if name == "eval" else rest.removeprefix(f"{name}_")
        return self.evals.setdefault(name, {}).setdefault(metric, [])


def figures(history: History, recipe: Mapping[str, Any]) -> list[Figure]:
    """Draw every metric of a run: those of the task first, then those of the machine, then the user's own."""
    return [figure for figure in _figures(history, recipe) if figure is not None]


def _figures(history: History, recipe: Mapping[str, Any]) -> Iterator[Figure | None]:
    is_dpo = recipe.get("method") == "dpo"
    caption = (
        "Mean over pairs; in training, over those since the last point."
        if is_dpo
        else "Nats per token that is trained on."
    )
    yield _plain(history, "loss", "Loss", caption, mark=LN2 if _starts_at_ln2(recipe) else None, allow_log=not is_dpo)
    yield _plain(
        history,
        "rewards/accuracies",
        "Reward accuracy",
        "Share of pairs whose chosen answer has the higher reward. Before training it is 0, since ties count as wrong.",
        mark=Mark(0.5, "chance"),
        bounds=(0.0, 1.0),
        are_shares=True,
    )
    yield _plain(history, "rewards/margins", "Reward margin", "Reward of the chosen minus that of the rejected answer.")
    for title, (better, worse, meaning) in PAIRED.items():
        yield _paired(history, title, better, worse, meaning)
    yield _plain(history, "learning_rate", "Learning rate", "At each logged step.")
    yield _plain(history, "grad_norm", "Gradient norm", "Before clipping.", allow_log=True)
    yield _plain(history, "tokens_per_second", "Tokens per second", "Training alone, shared prompts counted once.")
    known = {"loss", "rewards/accuracies", "rewards/margins", *STATE}
    known |= {metric for better, worse, _ in PAIRED.values() for metric in (better, worse)}
    own = [*history.train, *(metric for table in history.evals.values() for metric in table)]
    for metric in dict.fromkeys(own):
        if metric not in known:
            yield _plain(history, metric, metric, "")


def _plain(history: History, metric: str, title: str, caption: str, **options: Any) -> Figure | None:
    """One quantity: training as a quiet line, every eval set over it."""
    look = "train" if history.evaluations(metric) else "train sole"
    series = [Series("train", look, history.train.get(metric, ()))]
    for index, (name, points) in enumerate(history.evaluations(metric)):
        series.append(Series(name, f"eval-{index % 4}", points, is_sparse=len(points) <= 60))
    return draw(title, caption, series, **options)


def _paired(history: History, title: str, better: str, worse: str, caption: str) -> Figure | None:
    """Two quantities that belong together: training as quiet lines, the first eval set over them."""
    series = []
    for look, metric in (("chosen", better), ("rejected", worse)):
        series.append(Series(f"{look}, train", f"{look} thin", history.train.get(metric, ())))
    for look, metric in (("chosen", better), ("rejected", worse)):
        for name, points in history.evaluations(metric)[:1]:
            series.append(Series(f"{look}, {name}", look, points, is_sparse=len(points) <= 60))
    return draw(title, caption, series)


def remarks(history: History, recipe: Mapping[str, Any]) -> list[str]:
    """Say what the curves of the main eval set show, in whole sentences."""
    is_dpo = recipe.get("method") == "dpo"
    table = history.evals.get("eval") or next(iter(history.evals.values()), {})
    loss = [point for point in table.get("loss", []) if math.isfinite(point[1])]
    said = list(_of_pairs(table)) if is_dpo else []
    if len(loss) > 1:
        said.append(f"The loss on held-out rows went from {number(loss[0][1])} to {number(loss[-1][1])}.")
        best_step, best = min(loss, key=lambda point: point[1])
        if loss[-1][1] - best > RISEN * (loss[0][1] - best) and loss[-1][0] > best_step:
            said.append(
                f"It was lowest at step {best_step:,.0f} ({number(best)}) and has risen since: "
                "fewer steps, or a lower learning rate, would do better."
            )
        if _starts_at_ln2(recipe) and abs(loss[-1][1] - LN2.value) < STUCK:
            said.append("It has hardly left ln 2 = 0.693, where every DPO begins: the policy has learned nothing yet.")
    broken = [metric for metric, points in history.train.items() if any(not math.isfinite(v) for _, v in points)]
    if broken:
        said.append(f"Some values are not finite: {', '.join(broken)}.")
    return said


def _of_pairs(table: Mapping[str, list[Point]]) -> Iterator[str]:
    moves = {}
    for side in ("chosen", "rejected"):
        points = table.get(f"logps/{side}", [])
        if len(points) > 1:
            moves[side] = points[-1][1] - points[0][1]
    if len(moves) < 2:
        return
    told = [
        f"{side} answers {'more' if by >= 0 else 'less'} likely by {number(abs(by))} nats" for side, by in moves.items()
    ]
    yield f"Training made {', and '.join(told)}, on average over held-out pairs."
    if moves["chosen"] < 0:
        yield "That chosen answers became less likely too is common: only the gap is trained. Read the samples."


def losses_of(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the terms of a recipe's preference loss: one, those of a weighted sum, or none."""
    loss = (recipe.get("dpo") or {}).get("loss")
    terms = loss if isinstance(loss, list) else [loss]
    return [term for term in terms if isinstance(term, Mapping)]


def _starts_at_ln2(recipe: Mapping[str, Any]) -> bool:
    """Whether the loss of equal policy and reference is ln 2."""
    plain = [term.get("type") == "sigmoid" and not term.get("sft_weight") for term in losses_of(recipe)]
    return recipe.get("method") == "dpo" and plain == [True]


def _value(value: Any) -> float | None:
    """A metric as a number; what JSON could not say was written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
