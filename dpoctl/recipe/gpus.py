"""GPUs by name: their memory, and their rate by the data sheet."""

import re
from dataclasses import dataclass, replace

from dpoctl.errors import UsageError

GIB = 1 << 30
SIZE = re.compile(r"-(\d+)-?gi?b\b")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as it is given to `--gpu`: its family, and its size where there are several.
        memory: bytes, as the driver reports them, a little less than the name says.
        rate: products of 16-bit matrices, dense, in operations a second, by the data sheet.
        has_bfloat16: whether its 16-bit numbers may be bfloat16; else they are float16.
    """

    name: str
    memory: int
    rate: float
    has_bfloat16: bool = True

    @property
    def family(self) -> str:
        """The name without a size."""
        return self.name.partition("-")[0]


def _gpu(name: str, gibibytes: float, teraflops: float, *, has_bfloat16: bool = True) -> Gpu:
    return Gpu(name, int(gibibytes * GIB), teraflops * 1e12, has_bfloat16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 14.6, 65, has_bfloat16=False),
        _gpu("v100-16gb", 15.8, 125, has_bfloat16=False),
        _gpu("v100-32gb", 31.7, 125, has_bfloat16=False),
        _gpu("rtx3090", 23.6, 71),
        _gpu("rtx4080", 15.6, 97),
        _gpu("rtx4090", 23.5, 165),
        _gpu("rtx5090", 31.4, 210),
        _gpu("a10", 22.1, 125),
        _gpu("a10g", 22.1, 70),
        _gpu("l4", 22.0, 121),
        _gpu("l40", 44.4, 181),
        _gpu("l40s", 44.4, 362),
        _gpu("a6000", 47.5, 155),
        _gpu("rtx6000ada", 47.5, 182),
        _gpu("a100-40gb", 39.4, 312),
        _gpu("a100-80gb", 79.2, 312),
        _gpu("h100-80gb", 79.1, 989),
        _gpu("h200-141gb", 139.8, 989),
        _gpu("b200-180gb", 178.4, 2250),
    )
}


def find_gpu(name: str) -> Gpu | None:
    """Return a GPU by the name that people or the driver give it, such as `NVIDIA A100-SXM4-80GB`; None if unknown.

    Where a family has several sizes and the name has none, it is the largest. A size that the family has not is
    believed: there are GPUs for one customer, and parts of GPUs.
    """
    text = re.sub(r"[^a-z0-9]+", "-", name.strip().lower())
    families = [gpu.family for gpu in GPUS.values() if _pattern(gpu.family).search(text)]
    if not families:
        return None
    family = max(families, key=len)
    sizes = sorted((gpu for gpu in GPUS.values() if gpu.family == family), key=lambda gpu: gpu.memory)
    if (found := SIZE.search(text)) is None:
        return sizes[-1]
    given = int(found[1]) * GIB
    nearest = min(sizes, key=lambda gpu: abs(gpu.memory - given))
    if abs(nearest.memory - given) < 0.15 * given:
        return nearest
    return replace(nearest, name=f"{family}-{found[1]}gb", memory=given)


def known_gpu(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        UsageError: there is none of this name.
    """
    gpu = find_gpu(name)
    if gpu is None:
        raise UsageError(f"--gpu {name}: not a known GPU", hint=f"give one of {', '.join(GPUS)}, or auto")
    return gpu


def _pattern(family: str) -> re.Pattern[str]:
    """Return a pattern for a family, in a name in small letters whose words are joined by `-`."""
    words = re.findall(r"[a-z]+|\d+", family)
    if words[0] == "rtx":
        return re.compile(rf"(?:^|-)(?:rtx-?)?{'-?'.join(words[1:])}(?!\d)")
    return re.compile(rf"(?:^|-){'-?'.join(words)}(?!\d)")
