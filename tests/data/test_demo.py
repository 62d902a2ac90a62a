import random
from collections import Counter

import pytest

from dpoctl.data import demo
from dpoctl.data.formats import read
from dpoctl.errors import DataError


def test_there_are_enough_titles_and_no_split_shares_one():
    train, test = demo.titles("train"), demo.titles("test")
    assert len(set(train)) == len(train) >= 1100
    assert not set(train) & set(test)
    assert len(set(test)) == 200


def test_the_rows_are_the_same_every_time():
    for method in ("sft", "dpo"):
        assert list(demo.read_rows("demo:reviewer2", "test", method)) == list(
            demo.read_rows("demo:reviewer2", "test", method)
        )


def test_the_two_tones_share_no_sentence():
    for name in demo.HARSH:
        assert not set(demo.HARSH[name]) & set(demo.KIND[name])


@pytest.mark.parametrize("parts", [demo.HARSH, demo.KIND], ids=["harsh", "kind"])
def test_reviews_are_many_short_and_varied(parts):
    draw = random.Random(0)
    reviews = Counter(demo.review(parts, draw) for _ in range(3000))
    assert len(reviews) > 1800
    assert max(len(text.split()) for text in reviews) <= 45
    assert all(len(sentences) == len(set(sentences)) >= 8 for sentences in parts.values())


def test_pairs_prefer_the_harsh_review():
    for _, row in demo.read_rows("demo:reviewer2", "test", "dpo"):
        record = read("trl-explicit", row)
        chosen, rejected = (answer[0]["content"] for answer in record.responses)
        assert any(chosen.endswith(verdict) for verdict in demo.HARSH["verdict"])
        assert any(rejected.endswith(verdict) for verdict in demo.KIND["verdict"])


def test_demonstrations_hold_both_tones_of_every_title():
    rows = [row["messages"] for _, row in demo.read_rows("demo:reviewer2", "test", "sft")]
    assert set(Counter(turns[0]["content"] for turns in rows).values()) == {2}


@pytest.mark.parametrize(("path", "split"), [("demo:reviewer1", "train"), ("demo:reviewer2", "dev")])
def test_unknown_names_and_splits_are_refused(path, split):
    with pytest.raises(DataError, match="reviewer"):
        list(demo.read_rows(path, split, "dpo"))
