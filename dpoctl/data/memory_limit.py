"""A limit on the memory that reading or rendering something foreign may take."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")


@contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Let the process grow by so many bytes within the `with` block, where the system can limit that.

    Raises:
        MemoryError: More was needed.
    """
    try:
        pages = int(_SIZES.read_bytes().split()[0])
    except OSError:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + room
    if any(known != resource.RLIM_INFINITY and known < limit for known in (before, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
