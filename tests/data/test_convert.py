import gzip
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from data_rows import pair

from dpoctl.data import convert
from dpoctl.data.convert import Conversion, detect
from dpoctl.data.formats import FORMATS
from dpoctl.data.formats.pairs import TURN
from dpoctl.errors import DataError, UsageError
from dpoctl.files import temporary_file
from dpoctl.recipe.data_section import Source

FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


def run(path, output, *, json_output=False, **choices):
    job = {name: choices.pop(name) for name in list(choices) if name in Conversion.__dataclass_fields__}
    convert.run(Conversion(Source(path=str(path), **choices), str(output), **job), json_output=json_output)


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
        "written": 1,
        "duplicates": 0,
        "tied_pairs": 0,
        "outvoted_pairs": 0,
        "rejected": {"empty_answer": 1, "identical_answers": 1},
    }
    assert "2  dropped" in captured.err


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


IMPORT = "from dpoctl.data.convert import Conversion, run; from dpoctl.recipe.data_section import Source"
PIPE = f"{IMPORT}; run(Conversion(Source(path='-'), '-'))"


def test_stdin_streams_to_stdout():
    lines = "".join(json.dumps(pair(number)) + "\n" for number in range(3))
    done = subprocess.run([sys.executable, "-c", PIPE], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout == lines
    assert "3  used" in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    script = f"{IMPORT}; run(Conversion(Source(path='demo:reviewer2'), '-'))"
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


def counted(path, tmp_path, **choices):
    """Convert and return the report, the rows that were written and the rows that were rejected."""
    out, no, report = (tmp_path / name for name in ("out.jsonl", "no.jsonl", "report.json"))
    run(path, out, rejects=str(no), report=str(report), **choices)
    return json.loads(report.read_text()), read(out), read(no)


@pytest.mark.parametrize("to", [None, "pairs", "unpaired", "messages"])
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_every_row_of_every_format_is_used_or_rejected(fixture, to, tmp_path):
    format = fixture.stem if fixture.stem in FORMATS else "auto"
    # What a format has none of, such as labels among rankings, leaves no output; the counts must hold all the same.
    with suppress(DataError):
        counted(fixture, tmp_path, to=to, format=format)
    report, rejects = json.loads((tmp_path / "report.json").read_text()), read(tmp_path / "no.jsonl")
    rows = read(tmp_path / "out.jsonl") if report["used"] else []
    assert report["used"] + sum(report["rejected"].values()) == report["rows"] > 0
    assert report["written"] == len(rows)
    assert sum(report["rejected"].values()) == len(rejects)
    assert all(row.keys() >= {"file", "line", "reason", "detail"} for row in rejects)
    places = [(row["file"], row["line"]) for row in rejects]
    assert len(set(places)) == len(places)
    assert report["first_rejected"].keys() == report["rejected"].keys()


RANKED = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 2, 3]}


@pytest.mark.parametrize(
    ("mode", "written"),
    [
        (None, {("b", "a")}),
        ("best-rest", {("b", "a"), ("b", "c")}),
        ("adjacent", {("d", "c"), ("c", "a")}),
        ("all", {("b", "c"), ("d", "c"), ("b", "a"), ("d", "a"), ("c", "a")}),
    ],
)
def test_rated_answers_become_pairs_as_asked(mode, written, write_rows, tmp_path):
    report, rows, _ = counted(write_rows([RANKED]), tmp_path, pairs=mode)
    assert {(row["chosen"], row["rejected"]) for row in rows} == written
    assert all(row["meta"]["margin"] > 0 for row in rows)
    assert (report["rows"], report["used"], report["written"]) == (1, 1, len(written))
    assert report["tied_pairs"] == (mode is not None)


def test_ratings_can_stay_together(write_rows, tmp_path):
    _, rows, _ = counted(write_rows([RANKED]), tmp_path, rankings=True)
    assert rows == [RANKED]


