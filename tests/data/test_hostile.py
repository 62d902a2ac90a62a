"""Broken, odd and hostile files: each gives one error line, or the right rows."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
import threading

import pytest
from hostile_files import GOOD, LFS, MANY, PACK, PAIRS, TRL, arrow_stream, last, parquet, read, scarred

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "a comma too many": ("a.jsonl", GOOD + b'\n{"a": 1,}\n', r"a\.jsonl:2:[89]: not JSON"),
    "cut in a string": ("a.jsonl", GOOD + b'\n{"a": "cut', r"a\.jsonl:2:7: not JSON"),
    "garbage after a row": ("a.jsonl", b'{"a": 1} x\n', r"a\.jsonl:1:10: not JSON: more than one value"),
    "no JSON at all": ("a.jsonl", b"hello, this is text\n", r"a\.jsonl:1:1: not JSON"),
    "two rows without a comma": ("a.json", b"[" + GOOD + b"\n" + GOOD + b"]", r"a\.json:2:1: not JSON: expected ','"),
    "garbage after an array": ("a.json", b"[" + GOOD + b"]\nx", r"a\.json:2:1: not JSON: more text"),
    "an array that is cut": ("a.json", b"[" + GOOD + b",\n" + GOOD[:-5], r"a\.json:2:"),
    "an array that never ends": ("a.json", b"[" + GOOD + b"\n", r"a\.json:2:1: not JSON: expected ','"),
    "rows under data, cut": ("a.json", b'{"data": [' + GOOD + b"]", r"a\.json:1:\d+: not JSON: expected '}'"),
    "rows under data, and more": ("a.json", b'{"data": [' + GOOD + b"]} x", r"a\.json:1:\d+: not JSON: more text"),
    "a broken row under data": ("a.json", b'{"v": 1, "data": [\n{"a": tru}]}', r"a\.json:2:7: not JSON"),
    "broken far into an array": ("a.json", b"[" + b",\n".join([GOOD] * 9000) + b",\n!]", r"a\.json:9001:1: not JSON"),
    "zeros where a row was": ("a.jsonl", GOOD + b"\n\0\0\0\0\n", r"a\.jsonl:2:1: not JSON"),
    "a million lists in a row": ("a.jsonl", b'{"a": ' + b"[" * 10**6, r"a\.jsonl:1:1: not JSON: nested too deeply"),
    "a million lists": ("a.json", b"[" * 10**6, r"a\.json:1:2: not JSON: nested too deeply"),
    "a million objects": ("a.json", b'{"a":' * 10**6, r"a\.json:1:1: not JSON: nested too deeply"),
    "a quote never closed": ("a.csv", b'prompt,chosen\n1,2\n"a,b\nc,d\n', r"a\.csv:3:1: not CSV"),
    "text after a quote": ("a.csv", b'prompt,chosen\n"a"b,c\n', r"a\.csv:2:1: not CSV"),
    "a column twice": ("a.csv", b"prompt,chosen,prompt\n1,2,3\n", r"a\.csv:1:1: several columns are named 'prompt'"),
    "a header alone": ("a.csv", b"prompt,chosen,rejected\n", "no rows"),
    "Excel's CSV": ("a.csv", b"prompt,chosen\nq,caf\xe9\n", r"a\.csv:2:6: not UTF-8.*Windows-1252.*iconv"),
    "Latin-1": ("a.jsonl", GOOD + b'\n{"a": "caf\xe9"}', r"a\.jsonl:2:11: not UTF-8"),
    "Latin-1 in an array": ("a.json", b"[" + GOOD + b',\n{"a": "caf\xe9"}]', r"a\.json:2:11: not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "UTF-16 text; save the file as UTF-8"),
    "UTF-16 without a mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), r"a\.jsonl:1:\d: not JSON"),
    "an empty file": ("a.jsonl", b"", "no rows"),
    "an empty JSON file": ("a.json", b"", "no rows"),
    "an empty array": ("a.json", b" [ ] ", "no rows"),
    "an empty table": ("a.csv", b"", "no rows"),
    "an empty Parquet file": ("a.parquet", b"", "not a Parquet file"),
    "blank lines": ("a.jsonl", b"\n  \r\n\n\t\n", "no rows"),
    "an LFS pointer": ("a.jsonl", LFS, "git lfs pull"),
    "an LFS pointer for Parquet": ("a.parquet", LFS, "git lfs pull"),
    "an LFS pointer for gzip": ("a.jsonl.gz", LFS, "git lfs pull"),
    "an LFS pointer for CSV": ("a.csv", LFS, "git lfs pull"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04\x14\0\0\0", "a zip archive, or a spreadsheet"),
    "a login page": ("a.jsonl", b"<!DOCTYPE html><html></html>", "a web page"),
    "gzip inside gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "gzip inside gzip; it was compressed twice"),
    "gzip by name only": ("a.jsonl.gz", b"\x1f\x8c" + gzip.compress(MANY)[2:], "neither a gzip file nor text"),
    "gzip with three bytes": ("a.jsonl.gz", b"\x1f\x8b\x08", r"a\.jsonl\.gz:1: broken gzip file"),
    "Parquet without its end": ("a.parquet", parquet(**PAIRS)[:-20], "not a Parquet file that can be read"),
    "Parquet by name only": ("a.parquet", b"hello", "not a Parquet file, though"),
    "Parquet with a hole": ("a.parquet", b"PAR1" + b"\0" * 500 + b"PAR1", "not a Parquet file that can be read"),
    "Arrow that is cut": ("a.arrow", arrow_stream(3000)[:-60_000], "not an Arrow stream that can be read"),
    "Arrow by name only": ("a.arrow", b"hello", "not an Arrow file, though"),
    "Parquet in gzip": ("a.parquet.gz", gzip.compress(parquet(**PAIRS)), "a Parquet file cannot be read as a stream"),
    "columns of nothing known": ("a.jsonl", b'{"foo": 1, "bar": 2}\n', "no known format fits the columns bar, foo"),
    "rows that all fail": (
        "a.jsonl",
        b'{"prompt": "q", "chosen": "", "rejected": "b"}\n',
        "none of 1 rows can be used",
    ),
    "a number": ("a.json", b"7", "1 not_an_object"),
    "a string": ("a.json", b'"rows"', "1 not_an_object"),
    "null": ("a.jsonl", b"null\n", "1 not_an_object"),
    "lists in a list": ("a.json", b'[["a", "b"], ["c", "d"]]', "2 not_an_object"),
    "strings in a list": ("a.json", b'["a", "b", "c"]', "3 not_an_object"),
    "no columns": ("a.jsonl", b"{}\n{}\n", "no known format fits the columns none"),
    "escapes for names": ("a.jsonl", b'{"\\u001b[31mred\\u202e": 1}\n', r"\\x1b\[31mred\\u202e"),
    "escapes for a repeated key": ("a.jsonl", b'{"\\u001b[2J": 1, "\\u001b[2J": 2}\n', r"\\x1b\[2J"),
    "escapes in a header": ("a.csv", b"\x1b]0;title\x07,b\n1,2\n", r"\\x1b\]0;title\\x07"),
    "a name of a million letters": ("a.jsonl", b'{"' + b"k" * 10**6 + b'": 1}\n', "no known format"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line(convert, tmp_path, case):
    name, content, says = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    ended = convert(tmp_path / name, "--rejects", str(tmp_path / "rejects.jsonl"))
    assert ended.code == 3
    assert re.search(says, last(ended.err)), ended.err
    assert len(last(ended.err)) < 1000


@pytest.mark.parametrize("packing", PACK)
def test_a_compressed_file_that_is_cut_says_how_far_it_goes(convert, tmp_path, packing):
    path = tmp_path / f"a.jsonl.{packing}"
    whole = PACK[packing](MANY)
    for broken in (whole[: len(whole) * 2 // 3], whole[:-1]):
        path.write_bytes(broken)
        ended = convert(path)
        assert ended.code == 3
        assert re.search(rf"a\.jsonl\.{packing}:\d+: broken \w+ file: ", last(ended.err))


@pytest.mark.parametrize("packing", PACK)
def test_a_compressed_file_that_was_written_over_is_refused(convert, tmp_path, packing):
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(scarred(PACK[packing](MANY)))
    ended = convert(path)
    assert ended.code == 3
    assert re.search(rf"a\.jsonl\.{packing}:\d+:", last(ended.err))


def test_a_name_that_is_no_text_is_refused_or_escaped(convert, tmp_path):
    (tmp_path / "rows").mkdir()
    name = tmp_path / "rows" / "caf\udce9.jsonl"
    name.write_bytes(GOOD + b"\n{}\n")
    assert convert(name).code == 2
    assert convert(tmp_path / "rows", *TRL, "--rejects", str(tmp_path / "no.jsonl")).code == 0
    assert read(tmp_path / "no.jsonl")[0]["file"] == str(name)


@pytest.mark.parametrize("name", ["with\nnewline.jsonl", "\x1b[31mred.jsonl", "\u202etxt.jsonl", "-.jsonl"])
def test_a_strange_file_name_is_shown_without_effect(convert, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD + b"\nnot JSON")
    assert convert(path).code == 3
    path.write_bytes(GOOD + b"\n{}\n")
    ended = convert(path, *TRL, "--rejects", str(tmp_path / "no.jsonl"), "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["rejected"] == {"wrong_shape": 1}
    assert read(tmp_path / "no.jsonl")[0]["file"] == str(path)


def test_what_is_no_file_is_named(convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "model", "outer/data", "script"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "outer" / "data" / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "script" / "script.py").write_text("")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused = {
        "empty": "no data files in this folder",
        "model": "a model's folder",
        "outer": "there are some in outer/data; name that",
        "script": "scripts are not run",
        "broken.jsonl": "broken.jsonl: cannot be read: No such file",
        "link": "link: cannot be read: No such file",
        "loop": "loop: cannot be read: ",
        "gone.jsonl": "gone.jsonl: cannot be read: No such file",
        "/no/such/folder": "/no/such/folder: no such file or folder",
        "/dev/null": "/dev/null: a device, not a file",
        "/dev/zero": "/dev/zero: a device, not a file",
        "x" * 5000: "File name too long",
        "demo:none": "demo:",
    }
    for source, says in refused.items():
        ended = convert(source)
        assert ended.code == 3, source
        assert says in last(ended.err)


@pytest.mark.skipif(AS_ROOT, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(convert, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    ended = convert(path)
    assert ended.code == 3
    assert "Permission denied" in ended.err


def test_a_named_pipe_is_read_once(convert, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(MANY),))
    writer.start()
    assert convert(pipe).code == 0
    writer.join()
    assert len(read(tmp_path / "out.jsonl")) == 3000


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(convert, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD)
    (tmp_path / "folder").mkdir()
    (tmp_path / "same.jsonl").symlink_to(source)
    for output, arguments in (
        ("no/such/folder.jsonl", ()),
        ("folder", ()),
        ("a.jsonl", ()),
        ("same.jsonl", ()),
        ("out.jsonl", ("--rejects", str(tmp_path / "out.jsonl"))),
        ("out.jsonl", ("--rejects", str(source))),
        ("out.jsonl", ("--rejects", str(tmp_path / "folder"))),
    ):
        ended = convert(source, *arguments, output=output)
        assert ended.code == 2, (output, ended.err)
    assert source.read_bytes() == GOOD


def test_a_full_disk_leaves_the_old_output_and_nothing_else(tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(MANY)
    output.write_text("old")
    ended = subprocess.run(
        [sys.executable, "-m", "dpoctl", "convert-data", str(source), "-o", str(output)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 5
    assert last(ended.stderr) == f"error: {output}: cannot be written: File too large"
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]
