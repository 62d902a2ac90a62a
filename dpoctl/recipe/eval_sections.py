"""The items of `eval.benchmarks` and `eval.gates`: what `dpoctl eval` runs and checks beside the metrics of a run."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import Field

from dpoctl.recipe.section import Count, Section, Text


def benchmark_task(value: Any) -> Any:
    """Read a string as the name of a benchmark's task."""
    return {"task": value} if isinstance(value, str) else value


class BenchmarkSection(Section):
    """A task of lm-eval that `dpoctl eval` runs on policy and reference. A string is the name of a `task`."""

    task: Text = Field(examples=["arc_easy"])
    """The name of a task or of a group of tasks; `lm-eval ls tasks` lists them."""
    num_fewshot: Annotated[int, Ge(0), Le(1000)] | None = Field(default=None, examples=[5])
    """The number of examples in the prompt. null: as the task says."""
    limit: Count | None = Field(default=None, examples=[100])
    """Use only the first items of each task. null: all."""
    include_path: Text | None = Field(default=None, examples=["benchmarks"])
    """A folder with task files of your own."""
    chat_template: bool = False
    """Put the prompts into the chat template of the model."""


class GateSection(Section):
    """A bound on a metric of `dpoctl eval`, which exits with 4 if it is not kept."""

    metric: Text = Field(examples=["rewards/accuracies"])
    """The path of a number in the result, with dots: `rewards/accuracies`, `samples.finished_policy`."""
    min: float | None = Field(default=None, examples=[0.55])
    """The number must be at least this."""
    max: float | None = Field(default=None, examples=[8.0])
    """The number must be at most this."""
    by: Literal["value", "lower", "upper"] = "value"
    """The number to compare: the metric itself, or the lower or upper end of its 95 % interval."""
