"""The metrics of the records of evaluation sets, kept beside a result in one compressed file."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpoctl.errors import UsageError
from dpoctl.files import write_atomically

SUFFIX = ".records.npz"
_PARTS = ("names", "prompts", "sums", "counts")


@dataclass(frozen=True)
class RecordValues:
    """The metrics of the records of an evaluation set.

    Attributes:
        names: of the metrics.
        prompts: `[N]`, a hash of the prompt of each record; records of one prompt are not independent.
        sums: `[metrics, N]`, what each record adds to the sum of a metric.
        counts: `[metrics, N]`, what it adds to the count; the metric is the sum of sums over the sum of counts.
    """

    names: tuple[str, ...]
    prompts: NDArray[np.int64]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]


def write_record_values(path: Path, sets: Mapping[str, RecordValues]) -> None:
    """Write the values of each set into one file, completely or not at all."""
    arrays = {f"{name}.{part}": np.asarray(getattr(values, part)) for name, values in sets.items() for part in _PARTS}
    content = io.BytesIO()
    small: dict[str, Any] = {key: _small(array) for key, array in arrays.items()}
    np.savez_compressed(content, **small)
    write_atomically(path, content.getvalue())


def read_record_values(path: Path) -> dict[str, RecordValues]:
    """Read the values of each set; empty if there is no file.

    Raises:
        UsageError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        # A file that numpy cannot read stays open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        sets = dict.fromkeys(key.rpartition(".")[0] for key in arrays)
        return {
            name: RecordValues(
                tuple(map(str, arrays[f"{name}.names"])),
                arrays[f"{name}.prompts"],
                *(arrays[f"{name}.{part}"].astype(np.float64) for part in ("sums", "counts")),
            )
            for name in sets
        }
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is damaged: {error}", hint="delete it, and run `dpoctl eval` again") from error


def _small(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array.astype(np.float32) if array.dtype == np.float64 else array
