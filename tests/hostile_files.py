"""Broken, odd and hostile files, and the outcome of `convert-data` on them."""

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from data_rows import pair

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOOD = json.dumps(pair(0)).encode()
MANY = b"".join(json.dumps(pair(number)).encode() + b"\n" for number in range(3000))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
TRL = ("--format", "trl-explicit")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def last(err: str) -> str:
    return err.splitlines()[-1]


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def arrow_stream(rows: int) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist([pair(number) for number in range(rows)])
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def scarred(content: bytes) -> bytes:
    """Overwrite the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


PAIRS = {name: [pair(number)[name] for number in range(50)] for name in ("prompt", "chosen", "rejected")}
