import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_rows import pair

from dpoctl.data.convert import run
from dpoctl.data.formats import TURN
from dpoctl.errors import DataError, UsageError


def read(path):
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_real_transcripts_are_split_at_their_turns(hh_file, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    run(str(hh_file), output=str(tmp_path / "hh.jsonl"), format="hh", rejects=str(rejects))
    used, refused = iter(read(tmp_path / "hh.jsonl")), {row["line"]: row["reason"] for row in read(rejects)}
    assert set(refused.values()) <= {"empty_answer", "identical_answers", "prompts_differ", "no_final_answer"}
    counted = 0
    with gzip.open(hh_file, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number in refused:
                continue
            source, row = json.loads(line), next(used)
            counted += 1
            histories = ["".join(TURN.split(source[side])[:-1]) for side in ("chosen", "rejected")]
            if histories[0] != histories[1]:
                continue
            marker = "\n\nAssistant:"
            assert row["prompt"] == source["chosen"][: source["chosen"].rindex(marker) + len(marker)]
            assert row["prompt"] + row["chosen"] == source["chosen"]
            assert row["prompt"] + row["rejected"] == source["rejected"]
    assert counted + len(refused) == 1500
    assert next(used, None) is None


def test_canonical_rows_keep_their_meta_and_nothing_else(write_rows, tmp_path):
    row = pair(0) | {"meta": {"source": "x", "margin": 2}}
    run(write_rows([row | {"id": 7}]), output=str(tmp_path / "out.jsonl"))
    assert read(tmp_path / "out.jsonl") == [row]


def test_canonical_files_convert_to_themselves(write_rows, tmp_path):
    source = write_rows([pair(number) for number in range(3)])
    run(source, output=str(tmp_path / "one.jsonl.gz"))
    run(str(tmp_path / "one.jsonl.gz"), output=str(tmp_path / "two.jsonl.gz"))
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    assert read(tmp_path / "two.jsonl.gz") == [pair(number) for number in range(3)]


def test_rejected_rows_go_to_their_file_and_are_counted(write_rows, tmp_path, capsys):
    source = write_rows([pair(0), pair(1) | {"chosen": " "}, pair(2) | {"rejected": pair(2)["chosen"]}])
    outputs = {"output": str(tmp_path / "out.jsonl"), "rejects": str(tmp_path / "no.jsonl")}
    run(source, **outputs, format="trl-explicit", json_output=True)
    assert [(row["file"], row["line"], row["reason"]) for row in read(tmp_path / "no.jsonl")] == [
        (source, 2, "empty_answer"),
        (source, 3, "identical_answers"),
    ]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "source": source,
        "format": "trl-explicit",
        "rows": 3,
        "used": 1,
        "rejected": {"empty_answer": 1, "identical_answers": 1},
    }
    assert "2  rejected" in captured.err


def test_columns_can_be_renamed(write_rows, tmp_path):
    source = write_rows([{"q": "a", "good": "b", "bad": "c"}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    run(source, output=str(tmp_path / "out.jsonl"), column_map=columns)
    assert read(tmp_path / "out.jsonl") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_nothing_usable_is_an_error_that_leaves_only_the_rejects(write_rows, tmp_path):
    source = write_rows([pair(0) | {"chosen": ""}])
    with pytest.raises(DataError, match="none of 1 rows can be used: 1 empty_answer"):
        run(source, output=str(tmp_path / "out.jsonl"), rejects=str(tmp_path / "no.jsonl"))
    assert names(tmp_path) == ["no.jsonl", "rows.jsonl"]


def test_a_file_that_breaks_in_the_middle_leaves_the_old_output_alone(tmp_path, write_rows):
    source = write_rows([pair(0)])
    Path(source).write_text(json.dumps(pair(0)) + "\n{broken")
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(DataError, match=r"rows\.jsonl:2:2"):
        run(source, output=str(tmp_path / "out.jsonl"), rejects=str(tmp_path / "no.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert names(tmp_path) == ["out.jsonl", "rows.jsonl"]


def test_an_output_that_cannot_be_written_is_refused(write_rows, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        run(write_rows([pair(0)]), output=str(tmp_path / "no" / "such" / "out.jsonl"))


def test_outputs_that_exclude_each_other_are_refused(write_rows, tmp_path):
    source = write_rows([pair(0)])
    with pytest.raises(UsageError, match="--json"):
        run(source, output="-", json_output=True)
    with pytest.raises(UsageError, match="same file"):
        run(source, output=str(tmp_path / "a"), rejects=str(tmp_path / "a"))


IMPORT = "from dpoctl.data.convert import run"
PIPE = f"{IMPORT}; run('-', output='-')"


def test_stdin_streams_to_stdout():
    lines = "".join(json.dumps(pair(number)) + "\n" for number in range(3))
    done = subprocess.run([sys.executable, "-c", PIPE], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout == lines
    assert "3  used" in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    script = f"{IMPORT}; run('demo:reviewer2', output='-')"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_converting_imports_no_torch():
    script = f"{PIPE}; import sys; assert 'torch' not in sys.modules, 'torch'; assert 'transformers' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(pair(0)), text=True, check=True, capture_output=True
    )


def test_formats_are_known_without_heavy_imports():
    script = "import sys; from dpoctl.data.formats import FORMATS; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], text=True, check=True, capture_output=True)
    assert not {"numpy", "pydantic", "rich"} & set(done.stdout.split())
