"""Small files, rows and templates that would take all memory, or hours: each is counted, or refused in one line.

Where time grew with the square of a row's length, work is counted, or the rows are so long that a test would not end.
"""

import bz2
import gzip
import json
import lzma
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from backports import zstd
from data_rows import pair
from hostile_files import GOOD, TRL, last, read

from dpoctl.data.chat_template import MEMORY, MOST_MESSAGES, ChatTemplate
from dpoctl.data.prepare import prepare
from dpoctl.data.readers import json_lines, tables
from dpoctl.data.readers.streams import LONGEST_ROW
from dpoctl.data.records import Reject
from dpoctl.data.tokenize import Encoder
from dpoctl.errors import DataError

LONG = b"a" * (LONGEST_ROW + 5)
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress, "plain": bytes}
LINE = b'{"prompt": "' + LONG + b'", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize("packing", PACK)
def test_a_line_that_would_fill_the_memory_is_a_rejected_row(convert, tmp_path, packing):
    suffix = "" if packing == "plain" else f".{packing}"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(
        PACK[packing](GOOD + b"\n" + LINE + b"\n" + json.dumps(pair(1)).encode())
    )
    ended = convert(tmp_path / f"a.jsonl{suffix}", *TRL, "--rejects", str(tmp_path / "no.jsonl"), "--json")
    assert json.loads(ended.out)["rejected"] == {"too_long": 1}
    assert [(row["line"], row["detail"]) for row in read(tmp_path / "no.jsonl")] == [(2, "a row of more than 16 MiB")]
    assert read(tmp_path / "out.jsonl") == [pair(0), pair(1)]


def test_the_last_line_may_be_too_long_and_have_no_end(convert, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + LONG + LONG)
    assert json.loads(convert(tmp_path / "a.jsonl", *TRL, "--json").out)["rejected"] == {"too_long": 1}


def test_a_row_of_an_array_that_is_too_long_is_rejected(convert, tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + GOOD + b"," + LINE + b"," + json.dumps(pair(1)).encode() + b"]")
    assert json.loads(convert(tmp_path / "a.json", *TRL, "--json").out)["rejected"] == {"too_long": 1}
    assert read(tmp_path / "out.jsonl") == [pair(0), pair(1)]


def test_an_array_that_would_fill_the_memory_is_refused(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LARGEST_ARRAY", 1000)
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([GOOD] * 100) + b"]")
    ended = convert(tmp_path / "a.json", *TRL)
    assert ended.code == 3
    assert "of rows in one JSON value, which is read at once; write one row a line: jq -c '.[]'" in last(ended.err)


TABLE = b"prompt,chosen,rejected\nq,a,b\n"


@pytest.mark.parametrize(("row", "line"), [(b"q," + LONG + b",b\n", 3), (b'"x\ny",a,b\nq,' + LONG + b",b\n", 5)])
def test_a_line_of_a_table_that_is_too_long_is_a_rejected_row(convert, tmp_path, row, line):
    (tmp_path / "a.csv").write_bytes(TABLE + row + b'"q\n2",a,b\n')
    ended = convert(tmp_path / "a.csv", *TRL, "--rejects", str(tmp_path / "no.jsonl"), "--json")
    assert json.loads(ended.out)["rejected"] == {"too_long": 1}
    assert [row["line"] for row in read(tmp_path / "no.jsonl")] == [line]
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")][-1] == "q\n2"


