"""Folders of data: files side by side, or what `datasets` saved; and what people name by mistake."""

from pathlib import Path
from typing import Any

from dpoctl.data.readers import SUFFIXES, suffix_of
from dpoctl.data.readers.streams import LFS_POINTER
from dpoctl.errors import DataError

ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside the rows."""
OF_A_MODEL = ("adapter_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def data_files(folder: Path) -> list[str]:
    """List the data files of a folder, by name.

    Raises:
        DataError: There are none, or it is a model's.
    """
    if of_a_model := next((name for name in OF_A_MODEL if (folder / name).is_file()), None):
        raise DataError(f"{folder}: a model's folder, not data: it holds {of_a_model}")
    try:
        found = sorted(path.name for path in folder.iterdir() if _is_data(path))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{folder}: no data files in this folder", hint=_where_data_is(folder))
    return found


def load_saved(folder: Path, split: str) -> Any:
    """Load a split of a folder that `save_to_disk` wrote.

    Raises:
        DataError: It is damaged, or has no such split.
    """
    import datasets

    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(f"{path}: a Git LFS pointer, not the data", hint="run `git lfs pull`")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever Arrow or the file system makes of a damaged folder
        told = str(error).strip().partition("\n")[0]
        raise DataError(f"{folder}: not a folder saved by datasets that can be read: {told}") from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise DataError(f"{folder}: no split {split!r}", hint=f"splits are {', '.join(dataset)}")
    return dataset[split]


def _is_data(path: Path) -> bool:
    return suffix_of(path) in SUFFIXES and path.name not in ABOUT_DATA and not path.name.startswith(".")


def _where_data_is(folder: Path) -> str:
    inner = sorted({path.parent for path in folder.glob("*/*") if _is_data(path)})
    if inner:
        return f"there are some in {inner[0]}; name that"
    if any(folder.glob("*.py")):
        return "a script is not run; export its rows, or name the hub id with revision: refs/convert/parquet"
    return f"data files end in {', '.join(SUFFIXES)}"
