"""`accelerate launch` inside this process: its environment for the ranks, our words and exit codes."""

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError

from dpoctl.cli.failure import REPORTS
from dpoctl.cli.launch import PARENT
from dpoctl.cli.workers import conclude
from dpoctl.errors import SetupError, UsageError


def run_accelerate(config: Path, count: int | None, arguments: Sequence[str]) -> int:
    """Run `dpoctl` with the same arguments under accelerate's launcher, and return the exit code.

    Args:
        config: A config file of accelerate.
        count: How many processes; None leaves it to the file, or takes one for each GPU.
        arguments: Of the command line, without the program.

    Raises:
        UsageError: Accelerate refuses the config.
        SetupError: A config for GPUs, no number of processes, and no GPU.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The ranks say themselves what is wrong; the launcher would repeat it as a traceback.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    chosen = [] if (count := _processes(config, count)) is None else ["--num_processes", str(count)]
    options = ["--config_file", str(config), *chosen, "--main_process_port", "0", "-m", "dpoctl", *arguments]
    with tempfile.TemporaryDirectory(prefix="dpoctl-") as reports:
        os.environ |= {REPORTS: reports, PARENT: str(os.getpid())}
        ended: list[tuple[int, int]] = []
        try:
            launch_command(launch_command_parser().parse_args(options))
        except ChildFailedError as error:
            ended = [(rank, failure.exitcode) for rank, failure in error.failures.items()]
        except CalledProcessError as error:
            ended = [(0, error.returncode)]
        except SignalException as error:
            return 128 + int(error.sigval)
        except (ValueError, KeyError) as error:
            raise UsageError(f"accelerate refuses {config}: {error}") from error
        return conclude(ended, Path(reports), as_json="--json" in arguments)


def _processes(config: Path, count: int | None) -> int | None:
    import torch
    import yaml

    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    if count is not None or not isinstance(content, dict) or content.get("num_processes"):
        return count
    if torch.cuda.device_count() == 0:
        raise SetupError(f"{config.stem} wants GPUs, and there is none", hint="give --num-processes N")
    return torch.cuda.device_count()