def test_margins_limits_and_ties_are_kept_to(write_rows, tmp_path):
    source = write_rows([RANKED, RANKED | {"scores": [2, 3, 2, 2.5]}, RANKED | {"prompt": "q", "scores": [1, 1, 1, 1]}])
    _, rows, rejects = counted(source, tmp_path, pairs="all", min_margin=1, max_pairs_per_prompt=3)
    assert [(row["line"], row["reason"]) for row in rejects] == [(2, "enough_pairs"), (3, "tie")]
    assert len(rows) == 3
    _, rows, rejects = counted(source, tmp_path, pairs="best-worst", ties="keep")
    assert [row["meta"] for row in rows][2] == {"margin": 0, "tie": True}


def test_answers_that_stand_in_several_rows_count_as_used_together(write_rows, tmp_path):
    marks = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 0)
    ratings = [("p", "a", 1), ("q", "c", 2), ("p", "b", 4), ("r", "x", 3), ("r", "y", 3)]
    rows = [{"prompt": prompt, "response": text, "helpfulness": mark} | marks for prompt, text, mark in ratings]
    report, written, rejects = counted(write_rows(rows), tmp_path)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in written] == [("b", "a")]
    assert (report["rows"], report["used"], report["rejected"]) == (5, 2, {"no_pair": 1, "tie": 2})
    assert {(row["line"], row["reason"]) for row in rejects} == {(2, "no_pair"), (4, "tie"), (5, "tie")}


def test_pairs_become_labelled_answers_and_back(write_rows, tmp_path):
    rows = [pair(number) for number in range(3)]
    _, labelled, _ = counted(write_rows(rows), tmp_path, to="unpaired")
    assert labelled[:2] == [
        {"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"], "label": True},
        {"prompt": rows[0]["prompt"], "completion": rows[0]["rejected"], "label": False},
    ]
    report, back, _ = counted(write_rows(labelled, "labelled.jsonl"), tmp_path, to="pairs")
    assert back == rows
    assert (report["rows"], report["used"], report["written"]) == (6, 6, 3)
    _, same, _ = counted(write_rows(labelled, "labelled.jsonl"), tmp_path, to="unpaired")
    assert same == labelled


def test_a_prompt_with_answers_of_one_label_makes_no_pair(write_rows, tmp_path):
    rows = [{"prompt": "p", "completion": text, "label": True} for text in "ab"]
    rows += [{"prompt": "q", "completion": text, "label": text == "a"} for text in "ab"]
    report, written, _ = counted(write_rows(rows), tmp_path, to="pairs")
    assert written == [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    assert (report["used"], report["rejected"]) == (2, {"one_sided": 2})


def test_the_best_answer_becomes_a_demonstration(write_rows, tmp_path):
    messages = [{"role": "user", "content": "q"}]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    _, rows, _ = counted(write_rows([{"prompt": messages} | sides]), tmp_path, to="messages")
    assert rows == [{"messages": messages + sides["chosen"]}]
    _, rows, _ = counted(write_rows([pair(0)]), tmp_path, to="messages")
    assert rows == [{"prompt": pair(0)["prompt"], "completion": pair(0)["chosen"]}]


HH_ROWS = [
    {"chosen": f"{start}\n\nAssistant: yes", "rejected": f"{start}\n\nAssistant: no"}
    for start in ("\n\nHuman: q", "\n\nHuman: q\n\nAssistant: a\n\nHuman: r")
]


def test_transcripts_become_conversations_of_which_the_last_answer_is_trained_on(write_rows, tmp_path):
    glitch = {side: f"\n\nHuman: q\n\nAssistant: Human: r\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    _, rows, rejects = counted(write_rows([*HH_ROWS, glitch]), tmp_path, to="messages")
    q, yes = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}
    earlier = {"role": "assistant", "content": "a", "weight": 0}
    assert rows == [{"messages": [q, yes]}, {"messages": [q, earlier, {"role": "user", "content": "r"}, yes]}]
    assert [(row["line"], row["reason"]) for row in rejects] == [(3, "empty_turn")]


def test_transcripts_become_pairs_of_messages_where_asked(write_rows, tmp_path):
    _, rows, _ = counted(write_rows(HH_ROWS), tmp_path, transcripts="messages")
    assert [[turn["role"] for turn in row["prompt"]] for row in rows] == [["user"], ["user", "assistant", "user"]]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "no"}]
    _, rows, _ = counted(write_rows(HH_ROWS), tmp_path)
    assert rows[0]["prompt"] == "\n\nHuman: q\n\nAssistant:"
    _, rows, _ = counted(write_rows(HH_ROWS), tmp_path, to="messages", transcripts="text")
    assert rows[0] == {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " yes"}


