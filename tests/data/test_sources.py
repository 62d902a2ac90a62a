import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest

from dpoctl.data import sources
from dpoctl.data.records import Reject
from dpoctl.data.sources import fingerprint, location, read_rows
from dpoctl.errors import DataError, SetupError
from dpoctl.recipe.data_section import Source


def rows(**source):
    return [tuple(row) for row in read_rows(Source(**source))]


def test_a_missing_file_is_refused_by_name(tmp_path):
    for path in ("gone.jsonl", str(tmp_path / "gone.jsonl"), str(tmp_path / "gone")):
        with pytest.raises(DataError, match="gone"):
            rows(path=path)
        with pytest.raises(DataError, match="gone"):
            fingerprint(Source(path=path))


def test_an_unreachable_hub_id_is_named(monkeypatch):
    with pytest.raises(SetupError, match="'nobody/pairs' cannot be reached") as error:
        rows(path="nobody/pairs")
    assert error.value.exit_code == 5


READ = "from dpoctl.data.sources import *; from dpoctl.recipe.data_section import Source; "
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def read_elsewhere(path, home, **changes):
    """Read a hub data set in a process that knows nothing but its environment."""
    script = READ + f"print(list(read_rows(Source(path={path!r}, revision='main')))[0].row)"
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HOME": str(home)} | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path):
    ended = read_elsewhere("nobody/pairs", tmp_path, **OFFLINE)
    assert "SetupError: hub data set 'nobody/pairs' cannot be reached" in ended.stderr
    assert "Retrying" not in ended.stderr


@pytest.mark.parametrize("changes", [OFFLINE, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "asked for"])
def test_a_cached_hub_data_set_is_read_without_the_hub(tmp_path, write_rows, changes):
    cache = tmp_path / "home" / "datasets"
    source = write_rows([{"a": "cached"}])
    datasets.load_dataset("json", data_files=[source], cache_dir=str(tmp_path / "made"))
    made = next(tmp_path.glob("made/json/*/0.0.0/*/dataset_info.json")).parent
    kept = cache / "nobody___pairs" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, kept)
    (kept / "json-train.arrow").rename(kept / "pairs-train.arrow")
    facts = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps(facts | {"dataset_name": "pairs", "config_name": "default"}))
    ended = read_elsewhere("nobody/pairs", tmp_path / "home", **changes)
    assert ended.stdout == "{'a': 'cached'}\n", ended.stderr
    assert "the cached copy may not be of revision 'main'" in ended.stderr


@pytest.mark.parametrize(
    ("problem", "kind", "says"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found pairs.py"),
            DataError,
            "refs/convert/parquet",
        ),
        (ValueError("Unknown split 'x'.\nMore"), DataError, "'nobody/pairs': Unknown split 'x'"),
        (OSError("disk"), DataError, "disk"),
        (ConnectionError("Couldn't reach it"), SetupError, "cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("is a gated dataset"), SetupError, "hf auth login"),
        (KeyError(), DataError, "KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_goes_wrong_on_the_hub_is_one_line(monkeypatch, problem, kind, says):
    def load_dataset(*arguments, **options):
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind) as error:
        sources.load_hub(Source(path="nobody/pairs"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_get_their_canonical_names(write_rows):
    path = write_rows([{"question": "q", "better": "a", "chosen": "old"}, {"question": "q"}])
    first, second = rows(path=path, column_map={"prompt": "question", "chosen": "better"})
    assert first == ("", 1, {"prompt": "q", "chosen": "a"})
    assert isinstance(second[2], Reject)
    assert "better" in second[2].detail


def test_two_columns_may_be_swapped(write_rows):
    path = write_rows([{"chosen": "bad", "rejected": "good"}])
    swapped = rows(path=path, column_map={"chosen": "rejected", "rejected": "chosen"})
    assert swapped[0][2] == {"chosen": "good", "rejected": "bad"}


def test_null_columns_are_absent_columns(write_rows):
    assert rows(path=write_rows([{"prompt": "q", "chosen": None}]))[0][2] == {"prompt": "q"}


def test_a_folder_of_files_is_read_in_order_and_each_file_is_named(write_rows, tmp_path):
    write_rows([{"a": 2}], "folder/part-1.jsonl")
    write_rows([{"a": 1}], "folder/part-0.jsonl")
    write_rows([{"a": 3}], "folder/notes.txt")
    folder = str(tmp_path / "folder")
    assert rows(path=folder) == [("part-0.jsonl", 1, {"a": 1}), ("part-1.jsonl", 1, {"a": 2})]
    assert rows(path=folder, data_files=["part-1.jsonl"]) == [("part-1.jsonl", 1, {"a": 2})]
    assert location(folder, "part-1.jsonl") == f"{folder}/part-1.jsonl"


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        rows(path=str(tmp_path))


def test_a_folder_saved_by_datasets_is_read_by_split(tmp_path):
    table = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "q"}]}, {"messages": [{"role": "user", "content": "r"}]}]
    )
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert len(rows(path=str(tmp_path / "one"))) == 2
    assert rows(path=str(tmp_path / "many"), split="test") == [("", 1, table[1])]
    with pytest.raises(DataError, match="splits are train, test"):
        rows(path=str(tmp_path / "many"), split="dev")


