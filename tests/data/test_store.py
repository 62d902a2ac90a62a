import os
import shutil
import time

import numpy as np
import pytest

from dpoctl.data.records import Record, Reject
from dpoctl.data.store import StoreWriter, find_store
from dpoctl.data.tokenize import TRAINED, Answer, build_example

PAIR = Record("p", (" a", " b"), ((0, 1),))


def example(*answers, prompt=(1, 2), pairs=((0, 1),), dtype=np.uint16):
    rows = [Answer(list(ids), TRAINED * len(ids)) for ids in answers]
    return build_example(list(prompt), rows, Record("p", ("a",) * len(rows), tuple(pairs)), dtype)


def write(folder, examples, key="k", dtype=np.uint16, record=PAIR):
    with StoreWriter(folder, key, dtype) as writer:
        for line, item in enumerate(examples, start=1):
            writer.add(item, record, (0, "", line))
        writer.reject(Reject("odd", "why"), (0, "part", 9))
        return writer.commit({"used": len(examples)}, ["file"])


EXAMPLES = [example([3, 4], [5]), example([6], [7, 8, 9], [6], prompt=(1,), pairs=((1, 0), (1, 2)))]


def test_examples_come_back_as_they_were_written(tmp_path):
    store = write(tmp_path / "s", EXAMPLES)
    assert len(store) == 2
    for index, written in enumerate(EXAMPLES):
        read = store.example(index)
        assert read.shared.tolist() == written.shared.tolist()
        assert read.shared_scored.tolist() == written.shared_scored.tolist()
        assert read.pairs.tolist() == written.pairs.tolist()
        for name in ("suffixes", "suffixes_scored"):
            assert [part.tolist() for part in getattr(read, name)] == [part.tolist() for part in getattr(written, name)]


def test_the_index_counts_what_the_planner_needs(tmp_path):
    store = write(tmp_path / "s", EXAMPLES)
    assert store.shared_len.tolist() == [2, 1]
    assert store.response_start.tolist() == [0, 2, 5]
    assert store.suffix_len.tolist() == [2, 1, 1, 3, 1]
    assert store.num_tokens.tolist() == [2, 1, 1, 3, 1]
    assert store.pair_start.tolist() == [0, 1, 3]
    assert store.pairs.tolist() == [[0, 1], [1, 0], [1, 2]]


def test_texts_and_rejects_name_the_file_of_today(tmp_path):
    write(tmp_path / "s", EXAMPLES)
    store = find_store(tmp_path / "s", "k", ["moved"])
    assert store.texts(1) == Record("p", (" a", " b"), ((0, 1),), source="moved", line=2)
    assert list(store.rejects(["moved"])) == [{"file": "moved/part", "line": 9, "reason": "odd", "detail": "why"}]


def test_a_store_without_pairs_or_with_large_ids_is_read(tmp_path):
    store = write(
        tmp_path / "s", [example([70_000, 3], pairs=(), dtype=np.uint32)], dtype=np.uint32, record=Record("p", ("a",))
    )
    assert store.pairs.shape == (0, 2)
    assert store.example(0).shared.tolist() == [1, 2, 70_000]


@pytest.mark.parametrize("name", ["ids.bin", "scored.bin", "shared_len.npy", "records.jsonl", "store.json"])
def test_a_damaged_store_is_not_found_and_is_replaced(tmp_path, name):
    write(tmp_path / "s", EXAMPLES)
    damaged = tmp_path / "s" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert find_store(tmp_path / "s", "k") is None
    write(tmp_path / "s", EXAMPLES)
    assert find_store(tmp_path / "s", "k") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_of_another_key_is_not_found(tmp_path):
    write(tmp_path / "s", EXAMPLES)
    assert find_store(tmp_path / "s", "other") is None


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupted():
        with StoreWriter(tmp_path / "s", "k", np.uint16) as writer:
            writer.add(EXAMPLES[0], PAIR, (0, "", 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_the_same_store(tmp_path):
    with StoreWriter(tmp_path / "s", "k", np.uint16) as slow:
        slow.add(EXAMPLES[0], PAIR, (0, "", 1))
        first = write(tmp_path / "s", EXAMPLES[:1])
        second = slow.commit({"used": 1})
    assert second.example(0).shared.tolist() == first.example(0).shared.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("age", [-90_000, 0, 90_000])
def test_what_a_killed_process_left_is_removed_and_what_a_neighbour_writes_is_not(tmp_path, age):
    for name in (".s.00000000.tmp", ".t.00000000.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").write_bytes(b"torn")
    with StoreWriter(tmp_path / "t", "k", np.uint16) as neighbour:
        neighbour.add(EXAMPLES[0], PAIR, (0, "", 1))
        then = time.time() - age
        for path in tmp_path.iterdir():
            os.utime(path, (then, then))
        write(tmp_path / "s", EXAMPLES)
        assert len([path for path in tmp_path.iterdir() if path.name != "s"]) == 1
        neighbour.commit({"used": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "t"]


def test_texts_are_there_when_the_cache_folder_is_not(tmp_path):
    store = write(tmp_path / "s", EXAMPLES)
    shutil.rmtree(tmp_path / "s")
    assert store.texts(1).responses == (" a", " b")
    assert store.example(0).shared.tolist() == [1, 2]
