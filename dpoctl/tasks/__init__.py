"""The tasks: the work of the commands that need a model, such as training, evaluation, chat and merging."""

import gc
import logging
import sys
from collections.abc import MutableMapping
from importlib import import_module

# Before any task imports peft, which imports bitsandbytes, which warns of kernels that no one asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
LIBRARIES = ("torch", "transformers.modeling_utils", "accelerate")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The names of the variable that configures torch's allocator, the newest first."""


def prepare_allocator(environment: MutableMapping[str, str]) -> None:
    """Let the CUDA allocator extend its segments, unless the user configured it; for a process without torch so far.

    No two micro-batches have the same size: segments of fixed sizes would be left with holes.
    """
    if sys.platform == "linux" and not environment.keys() & set(ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"


def import_libraries() -> None:
    """Import the large libraries without garbage collection, and exclude their objects from it for good.

    They create half a million objects that live as long as the process; to search these again and again takes almost
    as long as the rest of the import. Only for dpoctl's own process: it also freezes the objects of the caller.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in LIBRARIES:
            import_module(name)
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
