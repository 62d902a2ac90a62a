"""Extensions: the user's own code in a run, from the arguments of `dpoctl.sft` and `dpoctl.dpo`."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpoctl.core.collator import Collate, collate
from dpoctl.core.loop import Metrics
from dpoctl.core.meters import Total
from dpoctl.core.objective import Report, TermValues
from dpoctl.core.optim import build_optimizer
from dpoctl.core.schedule import learning_rate
from dpoctl.errors import UsageError
from dpoctl.losses import Scores
from dpoctl.model.source import read_json
from dpoctl.recipe.schema import TrainingSection

Callback = Callable[[int, Metrics], object]
ExtraMetrics = Callable[[Scores, Tensor], Mapping[str, Total]]
ENVIRONMENT, RECORD = "env.json", "extensions"


@dataclass(frozen=True, kw_only=True)
class Extensions:
    """The parts of a run that the user's code replaces, none by default; documented in `dpoctl.sft`."""

    collator: Collate = collate
    model_init: Callable[[], PreTrainedModel] | None = None
    callbacks: tuple[Callback, ...] = ()
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None
    learning_rate: Callable[[int], float] | None = None
    extra_metrics: ExtraMetrics | None = None

    def names(self) -> dict[str, list[str]]:
        """Return the replaced parts and the names of the code; the run keeps these, because it cannot keep the code."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        replaced = {name: value for name, value in given.items() if value and value is not collate}
        return {
            name: [_qualified_name(code) for code in (value if isinstance(value, tuple) else (value,))]
            for name, value in replaced.items()
        }

    def check_resumed(self, run: Path) -> None:
        """Check that a resumed run gets the code that it started with.

        Raises:
            UsageError: It gets other code.
        """
        before, now = recorded_extensions(run), self.names()
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            name = changed[0]
            raise UsageError(
                f"{run}: the run started with {name}: {', '.join(before.get(name, ['none']))}, "
                f"and now has {', '.join(now.get(name, ['none']))}",
                hint="resume it with the code that it started with",
            )

    def build_optimizer(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        training: TrainingSection,
        *,
        outside: Collection[str],
        scales: Mapping[str, float],
    ) -> Optimizer:
        """Build the optimizer over the trained parameters; the arguments are those of the recipe's own.

        Raises:
            UsageError: The user's callable returns something else.
        """
        if self.optimizer is None:
            return build_optimizer(parameters, training, outside=outside, scales=scales)
        built: object = self.optimizer([parameter for _, parameter in parameters])
        if not isinstance(built, Optimizer):
            raise UsageError(f"optimizer: it returned a {type(built).__name__}, not a torch optimizer")
        return built

    def rates(self, training: TrainingSection, num_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the step; the first step is 0."""
        own = self.learning_rate
        return learning_rate(training, num_steps) if own is None else lambda step: float(own(step))

    def report(self, own: Report) -> Report:
        """Return the metrics of the task together with the extra ones."""
        extra = self.extra_metrics
        if extra is None:
            return own

        def both(scores: Scores, values: Sequence[TermValues], names: Mapping[int, str]) -> Mapping[str, Total]:
            task, more = own(scores, values, names), extra(scores, values[0].values)
            if clash := sorted({"loss", *task} & more.keys()):
                raise UsageError(f"extra_metrics: a metric named {clash[0]!r} already exists", hint="use another name")
            return {**task, **more}

        return both


NO_EXTENSIONS = Extensions()


def recorded_extensions(run: Path) -> dict[str, list[str]]:
    """Return the replaced parts of a run and the names of the code; empty for a run from the command line."""
    file = run / ENVIRONMENT
    found = read_json(file).get(RECORD) if file.is_file() else None
    return found if isinstance(found, dict) else {}


def _qualified_name(code: object) -> str:
    name = getattr(code, "__qualname__", None) or type(code).__qualname__
    return f"{getattr(code, '__module__', None) or type(code).__module__}.{name}"
