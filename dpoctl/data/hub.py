"""Data sets on the Hugging Face hub, by the `datasets` library and its cache."""

import re
from typing import TYPE_CHECKING, Any

from dpoctl import console
from dpoctl.errors import DataError, SetupError, UserError
from dpoctl.hub import hub_is_reachable

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import Source

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
UNREACHABLE = ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")
"""Errors of `datasets`, of the hub's client and of Python that mean: it is not there, or nothing is."""


def load_hub(source: "Source") -> Any:
    """Load a split of a hub data set; from the cache where the hub cannot be reached.

    Raises:
        DataError: The path is no hub id, or what is there is no data set that can be read.
        SetupError: It cannot be reached and is not in the cache.
    """
    if not HUB_ID.fullmatch(source.path):
        raise DataError(f"{source.path}: no such file or folder")
    import datasets

    offline = not hub_is_reachable()
    if offline:
        # The library asks several times, with pauses, before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        dataset = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, data_files=source.data_files
        )
    except Exception as error:  # whatever the network, the cache or the files of strangers give rise to
        raise _explain(source.path, error) from error
    if offline and source.revision is not None:
        console.warn(f"hub data set {source.path!r}: not reached; the cached copy may not be of {source.revision!r}")
    return dataset


def _explain(path: str, error: Exception) -> UserError:
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    if type(error).__name__ in UNREACHABLE or type(error).__module__.startswith("http"):
        return SetupError(
            f"hub data set {path!r} cannot be reached, and nothing here has that name: {told}",
            hint="check the name and the network (`hf auth login` for a gated one), or name a folder it is saved in",
        )
    hint = None
    if "scripts are no longer supported" in str(error):
        hint = "it is read by a script, which `datasets` runs no more; set revision: refs/convert/parquet"
    return DataError(f"hub data set {path!r}: {told}", hint=hint)
