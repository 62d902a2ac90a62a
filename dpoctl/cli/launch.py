"""Several processes from one command, and what launchers left in the environment.

`--num-processes N` starts the ranks itself: that keeps their exit codes and needs no torch in the parent.
`--accelerate-config` goes through accelerate's launcher, which knows FSDP and DeepSpeed.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpoctl.errors import UsageError

CONFIGS = Path(__file__).parent / "accelerate_configs"
PARENT = "DPOCTL_PARENT"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True, slots=True)
class Workers:
    """Ranks that this process starts itself.

    Args:
        count: How many.
    """

    count: int

    def run(self) -> int:
        """Run them to their end and return the exit code of the job."""
        from dpoctl.cli.workers import run_workers

        return run_workers(self.count, sys.argv[1:])


@dataclass(frozen=True, slots=True)
class Accelerate:
    """Ranks that accelerate's launcher starts.

    Args:
        config: The file.
        count: How many processes; None leaves it to the file.
    """

    config: Path
    count: int | None

    def run(self) -> int:
        """Run them to their end and return the exit code of the job."""
        from dpoctl.cli.accelerate_launcher import run_accelerate

        return run_accelerate(self.config, self.count, sys.argv[1:])


def plan_launch(
    num_processes: int | None, accelerate_config: str | None, environment: Mapping[str, str] = os.environ
) -> Workers | Accelerate | None:
    """Decide whether this process trains, or starts the ones that do.

    Args:
        num_processes: As the user asked.
        accelerate_config: As the user asked: a name that is shipped, or a file.
        environment: Of this process.

    Returns:
        What to run; None where this process is itself a rank, or all there is.

    Raises:
        UsageError: The requests contradict each other or the launcher that started this process.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = int(environment["WORLD_SIZE"])
        if num_processes not in (None, world):
            raise UsageError(
                f"--num-processes {num_processes}, but a launcher started {world}", hint="drop --num-processes"
            )
        return None
    if PARENT in environment:
        return None
    if size := next((environment[key] for key in MPI_SIZES if environment.get(key, "1") != "1"), None):
        raise UsageError(
            f"mpirun or srun started {size} processes, which would train alone each",
            hint="start one, with --num-processes N, torchrun or accelerate launch",
        )
    if accelerate_config is not None:
        return Accelerate(find_config(accelerate_config), num_processes)
    if num_processes is not None:
        return Workers(num_processes) if num_processes > 1 else None
    return _instead_of_accelerate(environment)


def find_config(name: str) -> Path:
    """Find a shipped accelerate config by its name, or a file.

    Raises:
        UsageError: There is neither.
    """
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise UsageError(
        f"--accelerate-config: no file {name!r}, and no config of that name", hint=f"there is {', '.join(shipped)}"
    )


def settle_as_worker() -> None:
    """End with the process that started this one: an orphan would go on writing into the run directory."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)


def _instead_of_accelerate(environment: Mapping[str, str]) -> Workers | None:
    """Start what `accelerate launch --num_processes N` was asked for and did not start.

    Without two GPUs accelerate (1.15) runs the script once, names no rank, and says nothing.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return None
    asked = processes_asked_of_accelerate(_parent_command(), environment)
    if asked is None and "MASTER_ADDR" in environment:
        raise UsageError(
            "accelerate launch asked for several processes and started one", hint="use dpoctl's --num-processes N"
        )
    if asked is None or asked <= 1:
        return None
    if environment.get("ACCELERATE_USE_CPU", "").lower() != "true" and _has_gpu():
        raise UsageError(
            f"accelerate launch was asked for {asked} processes and started one, for this machine has one GPU",
            hint="use --num_processes 1",
        )
    return Workers(asked)


def processes_asked_of_accelerate(command: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """Read the number of processes off the command line of `accelerate launch`, or off its config file.

    Args:
        command: The command line; may be empty where the system does not tell.
        environment: For the place of accelerate's default config.

    Returns:
        The number, 1 where none is given, None where it cannot be known.
    """
    if not any(map(_is_launch, command)):
        return None
    options = _options_of_launcher(command)
    if "num_processes" in options:
        return _integer(options["num_processes"])
    if "num_machines" in options and options["num_machines"] != "1":
        return None
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    config = options.get("config_file") or str(Path(home, "accelerate", "default_config.yaml"))
    return _processes_in(Path(config).expanduser())


def _is_launch(word: str) -> bool:
    return word == "launch" or word.endswith("accelerate-launch") or "accelerate.commands.launch" in word


def _options_of_launcher(command: Sequence[str]) -> dict[str, str]:
    """The options before the program that accelerate runs; accelerate takes `-` and `_` alike."""
    start = next(i for i, word in enumerate(command) if _is_launch(word))
    words = list(command[start + 1 :])
    end = next(
        (i for i, word in enumerate(words) if word in ("-m", "--module") or Path(word).name.startswith("dpoctl")),
        len(words),
    )
    options = {}
    for word, following in zip(words[:end], [*words[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            options[name.replace("-", "_")] = value if equals else following
    return options


def _processes_in(config: Path) -> int | None:
    if not config.is_file():
        return 1
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return _integer(str(content.get("num_processes", 1))) if isinstance(content, dict) else None


def _integer(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _parent_command() -> list[str]:
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").split("\0")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
