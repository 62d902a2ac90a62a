"""The `dpoctl eval` command."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dpoctl.cli import launch, options
from dpoctl.errors import GATE_FAILED, UsageError
from dpoctl.tasks import import_libraries


def _existing(run: str | None) -> str | None:
    """Refuse a missing directory here, before torch is imported; the name of a hub repository has one slash."""
    if run is None:
        return None
    owner, _, name = run.partition("/")
    is_hub_id = bool(name) and "/" not in name and not Path(owner).exists()
    if not Path(run).is_dir() and not is_hub_id:
        raise UsageError(f"RUN: there is no directory {run!r}", hint="pass the training.output_dir of a run")
    return run


RunOrModel = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="The run directory (training.output_dir), a folder with a model, or a hub id.",
        callback=_existing,
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Evaluate on this file, folder or hub dataset instead of the recipe's eval data.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use only the first N rows of each eval set.", show_default=False)
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Compare with this run, model or server address, not the reference.",
        show_default=False,
    ),
]
AgainstModel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The name of the model at the address of --against.", show_default=False),
]
ModelUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Let a server write the texts: the base of an OpenAI-compatible API. Without RUN: evaluate its model.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="The name of the model at --model-url.", show_default=False)
]
OutputDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Keep the result of a model without a run in DIR/evals.", show_default=False),
]
Repeats = Annotated[
    int,
    typer.Option(metavar="N", min=1, max=1000, help="Draw and judge the samples N times, for the noise floor."),
]


def evaluate(
    run: RunOrModel = None,
    data: Data = None,
    limit: Limit = None,
    set_values: options.Set = None,
    repeats: Repeats = 1,
    against: Against = None,
    against_model: AgainstModel = None,
    model_url: ModelUrl = None,
    model: Model = None,
    output_dir: OutputDir = None,
    num_processes: options.NumProcesses = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl eval runs/mistral7b-dpo --json[/]

    Evaluate a finished run on held-out data: loss, reward margins, and reward accuracy with its confidence interval;
    with samples and a judge, what it writes too. It exits with 4 if a gate fails. Any other model is measured on
    --data; --against gives it a baseline.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.secrets import refuse_secret_argument

    refuse_secret_argument("--data", data or "")
    for text in set_values or ():
        refuse_secret_argument("--set", text)
    for name, address in (("--model-url", model_url), ("--against", against)):
        refuse_secret_argument(name, address or "")
    if model is not None and model_url is None:
        raise UsageError("--model is for a served model", hint="pass its address with --model-url URL")
    launcher = launch.find_launcher(num_processes, None)
    if run is None:
        _require_served(model_url, against, launcher)
    if launcher is not None:
        raise typer.Exit(launcher.run())
    import_libraries()
    from dpoctl.tasks.baselines import Baseline, served
    from dpoctl.tasks.evaluate import run as evaluate_run
    from dpoctl.tasks.served_eval import run as evaluate_served

    client = None if model_url is None else served(model_url, model, "--model-url", "--model")
    if run is None:
        assert client is not None
        evaluation = partial(evaluate_served, client)
    else:
        evaluation = partial(evaluate_run, Path(run), served=client)
    passed = evaluation(
        data=data,
        limit=limit,
        json_output=json_output,
        overrides=set_values or (),
        repeats=repeats,
        baseline=Baseline.of(against, against_model),
        output=None if output_dir is None else Path(output_dir),
    )
    if not passed:
        raise typer.Exit(GATE_FAILED)


def _require_served(model_url: str | None, against: str | None, launcher: launch.Launcher | None) -> None:
    """Check the options of an evaluation without a run.

    Raises:
        UsageError: They name no served model, or ask for what such a model does not have.
    """
    if model_url is None:
        raise UsageError("RUN is missing", hint="pass a run, or a served model with --model-url, --model and --data")
    if against == "reference":
        raise UsageError("--against reference: a served model has no reference", hint="name another model")
    if launcher is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a served model is evaluated by one process", hint="leave out --num-processes, or start one process"
        )
