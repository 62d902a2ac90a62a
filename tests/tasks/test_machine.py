"""What a step frees on a CPU is there for the next one."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from dpoctl.tasks.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(24 << 20) for _ in range(10)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_pages_come_from_the_system_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert first > 10_000, "240 MB in pages of 4 kB"
    assert max(later) < first / 50