@pytest.mark.parametrize("cell", [b'"\n' + LONG, b'"' + b"aaaaaaa\n" * (LONGEST_ROW // 8 + 9)])
def test_a_cell_of_several_lines_that_is_too_long_is_refused(convert, tmp_path, cell):
    (tmp_path / "a.csv").write_bytes(TABLE + b"q," + cell + b'",b\n')
    ended = convert(tmp_path / "a.csv", *TRL)
    assert ended.code == 3
    assert "of more than 16 MiB" in last(ended.err)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_dictionary_that_would_fill_the_memory_becomes_rejected_rows(convert, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_MEMORY", 1 << 28)
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 50, pa.int32()), pa.array(["q", "x" * len(LONG)]))
    table = pa.table({"prompt": texts, "chosen": ["a"] * 100, "rejected": ["b"] * 100})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    told = json.loads(convert(file, *TRL, "--json").out)
    assert (told["rows"], told["rejected"]) == (100, {"too_long": 50})


@pytest.mark.parametrize("inner", [b"[" * 50_000 + b"]" * 50_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000])
def test_a_line_that_is_nested_too_deeply_is_a_rejected_row(convert, tmp_path, inner):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'\n{"prompt": ' + inner + b"}\n")
    assert json.loads(convert(tmp_path / "a.jsonl", *TRL, "--json").out)["rejected"] == {"bad_value": 1}


@pytest.mark.parametrize("last_key", ["k399999", "k0"])
def test_a_key_repeated_among_many_is_found_in_linear_time(convert, tmp_path, last_key):
    keys = ",".join(f'"k{number}":1' for number in range(400_000))
    (tmp_path / "a.jsonl").write_bytes(GOOD + f'\n{{{keys},"{last_key}":2}}\n'.encode())
    assert json.loads(convert(tmp_path / "a.jsonl", *TRL, "--json").out)["rejected"] == {"bad_value": 1}


def prepared(make_recipe: Any, tokenizer: Any, tmp_path: Any, row: dict[str, Any], **data: Any) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = make_recipe(train=[str(tmp_path / "rows.jsonl")], max_length=64, overlong="truncate", **data)
    return prepare(recipe, tokenizer, cache_dir=tmp_path / "cache").report["train"]


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>"])
def test_many_markers_are_tokenized_as_few(make_recipe, tokenizer, tmp_path, marker, monkeypatch):
    calls = []
    plain = Encoder.plain
    monkeypatch.setattr(Encoder, "plain", lambda self, text: calls.append(text) or plain(self, text))
    counts = []
    for count in (50, 30_000):
        row = {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": marker * count + "x"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
        calls.clear()
        assert prepared(make_recipe, tokenizer, tmp_path, row)["used"] == 1
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_beginnings_in_a_row_take_linear_time(make_recipe, tokenizer, tmp_path):
    import copy

    mine = copy.deepcopy(tokenizer)
    mine.bos_token = "<|endoftext|>"
    row = {"prompt": "<|endoftext|>" * 300_000 + "q", "chosen": "a", "rejected": "b"}
    assert prepared(make_recipe, mine, tmp_path, row)["used"] == 1


def test_a_conversation_of_too_many_messages_is_rejected(make_recipe, tokenizer, tmp_path):
    turns = [{"role": role, "content": "yes"} for role in ("user", "assistant")] * MOST_MESSAGES
    row = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="4,001 messages; at most 2,000 are rendered"):
        prepared(make_recipe, tokenizer, tmp_path, row)


DOUBLING = "{% set ns = namespace(s='x' * 99) %}{% for i in range(40) %}{% set ns.s = CODE %}{% endfor %}"
TEMPLATES = {
    "zfill": "{{ messages[0].content.zfill(1500000000) }}",
    "center": "{{ messages[0].content.center(1500000000) }}",
    "a constant": "{{ 'x'|center(1500000000) }}",
    "format": "{{ '%1500000000d' % 3 }}",
    "sums": DOUBLING.replace("CODE", "ns.s + ns.s"),
    "joined texts": DOUBLING.replace("CODE", "ns.s ~ ns.s"),
    "replace": "{{ ('a' * 10000000).replace('a', 'b' * 10000) }}",
    "lists of lists": "{% set a = ['x' * 9999999] * 9 %}{% set b = [a] * 1000 %}{{ [b] * 1000 }}",
    "a filter that repeats": "{{ ('a\\n' * 1000000)|indent(100000) }}",
    "a loop": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "a macro": "{% macro m() %}{% for i in range(99999) %}{{ 'a' * 999999 }}{% endfor %}{% endmacro %}{{ m() }}",
}


def address_space() -> list[int]:
    """The greatest size of the process, and the size now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return [1024 * int(line.split()[1]) for line in lines if line.startswith(("VmPeak", "VmSize"))]


@pytest.mark.parametrize("case", TEMPLATES)
def test_what_a_template_writes_is_bounded_while_it_is_made(case):
    limits, (peak, size) = resource.getrlimit(resource.RLIMIT_AS), address_space()
    chat: Any = SimpleNamespace(chat_template=TEMPLATES[case], special_tokens_map={})
    said = r"the chat template takes more than 512 MiB of memory|it writes more than 67,108,864 characters"
    # As it is compiled, or by the first row that it writes.
    with pytest.raises((DataError, Reject), match=said):
        ChatTemplate(chat, {}).apply([{"role": "user", "content": "q"}], generate=False)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    # It is rendered three times, in the search for what it takes too.
    assert address_space()[0] <= max(peak, size + 3 * MEMORY)