def test_a_saved_folder_of_pointers_is_told_from_a_damaged_one(tmp_path):
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "saved"))
    table = next((tmp_path / "saved").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"not a folder saved by datasets that can be read|not .* that can be read"):
        rows(path=str(tmp_path / "saved"))
    table.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        rows(path=str(tmp_path / "saved"))


def test_bare_tables_of_a_saved_folder_are_a_folder_of_files(tmp_path):
    datasets.Dataset.from_list([{"a": 1}, {"a": None}]).save_to_disk(str(tmp_path / "saved"))
    for name in ("state.json", "dataset_info.json"):
        assert len(rows(path=str(tmp_path / "saved"))) == 2
        (tmp_path / "saved" / name).unlink()
    assert rows(path=str(tmp_path / "saved")) == [
        ("data-00000-of-00001.arrow", 1, {"a": 1}),
        ("data-00000-of-00001.arrow", 2, {}),
    ]


def test_rows_of_a_selection_saved_by_datasets_are_the_selected_ones(tmp_path):
    table = datasets.Dataset.from_list([{"a": number} for number in range(10)])
    table.select([7, 3]).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, _, row in rows(path=str(tmp_path / "saved"))] == [{"a": 7}, {"a": 3}]


def test_a_pipe_has_no_fingerprint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe can be read only once"):
        fingerprint(Source(path=str(tmp_path / "pipe")))


def test_packaged_loaders_read_local_files(write_rows):
    path = write_rows([{"a": 1}])
    assert rows(path="json", data_files=[path]) == [("", 1, {"a": 1})]


def test_a_fingerprint_goes_by_content_and_not_by_name(write_rows):
    first = fingerprint(Source(path=write_rows([{"a": 1}], "one.jsonl")))
    assert fingerprint(Source(path=write_rows([{"a": 1}], "two.jsonl"))) == first
    assert fingerprint(Source(path=write_rows([{"a": 2}], "one.jsonl"))) != first


def test_fingerprints_tell_splits_of_saved_folders_apart(tmp_path):
    table = datasets.Dataset.from_list([{"a": 1}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "many"))
    prints = {fingerprint(Source(path=str(tmp_path / "many"), split=split)) for split in ("train", "test")}
    assert len(prints) == 2


def test_rows_of_the_grammar_follow_the_method():
    pairs = list(read_rows(Source(path="demo:reviewer2"), method="dpo"))
    demonstrations = list(read_rows(Source(path="demo:reviewer2"), method="sft"))
    assert json.dumps(pairs[0].row["chosen"][0]) in json.dumps([row.row for row in demonstrations])
    with pytest.raises(DataError, match="demo:reviewer2"):
        rows(path="demo:reviewer3")
