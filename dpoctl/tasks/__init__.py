"""What the commands do, once they know that they need a model."""

import gc
from importlib import import_module

LIBRARIES = ("torch", "transformers.modeling_utils", "accelerate")


def _load_libraries() -> None:
    """Import the large libraries without looking for garbage among what they bring, now or later.

    It is half a million objects that live as long as the process: searching them again and again while they grow takes
    a quarter of the time that importing takes.
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


_load_libraries()
