import gzip
import io
import json
import random
import re
import sys
from datetime import UTC, datetime

import pyarrow
import pyarrow.parquet
import pytest
from hostile_files import PACK

from dpoctl.data.readers import read_file, read_stream
from dpoctl.data.records import Reject
from dpoctl.errors import DataError, SetupError


def read(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path))


def test_json_lines_may_have_a_bom_blank_lines_and_crlf(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}'
    assert read(tmp_path, content) == [(1, {"a": 1}), (4, {"a": 2})]


def test_unicode_line_separators_inside_a_string_do_not_end_the_row(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    assert read(tmp_path, json.dumps({"a": text}, ensure_ascii=False)) == [(1, {"a": text})]


def test_unusual_characters_come_through_unchanged(tmp_path):
    text = "\x00 \ufffd \u202e \U0001f469\u200d\U0001f680 e\u0301 \ue000 \U0010ffff"
    assert read(tmp_path, json.dumps({"a": text}))[0][1] == {"a": text}
    assert read(tmp_path, json.dumps({"a": text}, ensure_ascii=False))[0][1] == {"a": text}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_an_array_is_read_whatever_its_name_with_the_line_of_each_row(tmp_path, name):
    content = b'\n[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n'
    content = gzip.compress(content) if name.endswith("gz") else content
    assert read(tmp_path, content, name) == [(3, {"a": 1}), (5, {"a": 2}), (6, {"a": 3})]


def test_rows_may_stand_under_data(tmp_path):
    content = '{"version": {"x": [1]},\n "data": [{"a": 1},\n {"a": 2}], "more": 1}'
    assert read(tmp_path, content, "rows.json") == [(2, {"a": 1}), (3, {"a": 2})]


def test_json_lines_may_be_named_json(tmp_path):
    assert read(tmp_path, '{"a": [1]}\n{"a": [2]}\n', "rows.json") == [(1, {"a": [1]}), (2, {"a": [2]})]


def random_value(draw, depth=3):
    kind = draw.randrange(7 if depth else 5)
    if kind == 6:
        return {f"k{n}\u00e9": random_value(draw, depth - 1) for n in range(draw.randrange(4))}
    if kind == 5:
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    text = "".join(draw.choice('ab\\"\n[{,:]} \u20ac\U0001f469') for _ in range(draw.randrange(12)))
    return [text, draw.random() * 10 ** draw.randrange(-20, 20), draw.randrange(-(10**6), 10**6), True, None][kind]


def test_rows_of_an_array_keep_their_values_and_lines(tmp_path):
    draw = random.Random(0)
    for _ in range(100):
        rows = [{"row": random_value(draw)} for _ in range(draw.randrange(8))]
        pieces, line, lines = ["\ufeff [ "], 1, []
        for number, row in enumerate(rows):
            text = json.dumps(row, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
            gap = draw.choice(["", "\n", " \n\t\n"])
            pieces += [", " if number else "", gap, text]
            line += gap.count("\n")
            lines.append(line)
            line += text.count("\n")
        content = "".join([*pieces, "\n]\n"])
        assert read(tmp_path, content) == list(zip(lines, rows, strict=True))


def test_an_error_in_an_array_names_its_line_and_column(tmp_path):
    for content, place in (
        ('[{"a": 1},\n  {"b": [1, 2 3]}]', "2:15"),
        ('[{"a": "x"}, {"b": nul}]', "1:20"),
        ('[{"a": "x"},\n\n{"b": "c]', "3:7"),
        ('[{"a": "x"}, 12345678901234567890x]', "1:34"),
    ):
        with pytest.raises(DataError, match=rf"rows\.jsonl:{place}: not JSON"):
            read(tmp_path, content)


def test_compression_is_seen_in_the_content_not_the_name(tmp_path):
    assert read(tmp_path, gzip.compress(b'{"a": 1}\n'), "rows.jsonl") == [(1, {"a": 1})]


def test_zstd_without_its_library_says_what_to_install(monkeypatch, tmp_path):
    for name in ("backports", "backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SetupError, match=r"needs backports\.zstd; pip install 'dpoctl\[zstd\]'"):
        read(tmp_path, PACK["zst"](b'{"a": 1}\n'))


def test_a_stream_is_read_as_it_comes():
    rows = read_stream(io.BytesIO(b'{"a": 1}\nnot json'), "<stdin>")
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError, match="<stdin>:2:1: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"a": 1}\n{"a": 2,}\n', "2:[89]: not JSON"),
        ('{"a": 1}\n{"a": "cut', "2:7: not JSON"),
        ('{"a": 1} {"a": 2}\n', "1:10: not JSON: more than one value"),
        ('[{"a": 1}\n {"a": 2}]', "2:2: not JSON: expected ','"),
        ('[{"a": 1},\n', "2:1: not JSON"),
        ("[" * 100_000, "1:2: not JSON: nested too deeply"),
    ],
)
def test_broken_json_is_named_with_file_line_and_column(tmp_path, content, place):
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    assert re.search(f"rows.jsonl:{place}", str(error.value))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r'{"a": "\ud800"}', "lone_surrogate"),
        (r'{"a": [{"b": "x\udfff"}]}', "lone_surrogate"),
        ('{"a": NaN}', "bad_value"),
        ('{"a": [1, {"b": -Infinity}]}', "bad_value"),
        ('{"a": 1e400}', "bad_value"),
        ('{"a": 1, "a": 2}', "bad_value"),
        ('{"x": {"a": 1, "a": 2}}', "bad_value"),
        ("[1, 2]", "not_an_object"),
        ("7", "not_an_object"),
    ],
)
def test_a_row_with_a_flaw_is_rejected_and_the_next_is_read(tmp_path, line, reason):
    rows = read(tmp_path, '{"a": 0}\n' + line + '\n{"a": 3}\n')
    assert [number for number, _ in rows] == [1, 2, 3]
    assert isinstance(rows[1][1], Reject)
    assert rows[1][1].reason == reason


