import json

import datasets
import pytest

from dpoctl.data.records import Reject
from dpoctl.data.sources import fingerprint, location, read_rows
from dpoctl.errors import DataError, SetupError
from dpoctl.recipe.schema import Source


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
