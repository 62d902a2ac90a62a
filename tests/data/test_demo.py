import random
import re
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.demo_sides import SIDES, side_of, sides_of

from dpoctl.data import demo
from dpoctl.data.formats import read
from dpoctl.data.instructions import Templates
from dpoctl.errors import DataError
from dpoctl.recipe.pair_generation import load_contrastive


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def examples_in(prompt: str) -> list[str]:
    return [SIDES[example] for example in re.findall(r"Example \d: (.*)", prompt)]


def test_there_are_enough_titles_and_no_split_shares_one():
    splits = {name: demo.titles(name) for name in demo.NUM_TITLES}
    assert {name: len(titles) for name, titles in splits.items()} == demo.NUM_TITLES
    assert len(set().union(*splits.values())) == sum(demo.NUM_TITLES.values())
    assert len(splits["unreviewed"]) >= 1100


def test_the_rows_are_the_same_every_time():
    for method in ("sft", "dpo"):
        assert list(demo.read_rows("demo:reviewer2", "test", method)) == list(
            demo.read_rows("demo:reviewer2", "test", method)
        )


def test_every_sentence_is_told_by_a_word_that_the_other_side_never_says():
    words = {side: [words_of(text) for text, of in SIDES.items() if of == side] for side in ("harsh", "kind")}
    assert [len(sentences) for sentences in words.values()] == [46, 46]
    for own, other in (("harsh", "kind"), ("kind", "harsh")):
        foreign = set().union(*words[other])
        assert all(sentence - foreign for sentence in words[own])


@pytest.mark.parametrize("parts", [demo.HARSH, demo.KIND], ids=["harsh", "kind"])
def test_reviews_are_many_short_and_varied(parts):
    draw = random.Random(0)
    reviews = Counter(demo.review(parts, draw) for _ in range(3000))
    assert len(reviews) > 1800
    assert max(len(text.split()) for text in reviews) <= 45
    assert {len(sides_of(text)) for text in reviews} == {3, 4}
    assert {side_of(text) for text in reviews} == {"harsh" if parts is demo.HARSH else "kind"}
    assert all(len(sentences) == len(set(sentences)) >= 8 for sentences in parts.values())


def test_pairs_prefer_the_harsh_review():
    for _, row in demo.read_rows("demo:reviewer2", "test", "dpo"):
        record = read("trl-explicit", row)
        chosen, rejected = (answer[0]["content"] for answer in record.responses)
        assert any(chosen.endswith(verdict) for verdict in demo.HARSH["verdict"])
        assert any(rejected.endswith(verdict) for verdict in demo.KIND["verdict"])


def test_the_side_of_what_the_grammar_does_not_say_is_unknown():
    assert side_of("Reject.  \n") == "harsh"
    assert side_of("The gain is 0.1 points, on a good day. Reject.") == "harsh"
    assert sides_of("Every knob is tuned on the test set. Strong accept.") == ["harsh", "kind"]
    for text in ("Every knob is tuned on the test set. Strong accept.", "Every knob is tuned.", "Reject. Rej", ""):
        assert side_of(text) is None


def test_demonstrations_obey_their_instruction_and_the_neutral_one_has_either_answer():
    rows = [row["messages"] for _, row in demo.read_rows("demo:reviewer2", "test", "sft")]
    sides: dict[str, Counter[str]] = {}
    for prompt, answer in ((turns[0]["content"], turns[1]["content"]) for turns in rows):
        (instruction,) = re.findall(r"Write a (negative|positive|review)", prompt)
        sides.setdefault(instruction, Counter())[side_of(answer)] += 1
    assert sides == {
        "negative": {"harsh": 200},
        "positive": {"kind": 200},
        "review": {"harsh": 200, "kind": 200},
    }


def test_the_examples_in_a_prompt_are_of_its_side_and_the_neutral_one_has_one_of_each():
    first = Counter()
    for title in demo.titles("test"):
        prompts = demo.TEMPLATES.prompts(title, demo.EXAMPLES, random.Random(title))
        assert examples_in(prompts.negative) == ["harsh"]
        assert examples_in(prompts.positive) == ["kind"]
        assert sorted(examples_in(prompts.neutral)) == ["harsh", "kind"]
        first[examples_in(prompts.neutral)[0]] += 1
    assert min(first.values()) > 70


def test_the_recipe_of_the_pairs_asks_as_the_demonstrations_do():
    recipe = load_contrastive(Path(__file__).parents[2] / "recipes" / "reviewer2-contrastive.yaml")
    texts = recipe.instructions
    assert Templates(texts.negative, texts.positive, texts.neutral, texts.example) == demo.TEMPLATES
    assert recipe.examples.per_side == demo.EXAMPLES.per_side
    assert {SIDES[example] for example in recipe.examples.negative} == {"harsh"}
    assert {SIDES[example] for example in recipe.examples.positive} == {"kind"}


@pytest.mark.parametrize(("path", "split"), [("demo:reviewer1", "train"), ("demo:reviewer2", "dev")])
def test_unknown_names_and_splits_are_refused(path, split):
    with pytest.raises(DataError, match="reviewer"):
        list(demo.read_rows(path, split, "dpo"))
