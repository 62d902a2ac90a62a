"""Names in a run directory by which a folder is known as a run, or as a part of one."""

from pathlib import Path

from dpoctl.errors import UsageError

RESOLVED_RECIPE = "recipe.resolved.yaml"
"""The recipe with all defaults; it marks a folder as a run."""
CHECKPOINTS = "checkpoints"
LOG = "logs/console.log"
"""The file that takes the messages which stderr does not take."""
MANIFEST = "manifest.json"
"""The file of a checkpoint with the checksums of the others."""
OF_A_MODEL = ("config.json", "adapter_config.json")


def require_run(folder: Path) -> None:
    """Refuse a folder that is not a run.

    Raises:
        UsageError: It is not one, or a checkpoint of one.
    """
    if (folder / RESOLVED_RECIPE).is_file():
        return
    if is_checkpoint(folder):
        run = run_of_checkpoint(folder) or "the folder of the run that wrote it"
        raise UsageError(f"{folder} is a checkpoint, not a run", hint=f"pass the run: {run}")
    raise UsageError(f"{folder} is not a run of dpoctl: it has no {RESOLVED_RECIPE}", hint="pass a training.output_dir")


def own_folder(folder: Path) -> Path:
    """Make a folder of a run if it is not there, and return it.

    Raises:
        UsageError: It is a link, which could lead out of the run.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link, which no run follows", hint="remove the link")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, also away from its run, or holds those of a run."""
    alone = (folder / MANIFEST).is_file() and not any((folder / name).is_file() for name in OF_A_MODEL)
    return alone or run_of_checkpoint(folder) is not None


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the run of which a folder is a checkpoint, or the folder of all its checkpoints; None for others."""
    whole = folder.resolve()
    for inner in (folder, folder.parent, whole, whole.parent):
        if inner.name == CHECKPOINTS and (inner.parent / RESOLVED_RECIPE).is_file():
            return inner.parent
    return None
