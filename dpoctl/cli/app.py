"""The `dpoctl` command: its subcommands, and what happens when one of them ends."""

import contextlib
import os
import sys
from typing import Annotated, NoReturn

import typer

from dpoctl import __version__
from dpoctl.cli import failure, launch
from dpoctl.cli.chat import chat
from dpoctl.cli.check import check
from dpoctl.cli.convert_data import convert_data
from dpoctl.cli.dpo import dpo
from dpoctl.cli.eval import evaluate
from dpoctl.cli.inspect import inspect
from dpoctl.cli.merge import merge
from dpoctl.cli.report import report
from dpoctl.cli.sft import sft

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
HELP = """[bold]dpoctl dpo recipes/mistral7b-lora.yaml --dry-run[/]

Fine-tune language models on demonstrations and preferences, from YAML recipes."""

app = typer.Typer(
    name="dpoctl",
    rich_markup_mode="rich",
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
for command, name, panel, summary in (
    (sft, "sft", "Train", "Train on demonstrations."),
    (dpo, "dpo", "Train", "Train on preferences."),
    (check, "check", "Train", "Advice on a recipe: what is wrong in it, what is unusual."),
    (convert_data, "convert-data", "Data", "Turn any known data format into canonical JSONL."),
    (inspect, "inspect", "Data", "Rows as the model will see them, and whether they are right."),
    (evaluate, "eval", "Measure", "Measure a finished run on held-out data."),
    (report, "report", "Measure", "One HTML file that shows a run: curves, samples, advice."),
    (chat, "chat", "Use", "Talk with a finished run."),
    (merge, "merge", "Use", "Write a run's adapter into its base: one plain model."),
):
    app.command(name, rich_help_panel=panel, short_help=summary, help=command.__doc__, context_settings=HELP_OPTIONS)(
        command
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpoctl {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Show the help when no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # Idle OpenMP threads spin for milliseconds before they sleep; beside other work on the machine that costs up to
    # fifty times what it gains. This many rounds are tens of microseconds. Read by the library when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    launch.settle_as_worker()
    code = 0
    try:
        code = app(standalone_mode=False, prog_name="dpoctl") or 0
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 1
    except Exception as error:
        debug = "--debug" in sys.argv or os.environ.get("DPOCTL_DEBUG") == "1"
        code = failure.report(error, as_json="--json" in sys.argv, debug=debug)
    finally:
        _close_streams()
    sys.exit(code)


def _close_streams() -> None:
    """Flush what is buffered; a reader that went away (`| head`) is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