def test_large_whole_numbers_are_read(tmp_path):
    assert read(tmp_path, f'{{"a": {10**30}}}') == [(1, {"a": 10**30})]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_a_git_lfs_pointer_is_named_as_what_it_is(tmp_path, name):
    with pytest.raises(DataError, match="git lfs pull"):
        read(tmp_path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b'{"a": 1}\n{"a": "caf\xe9"}', ":2:11: not UTF-8"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "broken gzip"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        list(read_file(tmp_path / "gone.jsonl"))


def test_csv_cells_may_hold_lines_and_its_rows_know_where_they_start(tmp_path):
    content = '\ufeffprompt,chosen\n"one\ntwo",a\n\nthree,"b, ""c"""\n'
    assert read(tmp_path, content, "rows.csv") == [
        (2, {"prompt": "one\ntwo", "chosen": "a"}),
        (5, {"prompt": "three", "chosen": 'b, "c"'}),
    ]


def test_tab_separated_and_compressed_tables_are_read(tmp_path):
    assert read(tmp_path, gzip.compress(b"a\tb\n1\t2\n"), "rows.tsv.gz") == [(2, {"a": "1", "b": "2"})]


def test_a_csv_row_with_too_many_cells_is_rejected_alone(tmp_path):
    rows = read(tmp_path, "a,b\n1,2,3\n4,5\n", "rows.csv")
    assert isinstance(rows[0][1], Reject)
    assert rows[1] == (3, {"a": "4", "b": "5"})


def test_empty_cells_are_missing_and_blank_ones_are_not(tmp_path):
    assert read(tmp_path, 'a;b;c\n1;;" "\n;;\n', "rows.csv") == [(2, {"a": "1", "c": " "}), (3, {})]


def test_csv_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(DataError, match="save the file as UTF-8"):
        read(tmp_path, b"a\ncaf\xe9\n", "rows.csv")


def test_rows_of_parquet_are_numbered_across_batches_and_nulls_vanish(tmp_path):
    messages = [[{"role": "user", "content": None}], []]
    table = pyarrow.table({"prompt": ["a", None] * 1500, "messages": messages * 1500, "n": range(3000)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = list(read_file(tmp_path / "rows.parquet"))
    assert rows[0] == (1, {"prompt": "a", "messages": [{"role": "user"}], "n": 0})
    assert [number for number, _ in rows] == list(range(1, 3001))
    assert rows[-1] == (3000, {"messages": [], "n": 2999})


def test_numbers_of_parquet_are_json_numbers_or_missing(tmp_path):
    columns = {
        "score": [float("nan"), 0.5, float("inf"), 1.0],
        "parts": [[1.0], [2.0], [3.0], [float("nan")]],
        "when": [datetime(2026, 1, 2, tzinfo=UTC)] * 4,
        "ok": [True, None, False, True],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    rows = [row for _, row in read_file(tmp_path / "rows.parquet")]
    when = "2026-01-02 00:00:00+00:00"
    assert rows[:2] == [
        {"parts": [1.0], "when": when, "ok": True},
        {"score": 0.5, "parts": [2.0], "when": when},
    ]
    assert [row.reason for row in rows[2:]] == ["bad_value"] * 2


def test_text_of_parquet_that_is_no_text_is_refused(tmp_path):
    broken = pyarrow.array([b"good", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"a": broken}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: rows 1 to 2 hold a text that is not UTF-8"):
        list(read_file(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_both_kinds_of_arrow_files_are_read(tmp_path, new):
    table = pyarrow.table({"a": list(range(3000))})
    with new(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    assert list(read_file(tmp_path / "rows.arrow")) == [(n + 1, {"a": n}) for n in range(3000)]


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a Parquet file"):
        read(tmp_path, "hello, this is not it", "rows.parquet")