def test_texts_that_stay_texts_among_messages_are_counted(write_rows, tmp_path, capsys):
    counted(write_rows([pair(0), pair(1)]), tmp_path, to="messages")
    assert "2 rows stay plain text" in capsys.readouterr().err


def test_several_annotators_are_settled_by_majority(write_rows, tmp_path):
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    other = {"prompt": "p", "chosen": "b", "rejected": "a"}
    source = write_rows([other, one, one, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    report, rows, rejects = counted(source, tmp_path)
    assert rows == [one, one, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    assert [(row["line"], row["reason"]) for row in rejects] == [(1, "outvoted")]
    assert report["duplicates"] == 1
    _, rows, _ = counted(source, tmp_path, drop_duplicates=True)
    assert len(rows) == 2


def test_a_stream_is_written_as_it_comes_and_its_contradictions_are_said(write_rows, tmp_path, capsys):
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    source = write_rows([one, one, {"prompt": "p", "chosen": "b", "rejected": "a"}])
    run(source, "-", rejects=str(tmp_path / "no.jsonl"))
    assert read(tmp_path / "no.jsonl") == []
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert (
        f"warning: {source}: some pairs are contradicted by other rows, and all of them were written; "
        "name a file with -o to keep only the majority's choice" in captured.err
    )
    run(source, "-", max_reject_fraction=0.5)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "contradicted" not in captured.err


@pytest.mark.parametrize("output", ["out.jsonl", "-"])
@pytest.mark.parametrize("guard", [{"strict": True}, {"max_reject_fraction": 0.2}])
def test_a_guard_leaves_no_output(guard, output, write_rows, tmp_path, capsys):
    source = write_rows([pair(0), pair(1), pair(2) | {"chosen": ""}])
    place = output if output == "-" else tmp_path / output
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used.*1 empty_answer") as error:
        run(source, place, rejects=str(tmp_path / "no.jsonl"), **guard)
    assert f"{source}:3" in error.value.hint
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == ["no.jsonl", "rows.jsonl"]


def test_what_a_killed_conversion_left_is_removed(write_rows, tmp_path):
    source = write_rows([{"prompt": "p", "chosen": " a", "rejected": " b"}])
    (tmp_path / ".out[1].jsonl.0a1b2c3d.tmp").write_text("torn")
    (tmp_path / ".other.jsonl.0a1b2c3d.tmp").write_text("of another file")
    with temporary_file(tmp_path / "out[1].jsonl") as (neighbour, _):
        run(source, tmp_path / "out[1].jsonl")
        assert {path.name for path in tmp_path.glob(".*")} == {neighbour.name, ".other.jsonl.0a1b2c3d.tmp"}


def test_a_guard_lets_pass_what_it_allows(write_rows, tmp_path, capsys):
    source = write_rows([pair(0), pair(1), pair(1), pair(2)])
    run(source, "-", strict=True, drop_duplicates=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [pair(0), pair(1), pair(2)]
    source = write_rows([pair(0), pair(1), pair(2) | {"chosen": ""}])
    run(source, tmp_path / "out.jsonl", max_reject_fraction=0.4)
    assert len(read(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("choice", [{"pairs": "all"}, {"min_margin": 2}, {"ties": "keep"}])
def test_a_choice_that_no_row_has_a_use_for_is_refused(choice, write_rows, tmp_path):
    with pytest.raises(DataError, match=f"{next(iter(choice))} would do nothing"):
        run(write_rows([pair(0)]), tmp_path / "out.jsonl", **choice)
    assert names(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"pairs": "all", "to": "messages"}, "--pairs would do nothing"),
        ({"min_margin": 1.0, "rankings": True}, "--min-margin would do nothing"),
        ({"rankings": True, "to": "pairs"}, "splits them"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(choices, said, write_rows, tmp_path):
    with pytest.raises(UsageError, match=said):
        run(write_rows([RANKED]), tmp_path / "out.jsonl", **choices)


def test_an_option_reaches_the_format_and_a_wrong_one_is_refused(tmp_path):
    source = Path(__file__).parent / "fixtures" / "pku.jsonl"
    _, better, _ = counted(source, tmp_path)
    _, safer, _ = counted(source, tmp_path, format_options={"dimension": "safer"})
    assert better != safer
    with pytest.raises(UsageError, match=r"pku\.jsonl: format pku has no option 'dimensio'"):
        counted(source, tmp_path, format_options={"dimensio": "safer"})


def test_the_report_says_how_long_answers_are(write_rows, tmp_path):
    rows = [{"prompt": "p" * n, "chosen": "a" * 2 * n, "rejected": "b" * n} for n in range(1, 101)]
    report, _, _ = counted(write_rows(rows), tmp_path)
    assert report["characters"] == {
        "prompt": {"mean": 50.5, "p5": 5, "p50": 50, "p95": 95, "max": 100},
        "chosen": {"mean": 101.0, "p5": 10, "p50": 100, "p95": 190, "max": 200},
        "rejected": {"mean": 50.5, "p5": 5, "p50": 50, "p95": 95, "max": 100},
        "gap": {"mean": 50.5, "p5": 5, "p50": 50, "p95": 95, "max": 100},
    }


def test_a_format_is_told_without_converting(write_rows, capsys):
    source = write_rows([pair(0), pair(1)])
    detect(Source(path=source), json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["format"], found["rows"]) == (source, "trl-explicit", 2)
    assert found["columns"] == ["chosen", "prompt", "rejected"]
    assert found.keys() >= {"evidence", "also_possible"}
    detect(Source(path=source))
    assert capsys.readouterr().out.startswith("trl-explicit")


def test_other_trainers_load_canonical_rows_unchanged(write_rows, tmp_path):
    import datasets
    from trl.data_utils import is_conversational, maybe_extract_prompt, maybe_unpair_preference_dataset

    def messages(role, content):
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": messages("user", f"q{n}"),
            "chosen": messages("assistant", "a"),
            "rejected": messages("assistant", "b"),
        }
        for n in range(3)
    ]
    loaded = {}
    for to in ("pairs", "unpaired", "messages"):
        run(write_rows(rows), tmp_path / f"{to}.jsonl", to=to)
        options = {"data_files": str(tmp_path / f"{to}.jsonl"), "cache_dir": str(tmp_path / "cache")}
        loaded[to] = datasets.load_dataset("json", split="train", **options)
    assert loaded["pairs"].to_list() == rows
    assert all(is_conversational(row) for data in loaded.values() for row in data)
    assert maybe_extract_prompt(loaded["pairs"][0]) == rows[0]
    unpaired = maybe_unpair_preference_dataset(loaded["pairs"]).to_list()
    key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(loaded["unpaired"].to_list(), key=key) == sorted(unpaired, key=key)
    assert loaded["messages"].to_list() == [{"messages": row["prompt"] + row["chosen"]} for row in rows]
