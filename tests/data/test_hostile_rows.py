"""Rows that cannot be used are counted, one by one; files that are merely unusual are read."""

import gzip
import json
from typing import Any

import pytest
from data_rows import pair
from hostile_files import GOOD, PACK, PAIRS, TRL, arrow_stream, parquet, read

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]}
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
REJECTED: dict[str, tuple[Any, str]] = {
    "half a character": (rb'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}', "lone_surrogate"),
    "half a character in a key": (rb'{"prompt": "q", "chosen": "a", "rejected": "b", "\udc00": 1}', "lone_surrogate"),
    "a key twice": (b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}', "bad_value"),
    "a key twice, deep": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "x": [{"k": 1, "k": 2}]}', "bad_value"),
    "NaN": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": NaN}', "bad_value"),
    "infinity": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": -Infinity}', "bad_value"),
    "beyond every float": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "score": 1e999}', "bad_value"),
    "5000 digits": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "id": ' + b"9" * 5000 + b"}", "bad_value"),
    "200 levels": (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "bad_value"),
    "150 levels of objects": (b'{"a":' * 150 + b"1" + b"}" * 150, "bad_value"),
    "null": (None, "not_an_object"),
    "a number": (7, "not_an_object"),
    "a list": ([ROW], "not_an_object"),
    "a string": ("row", "not_an_object"),
    "an empty object": ({}, "wrong_shape"),
    "a number for text": (ROW | {"chosen": 7}, "wrong_shape"),
    "true for text": (ROW | {"prompt": True}, "wrong_shape"),
    "an object for text": (ROW | {"chosen": {"text": "a"}}, "wrong_shape"),
    "null for text": (ROW | {"rejected": None}, "wrong_shape"),
    "a prompt of blanks": (ROW | {"prompt": " \n\t"}, "empty_prompt"),
    "an answer of blanks": (ROW | {"chosen": "\u00a0 \n"}, "empty_answer"),
    "the same answers": (ROW | {"rejected": "a"}, "identical_answers"),
    "answers that differ in blanks": (ROW | {"rejected": " a\n"}, "identical_answers"),
    "no messages": (CHAT | {"prompt": [], "rejected": "b"}, "empty_prompt"),
    "an answer of no messages": (CHAT | {"rejected": []}, "empty_answer"),
    "an unknown role": (CHAT | {"rejected": [{"role": "narrator", "content": "b"}]}, "unknown_role"),
    "a picture": (CHAT | {"prompt": PICTURE, "rejected": "b"}, "not_text"),
    "a message without content": (CHAT | {"rejected": [{"role": "assistant"}]}, "no_content"),
    "a message that is a string": (CHAT | {"rejected": ["b"]}, "wrong_shape"),
    "escape sequences": (CHAT | {"rejected": [{"role": "\x1b[2J\x07", "content": "b"}]}, "unknown_role"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_hostile_row_is_counted_and_its_neighbours_are_used(convert, tmp_path, case):
    row, reason = REJECTED[case]
    content = row if isinstance(row, bytes) else json.dumps(row).encode()
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + content + b"\n" + json.dumps(pair(1)).encode())
    ended = convert(tmp_path / "a.jsonl", *TRL, "--rejects", str(tmp_path / "no.jsonl"), "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["rejected"] == {reason: 1}
    assert [row["line"] for row in read(tmp_path / "no.jsonl")] == [2]
    assert read(tmp_path / "out.jsonl") == [pair(0), pair(1)]


def test_a_file_whose_first_rows_are_all_bad_is_still_read(convert, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"7\n" * 150 + GOOD)
    ended = convert(tmp_path / "a.jsonl", *TRL)
    assert ended.code == 0
    assert read(tmp_path / "out.jsonl") == [pair(0)]
    assert convert(tmp_path / "a.jsonl").code == 0


HUGE = ROW | {"prompt": "x" * 10_000_000}
ACCEPTED: dict[str, tuple[str, bytes, list[dict[str, Any]]]] = {
    "a row of ten megabytes": ("a.jsonl", json.dumps(HUGE).encode(), [HUGE]),
    "a row of ten megabytes in an array": ("a.json", json.dumps([ROW, HUGE, ROW]).encode(), [ROW, HUGE, ROW]),
    "characters of four bytes across chunks": (
        "a.json",
        json.dumps([ROW | {"prompt": "x" + "\U0001f469" * 300_000}], ensure_ascii=False).encode(),
        [ROW | {"prompt": "x" + "\U0001f469" * 300_000}],
    ),
    "an array in one line": (
        "a.jsonl",
        json.dumps([pair(n) for n in range(5000)]).encode(),
        list(map(pair, range(5000))),
    ),
    "a mark and Windows line ends": ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [pair(0)] * 2),
    "escape sequences in a value": (
        "a.jsonl",
        json.dumps(ROW | {"chosen": "\x1b[2J\0"}).encode(),
        [ROW | {"chosen": "\x1b[2J\0"}],
    ),
    "a number of 300 digits": ("a.jsonl", json.dumps(ROW | {"id": 10**299}).encode(), [ROW]),
    "brackets in the text": (
        "a.jsonl",
        json.dumps(ROW | {"chosen": "[" * 500}).encode(),
        [ROW | {"chosen": "[" * 500}],
    ),
    "an escaped backslash before a u": (
        "a.jsonl",
        json.dumps(ROW | {"chosen": r"\ud800"}).encode(),
        [ROW | {"chosen": r"\ud800"}],
    ),
    "rows under data": (
        "a.json",
        json.dumps({"version": {"v": [1]}, "data": [ROW, ROW], "more": [{}]}).encode(),
        [ROW] * 2,
    ),
    "one row over many lines": ("a.json", json.dumps(ROW, indent=2).encode(), [ROW]),
    "rows over many lines": ("a.json", (json.dumps(ROW, indent=2) + "\n").encode() * 3, [ROW] * 3),
    "text that is named as gzip": ("a.jsonl.gz", GOOD, [pair(0)]),
    "gzip in several parts": ("a.jsonl.gz", gzip.compress(GOOD + b"\n") + gzip.compress(GOOD), [pair(0)] * 2),
    "zstd in several parts": ("a", PACK["zst"](GOOD + b"\n") + PACK["zst"](GOOD), [pair(0)] * 2),
    "a table with a mark, and lines in cells": (
        "a.csv",
        '\ufeffprompt,chosen,rejected\r\n"q\r\n1","a ""x""",b\r\n'.encode(),
        [{"prompt": "q\r\n1", "chosen": 'a "x"', "rejected": "b"}],
    ),
    "a table with semicolons": ("a.csv", b"prompt;chosen;rejected\nq;a, and b;b\n", [ROW | {"chosen": "a, and b"}]),
    "a table with blank cells": ("a.csv", b"prompt,chosen,rejected,note\nq,a,b,\nq,a,b,x\n", [ROW] * 2),
    "Parquet with numbers": (
        "a.parquet",
        parquet(**PAIRS, score=[float("nan")] * 50, ok=[True] * 50, n=list(range(50))),
        [pair(number) for number in range(50)],
    ),
    "Parquet without a name": ("a", parquet(**PAIRS), [pair(number) for number in range(50)]),
    "an Arrow stream": ("a.arrow", arrow_stream(3000), [pair(number) for number in range(3000)]),
    **{f"{kind} by content alone": ("a.jsonl", pack(GOOD), [pair(0)]) for kind, pack in PACK.items()},
    **{
        f"a table in {kind}": (f"a.csv.{kind}", pack(b"prompt,chosen,rejected\nq,a,b\n"), [ROW])
        for kind, pack in PACK.items()
    },
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_unusual_file_is_read(convert, tmp_path, case):
    name, content, rows = ACCEPTED[case]
    (tmp_path / name).write_bytes(content)
    ended = convert(tmp_path / name, *TRL)
    assert ended.code == 0, ended.err
    assert read(tmp_path / "out.jsonl") == rows
