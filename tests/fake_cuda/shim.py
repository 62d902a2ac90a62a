"""A CUDA backend for FakeTensors in a torch that was built for CPUs: compiled once, loaded before torch is imported."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILER = ("g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w")
KERNELS: list[Any] = []
"""Registrations, which last as long as they are held."""
# What the compiled source leans on must be there before it, for all to see.
PINNED: WeakSet[Any] = WeakSet()
"""Storages on the host that a GPU could read by itself."""
BASE = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")


class UnavailableError(Exception):
    """The backend cannot be built here; says why."""


class OtherBuildError(UnavailableError):
    """This torch has a CUDA backend of its own, beside which there is no room for another."""


def torch_root() -> Path:
    """Return where torch is installed, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise UnavailableError("torch is not installed")
    return Path(spec.origin).parent


def library(cache: Path) -> Path:
    """Return the compiled backend of this torch and this source; compile it where a folder has none yet.

    Raises:
        OtherBuildError: torch comes with a CUDA backend.
        UnavailableError: there is no compiler or no header.
    """
    root, release = torch_root(), version("torch")
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise OtherBuildError(f"torch {release} has a CUDA backend of its own")
    if shutil.which(COMPILER[0]) is None:
        raise UnavailableError(f"no {COMPILER[0]}")
    if not (root / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").is_file():
        raise UnavailableError("torch was installed without its headers")
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = cache / f"guard-{release}-{key}.so"
    if not target.is_file():
        _compile(root, target)
    return target


def _compile(root: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: several processes may compile at once.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    headers = (f"{root}/include", f"{root}/include/torch/csrc/api/include")
    places = [*(f"-I{folder}" for folder in headers), f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    done = subprocess.run(
        [*COMPILER, str(SOURCE), *places, "-lc10", "-ltorch_cpu", "-o", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        Path(name).unlink()
        raise UnavailableError(f"{SOURCE.name} does not compile: {done.stderr[-2000:]}")
    Path(name).replace(target)


def load(path: Path) -> None:
    """Load a compiled backend into this process, which has not imported torch yet."""
    root = torch_root()
    for name in BASE:
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def pretend(capability: tuple[int, int] = (9, 0)) -> None:
    """Let `torch.cuda` answer as if a GPU were there, where a CPU build of torch would refuse."""
    # These look for a GPU when they are imported, and would load what needs a real one.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    # A CPU build spells these out for a GPU, where a CUDA build has a kernel.
    kernels = torch.library.Library("aten", "IMPL")
    for name in ("silu_backward", "mish_backward", "native_channel_shuffle", "_fused_rms_norm"):
        kernels.impl(name, _never, "CUDA")
    KERNELS.append(kernels)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign,assignment]
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_on_host(getattr(torch, name)))


def _never(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("nothing is computed on a fake GPU")


def _pin(tensor: Any) -> Any:
    """Return a tensor that counts as pinned."""
    copy = _of_unknown_value(tensor.clone())
    PINNED.add(copy.untyped_storage())
    return copy


def _made_on_host(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of tensors that lets a mode see how its data reach a GPU: by a copy that is waited for."""
    from torch.utils._python_dispatch import _disable_current_modes

    def made(data: Any, *, device: Any = None, **options: Any) -> Any:
        if device is None or hasattr(data, "untyped_storage"):
            return make(data, device=device, **options)
        with _disable_current_modes():
            tensor = make(data, **options)
        return _of_unknown_value(tensor.clone()).to(device)

    return made


def _of_unknown_value(tensor: Any) -> Any:
    """Return a tensor; a fake one that knows its value, as those of one number do, would be copied for real."""
    if hasattr(tensor, "constant"):
        tensor.constant = None
    return tensor
