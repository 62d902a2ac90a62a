import gzip
from pathlib import Path

import pytest
from tiny_runs import write_rows

from dpoctl.data import demo
from dpoctl.data.items import read_items
from dpoctl.errors import DataError
from dpoctl.recipe.contrastive import ItemsSection


def test_items_are_taken_once_and_empty_ones_not_at_all(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [{"t": text} for text in ("a", " a ", "", "b")] + [{"t": 3}])
    items, left_out = read_items(ItemsSection(path=str(path), column="t"))
    assert items == ["a", "b"]
    assert left_out == {"duplicate_item": 1, "empty_item": 1, "no_item": 1}


def test_titles_of_the_demo_need_no_column():
    items, _ = read_items(ItemsSection(path="demo:reviewer2", split="unreviewed"))
    assert items == demo.titles("unreviewed")


def test_lines_of_a_text_file_are_items_compressed_or_not(tmp_path: Path):
    text = "\ufeffParis\r\n\n  Łódź \nParis\n"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain.txt", "packed.txt.gz"):
        assert read_items(ItemsSection(path=str(tmp_path / name))) == (["Paris", "Łódź"], {"duplicate_item": 1})


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("Łódź".encode("iso8859-2"))
    with pytest.raises(DataError, match=r"latin\.txt:1:1: not UTF-8"):
        read_items(ItemsSection(path=str(tmp_path / "latin.txt")))
