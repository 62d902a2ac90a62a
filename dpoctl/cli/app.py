"""The `dpoctl` command: its subcommands, its exit codes, and the end of the process."""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from dpoctl import __version__
from dpoctl.cli import failure, launch, machine, streams
from dpoctl.cli.chat import chat
from dpoctl.cli.check import check
from dpoctl.cli.compare import compare
from dpoctl.cli.convert_data import convert_data
from dpoctl.cli.eval import evaluate
from dpoctl.cli.import_config import import_config
from dpoctl.cli.init import init
from dpoctl.cli.inspect import inspect
from dpoctl.cli.merge import merge
from dpoctl.cli.plan import plan
from dpoctl.cli.recipes import recipes
from dpoctl.cli.report import report
from dpoctl.cli.schema import schema
from dpoctl.cli.train import dpo, sft
from dpoctl.tasks import prepare_allocator

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
HELP = """[bold]dpoctl dpo recipes/mistral7b-lora.yaml --dry-run[/]

Fine-tune language models on demonstrations and preferences, from YAML recipes."""


class Command(TyperCommand):
    """A command whose flags take no value, and say so in its help."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; a flag has no name of a value."""
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    """The command without a subcommand; its flags are those of `Command`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; a flag has no name of a value."""
        return _without_values(super().get_params(ctx))


def _without_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


app = typer.Typer(
    name="dpoctl",
    cls=Group,
    rich_markup_mode="rich",
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
for command, name, panel, summary in (
    (sft, "sft", "Train", "Train on demonstrations."),
    (dpo, "dpo", "Train", "Train on preferences."),
    (check, "check", "Train", "Report what is wrong or unusual in a recipe."),
    (plan, "plan", "Train", "Estimate memory, time and disk of a run before it runs."),
    (recipes, "recipes", "Train", "List and copy the recipes of dpoctl, and explain their keys."),
    (init, "init", "Train", "Write a first recipe for your model, data and GPU."),
    (import_config, "import", "Train", "Turn a config of TRL, axolotl, LLaMA-Factory or torchtune into a recipe."),
    (schema, "schema", "Train", "Print the JSON schema of recipes, for editors."),
    (convert_data, "convert-data", "Data", "Convert data of any known format to canonical JSONL."),
    (inspect, "inspect", "Data", "Show and check training rows as the model sees them."),
    (evaluate, "eval", "Measure", "Evaluate a finished run on held-out data."),
    (compare, "compare", "Measure", "Compare runs: recipes, results, differences with p-values."),
    (report, "report", "Measure", "Write one HTML file about a run: charts, samples, advice."),
    (chat, "chat", "Use", "Chat with the model of a finished run."),
    (merge, "merge", "Use", "Merge the LoRA adapter of a run into its base model."),
):
    app.command(
        name,
        cls=Command,
        rich_help_panel=panel,
        short_help=summary,
        # One line per paragraph: the help keeps other line breaks.
        help="\n\n".join(" ".join(part.split()) for part in str(command.__doc__).split("\n\n")),
        context_settings=HELP_OPTIONS,
    )(command)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dpoctl {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Show the help if no command is given; otherwise look whether the machine has what every command needs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
    elif not {"-h", "--help"} & set(sys.argv):
        machine.require_folders()


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # Idle OpenMP threads spin for milliseconds before they sleep; with other work on the machine that costs up to fifty
    # times what it gains. This many rounds are tens of microseconds. OpenMP reads the variable when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # oneDNN, which multiplies bfloat16 on a CPU, keeps its last kernels by the shapes that they are for, and so does
    # torch's layer over it: hundreds of megabytes, for shapes that do not come again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    streams.speak_utf8(sys.argv[1:])
    streams.prepare()
    if not os.environ.get("OMP_NUM_THREADS"):
        # Empty means unset to people, and an error to OpenMP and accelerate.
        os.environ.pop("OMP_NUM_THREADS", None)
    prepare_allocator(os.environ)
    code = 0
    try:
        launch.end_with_parent()
        code = app(standalone_mode=False, prog_name="dpoctl") or 0
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 1
    except SystemExit:
        raise
    except BaseException as error:  # that of a library in Rust is no Exception
        debug = "--debug" in sys.argv or os.environ.get("DPOCTL_DEBUG") == "1"
        code = failure.report(error, as_json="--json" in sys.argv, debug=debug)
    finally:
        streams.flush()
    launch.leave_ranks(code)
    sys.exit(code)
