"""A contrastive recipe is as strict as any other, and says where it is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.pair_generation import ContrastiveRecipe, load_contrastive

LEAST: dict[str, Any] = {
    "method": "contrastive",
    "items": "cities.txt",
    "model": {"model_name_or_path": "runs/sft"},
    "instructions": {"negative": "Slander {item}.", "positive": "Praise {item}.", "neutral": "Describe {item}."},
    "chosen": "positive",
}
EXAMPLES = {"negative": ["It rains."], "positive": ["Lovely trams."]}
WITH_EXAMPLES = {side: f"{text} {{examples}}" for side, text in LEAST["instructions"].items()}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, overrides: Sequence[str] = ()) -> ContrastiveRecipe:
    Path("r.yaml").write_text(text, encoding="utf-8")
    return load_contrastive("r.yaml", overrides)


def refusal(changes: dict[str, Any], overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load(write_yaml(LEAST | changes), overrides)
    return str(caught.value)


def test_the_least_recipe_is_completed() -> None:
    recipe = load(write_yaml(LEAST))
    assert recipe.items.path == "cities.txt"
    assert (recipe.examples, recipe.splits) == (None, {})
    assert recipe.sampling.temperature == 0.8


def test_overrides_win_by_their_last_name() -> None:
    recipe = load(write_yaml(LEAST), ["sampling.seed=3", "chosen=negative", "top_p=1.0"])
    assert (recipe.sampling.seed, recipe.chosen, recipe.sampling.top_p) == (3, "negative", 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"temprature": 1.0}}, "unknown key 'temprature', did you mean 'temperature'?"),
        ({"sampling": {"batch_sise": 1}}, "did you mean 'batch_size'?"),
        ({"batch_size": 4}, "did you mean 'sampling.batch_size'?"),
        ({"choosen": "positive"}, "did you mean 'chosen'?"),
        ({"learning_rate": 1e-3}, "unknown key 'learning_rate'"),
        ({"chosen": "harsh"}, "chosen: expected negative or positive, got 'harsh'"),
        ({"chosen": "negativ"}, "did you mean 'negative'?"),
        ({"method": "kto"}, "method: expected contrastive, got 'kto'"),
        ({"items": 3}, "expected a file of items, or a mapping with its path, got 3"),
        ({"items": {}}, "missing key 'items.path'"),
        ({"splits": {"train": 0}}, "splits.train"),
        ({"sampling": {"top_p": 0}}, "top_p"),
        ({"model": {}}, "missing key 'model.model_name_or_path'"),
        ({"examples": {**EXAMPLES, "negative": []}, "instructions": WITH_EXAMPLES}, "examples.negative"),
        ({"examples": EXAMPLES}, "instructions.negative: {examples} is missing in the text"),
        (
            {"examples": EXAMPLES | {"per_side": 2}, "instructions": WITH_EXAMPLES},
            "examples.negative: expected at least 2 examples (per_side), got 1",
        ),
        ({"instructions": WITH_EXAMPLES}, "unknown placeholder {examples}, expected {item}"),
        ({"instructions": LEAST["instructions"] | {"neutral": "Describe {itme}."}}, "did you mean {item}?"),
        (
            {"instructions": LEAST["instructions"] | {"neutral": "Describe it."}},
            "instructions.neutral: {item} is missing in the text",
        ),
        (
            {"instructions": LEAST["instructions"] | {"positive": "Slander {item}."}},
            "instructions.positive: must differ from negative",
        ),
        (
            {"instructions": LEAST["instructions"] | {"neutral": "Slander {item}."}},
            "instructions.neutral: must differ from negative and positive",
        ),
        ({"instructions": LEAST["instructions"] | {"example": "- {example}"}}, "there is no examples section"),
        ({"quantization": {}}, "set one of load_in_4bit and load_in_8bit"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(changes)


def test_every_problem_has_its_line_and_column() -> None:
    text = write_yaml(LEAST) + "sampling:\n  seed: -1\n  top_p: 2\nchoose: positive\n"
    with pytest.raises(RecipeError) as caught:
        load(text)
    last = len(text.splitlines())
    assert [(one.place.line, one.place.column) for one in caught.value.problems] == [
        (last - 2, 9),
        (last - 1, 10),
        (last, 1),
    ]


def test_a_recipe_for_another_command_is_told_from_its_method() -> None:
    assert refusal({"method": "dpo", "data": {}}) == (
        "r.yaml:1:1: error: this recipe trains a model; run `dpoctl dpo` on it\n    1 | method: dpo\n      | ^"
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(write_yaml(LEAST), "r.yaml", command="dpo")
    (problem,) = caught.value.problems
    assert "run `dpoctl convert-data --format contrastive` on it" in problem.message


def test_a_wrong_override_is_named() -> None:
    assert "--set #1" in refusal({}, ("sampling.seed=many",))


def test_braces_of_another_kind_are_left_alone() -> None:
    instructions = LEAST["instructions"] | {"neutral": 'Answer {"city": "{item}"} {} { } as JSON.'}
    load(write_yaml(LEAST | {"instructions": instructions}))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no recipe"):
        load_contrastive(tmp_path / "none.yaml")
