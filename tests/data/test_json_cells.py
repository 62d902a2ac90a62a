import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from format_samples import assistant, user

from dpoctl.data.convert import Conversion, detect, run
from dpoctl.recipe.data_section import Source

TURNS = [[user(f"q{number}"), assistant(f'an "answer"\n{number}')] for number in range(4)]
SHAREGPT = [[{"from": "human", "value": turns[0]["content"]}, {"from": "gpt", "value": "a"}] for turns in TURNS]


def write_csv(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)


def converted(path, folder, **choices):
    run(Conversion(Source(path=path, **choices), str(folder / "out.jsonl"), rejects=str(folder / "rejects.jsonl")))
    return [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("out.jsonl", "rejects.jsonl")
    ]


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_messages_as_json_text_in_a_csv_file_are_read_and_this_is_said_once(tmp_path, capsys, format):
    path = write_csv(tmp_path / "m.csv", ["id", "messages"], [[n, json.dumps(turns)] for n, turns in enumerate(TURNS)])
    used, rejected = converted(path, tmp_path, format=format)
    assert (used, rejected) == ([{"messages": turns} for turns in TURNS], [])
    assert capsys.readouterr().err.count("the cells of messages are JSON text, and are read as messages") == 1


def test_each_column_of_a_parquet_file_counts_alone(tmp_path, capsys):
    rows = [
        {"prompt": json.dumps(turns[:1]), "chosen": json.dumps(turns[1:]), "rejected": f"no {turns[0]['content']}"}
        for turns in TURNS
    ]
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    used, _ = converted(str(path), tmp_path)
    assert used[0] == {"prompt": TURNS[0][:1], "chosen": TURNS[0][1:], "rejected": [assistant("no q0")]}
    assert "cells of prompt, chosen are JSON text" in capsys.readouterr().err


def test_turns_of_from_and_value_are_messages_too(tmp_path):
    path = write_csv(tmp_path / "s.csv", ["conversations"], [[json.dumps(turns)] for turns in SHAREGPT])
    used, _ = converted(path, tmp_path)
    assert used[1] == {"messages": [user("q1"), assistant("a")]}


def test_a_cell_that_is_not_json_is_one_rejected_row(tmp_path):
    cells = [json.dumps(TURNS[0]), json.dumps(TURNS[1]), '[{"role": "user", "content"', json.dumps(TURNS[2])]
    used, rejected = converted(write_csv(tmp_path / "m.csv", ["messages"], [[cell] for cell in cells]), tmp_path)
    assert len(used) == 3
    assert [(row["line"], row["reason"]) for row in rejected] == [(4, "bad_column")]
    assert rejected[0]["detail"].startswith("messages: not JSON: ")


@pytest.mark.parametrize(
    "answer", ['[{"name": "search", "arguments": {}}]', '{"city": "Rome"}', "[1, 2]", "[Verse]", '["a", "b"]']
)
def test_json_that_holds_no_messages_is_the_text_to_learn(tmp_path, answer):
    path = write_csv(tmp_path / "p.csv", ["prompt", "completion"], [["q", answer], ["r", answer]])
    used, _ = converted(path, tmp_path)
    assert used[0] == {"prompt": "q", "completion": answer}


PLAIN = [[f"q{number}", f"yes {number}", f"no {number}"] for number in range(100)]
IN_JSON = [[json.dumps([user(asked)]), json.dumps([assistant(yes)]), no] for asked, yes, no in PLAIN]
ALPACA = [[asked, "", yes] for asked, yes, _ in PLAIN]
ALPACA_IN_JSON = [[json.dumps([{"from": "human", "value": asked}]), "be brief", yes] for asked, yes, _ in PLAIN]


@pytest.mark.parametrize(
    ("columns", "plain", "in_json", "named"),
    [
        (["prompt", "chosen", "rejected"], PLAIN, IN_JSON * 4, "prompt"),
        (["prompt", "chosen", "rejected"], PLAIN[:55], IN_JSON[:45], "prompt"),
        (["question", "chosen", "rejected"], PLAIN, [["q", *row[1:]] for row in IN_JSON], "chosen"),
        (["instruction", "input", "output"], ALPACA, ALPACA_IN_JSON, "instruction"),
    ],
    ids=["later", "mixed", "answers", "joined"],
)
def test_json_text_of_messages_in_a_column_of_plain_text_is_rejected_by_name(tmp_path, columns, plain, in_json, named):
    used, rejected = converted(write_csv(tmp_path / "p.csv", columns, [*plain, *in_json]), tmp_path)
    assert len(used) == len(plain)
    assert [row["line"] for row in rejected] == list(range(len(plain) + 2, len(plain) + len(in_json) + 2))
    assert {(row["reason"], row["detail"]) for row in rejected} == {
        ("bad_column", f"{named} is the JSON text of messages, and in most of the first rows is not; split the file")
    }


def test_json_text_of_messages_that_no_record_takes_is_no_reason_to_reject_a_row(tmp_path):
    rows = [{"prompt": asked, "chosen": yes, "rejected": no, "raw": "none"} for asked, yes, no in PLAIN]
    rows += [row | {"prompt": f"{row['prompt']}?", "raw": json.dumps(TURNS[0])} for row in rows]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    used, rejected = converted(str(path), tmp_path)
    assert (len(used), rejected) == (200, [])


def test_a_list_as_python_writes_it_is_refused_with_what_to_do(tmp_path):
    cells = [[json.dumps(turns)] for turns in TURNS] + [[repr(turns)] for turns in TURNS]
    used, rejected = converted(write_csv(tmp_path / "m.csv", ["messages"], cells), tmp_path)
    assert len(used) == 4
    assert {row["detail"] for row in rejected} == {
        "messages is a list as Python writes it, not JSON; write the column with json.dumps"
    }


def test_detection_tells_the_columns_and_the_options(tmp_path, capsys):
    path = write_csv(tmp_path / "m.csv", ["messages"], [[json.dumps(turns)] for turns in TURNS])
    detect(Source(path=path), json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["json_columns"], found["options"]) == ("messages", ["messages"], {})
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3, "score_B": 1}
    shp = tmp_path / "shp.jsonl"
    shp.write_text(json.dumps(row) + "\n")
    detect(Source(path=str(shp)))
    assert capsys.readouterr().out.splitlines()[1:] == ["  --option min_score_ratio=float (default 0)"]
    detect(Source(path=str(shp)), json_output=True)
    assert json.loads(capsys.readouterr().out)["options"] == {"min_score_ratio": {"values": "float", "default": 0}}
