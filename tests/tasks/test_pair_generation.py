"""A model writes both answers of a pair: for any list and any instructions, whole or not at all, the same each time."""

import copy
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import merge, write_rows
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpoctl.cli.convert_data import convert_data
from dpoctl.data import demo
from dpoctl.data.formats import read
from dpoctl.errors import DataError, UsageError, UserError
from dpoctl.model.generate import Generation
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.pair_generation import ItemsSection
from dpoctl.tasks import pair_generation
from dpoctl.tasks.pair_generation import read_items

Make = Callable[..., dict[str, list[dict[str, Any]]]]
CITIES = [f"city {number}" for number in range(60)]
PLAIN = {"negative": "Slander {item}.", "positive": "Praise {item}.", "neutral": "Describe {item}."}


@pytest.fixture
def writer(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model of random weights; a sixth of its tokens end its turn, so that some answers are short and some empty."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(4, 68))
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


@pytest.fixture
def spec(writer: Path, tmp_path: Path) -> dict[str, Any]:
    items = tmp_path / "cities.txt"
    items.write_text("\n".join(CITIES) + "\n\n  \n", encoding="utf-8")
    return {
        "method": "contrastive",
        "items": str(items),
        "model": {"model_name_or_path": str(writer)},
        "instructions": {
            "negative": "Slander {item}. {examples}",
            "positive": "Praise {item}. {examples}",
            "neutral": "Describe {item}. {examples}",
            "example": "({number}) {example}",
        },
        "examples": {"negative": ["Rain.", "Mud."], "positive": ["Trams!", "Cake!"], "per_side": 2},
        "chosen": "positive",
        "sampling": {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": 8},
    }


@pytest.fixture
def make(spec: dict[str, Any], tmp_path: Path) -> Make:
    """Run a recipe with changes; return the rows of every file that it leaves."""

    def run(name: str = "pairs.jsonl", /, rejects: bool = False, **changes: Any) -> dict[str, list[dict[str, Any]]]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(write_yaml(merge(spec, changes)), encoding="utf-8")
        refused = tmp_path / "out" / "rejects.jsonl" if rejects else None
        pair_generation.run(recipe, output=tmp_path / "out" / name, rejects=refused)
        return files(tmp_path / "out")

    return run


def files(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.iterdir()}


class Calls(list[int]):
    """How many prompts the model got in each call; from the `last` call on it is interrupted."""

    last = 1000


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counts = Calls()
    real = pair_generation.generate

    def counting(causal: Any, tokenizer: Any, prompts: list[Any], sampling: Any) -> Any:
        if len(counts) == counts.last:
            raise KeyboardInterrupt
        counts.append(len(prompts))
        return real(causal, tokenizer, prompts, sampling)

    monkeypatch.setattr(pair_generation, "generate", counting)
    return counts


def test_pairs_have_the_neutral_prompt_and_say_that_it_is_synthetic(make: Make):
    (rows,) = make().values()
    assert 20 < len(rows) < 60
    for row in rows:
        record = read("trl-explicit", row)
        assert record.responses == (row["chosen"], row["rejected"])
        assert row["chosen"] != row["rejected"]
        assert row["meta"] == {"synthetic_prompt": True, "item": row["meta"]["item"], "chosen": "positive"}
        text = row["prompt"][0]["content"]
        assert text.startswith(f"Describe {row['meta']['item']}. (1) ")
        sides = ["+" if line.endswith("!") else "-" for line in text.split("\n")]
        assert sides in (["+", "-", "+", "-"], ["-", "+", "-", "+"])
    assert [row["meta"]["item"] for row in rows] != sorted(row["meta"]["item"] for row in rows)


def test_which_side_is_chosen_is_a_matter_of_one_key(make: Make):
    (ours,) = make().values()
    (theirs,) = make(chosen="negative").values()
    assert [row["chosen"] for row in ours] == [row["rejected"] for row in theirs]
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]


def test_rejected_items_are_counted_and_written_with_their_reason(make: Make, capsys: pytest.CaptureFixture[str]):
    found = make(rejects=True)
    reasons = Counter(row["reason"] for row in found["rejects.jsonl"])
    assert {"empty", "cut_off"} <= reasons.keys() <= {"empty", "cut_off", "identical"}
    assert len(found["pairs.jsonl"]) + reasons.total() == len(CITIES)
    said = capsys.readouterr().err
    assert f"{reasons['cut_off']}  not used: cut_off" in said
    assert "neither answer of a pair was written for its prompt, the neutral one" in said


def test_identical_answers_are_no_pair(make: Make, monkeypatch: pytest.MonkeyPatch):
    def repeat(causal: Any, tokenizer: Any, prompts: list[Any], sampling: Any) -> list[Generation]:
        return [Generation(" Hm." if index % 2 else "Hm. ", True) for index, _ in enumerate(prompts)]

    monkeypatch.setattr(pair_generation, "generate", repeat)
    with pytest.raises(DataError, match="60 identical"):
        make()


def test_copied_examples_are_counted(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def copy(causal: Any, tokenizer: Any, prompts: list[Any], sampling: Any) -> list[Generation]:
        return [Generation("Fine." if index % 2 else "Mud. Mud.", True) for index, _ in enumerate(prompts)]

    monkeypatch.setattr(pair_generation, "generate", copy)
    make()
    assert "50% of the answers copy an example from their prompt" in capsys.readouterr().err


def test_batches_do_not_change_the_pairs(make: Make):
    assert make() == make(**{"sampling.batch_size": 3})


def test_an_interrupted_run_goes_on_and_gives_the_same_pairs(make: Make, calls: Calls, tmp_path: Path):
    expected = make("whole.jsonl")["whole.jsonl"]
    whole = sum(calls)
    calls.clear()
    calls.last = 3
    with pytest.raises(KeyboardInterrupt):
        make()
    assert files(tmp_path / "out").keys() == {"whole.jsonl", "pairs.jsonl.partial"}
    # A killed process leaves half a line.
    with (tmp_path / "out" / "pairs.jsonl.partial").open("a") as file:
        file.write('{"key": "12')
    calls.last = 1000
    assert make()["pairs.jsonl"] == expected
    assert sum(calls) == whole == 2 * len(CITIES)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_answers_of_another_seed_are_not_used(make: Make, calls: Calls):
    (expected,) = make(**{"sampling.seed": 2}).values()
    calls.clear()
    calls.last = 3
    with pytest.raises(KeyboardInterrupt):
        make(**{"sampling.seed": 1})
    calls.last = 1000
    assert make(**{"sampling.seed": 2})["pairs.jsonl"] == expected


def test_each_split_is_a_file_and_no_item_is_in_two(make: Make):
    found = make(splits={"train": 12, "test": 5})
    assert {name: len(rows) for name, rows in found.items()} == {"pairs-train.jsonl": 12, "pairs-test.jsonl": 5}
    items = [row["meta"]["item"] for rows in found.values() for row in rows]
    assert len(set(items)) == 17


def test_the_model_is_not_asked_for_more_than_the_splits_need(make: Make, calls: Calls):
    make(splits={"train": 5})
    assert sum(calls) < 2 * len(CITIES)


def test_where_items_run_out_the_first_split_is_smaller(make: Make, capsys: pytest.CaptureFixture[str]):
    (rows,) = make().values()
    found = make(splits={"train": 50, "test": 10})
    assert len(found["pairs-train.jsonl"]) == len(rows) - 10
    assert len(found["pairs-test.jsonl"]) == 10
    assert f"splits.train: only {len(rows) - 10} of 50 pairs" in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"only \d+ pairs were made, too few for all splits; dropped: .* cut_off.*; first: the"
    ):
        make(splits={"train": 1, "test": 59})


def test_splits_larger_than_the_list_are_refused_before_the_model_is_loaded(make: Make):
    with pytest.raises(DataError, match="it has 60 items, but the splits need 90 pairs"):
        make(splits={"train": 90}, **{"model.model_name_or_path": "./nowhere"})


def test_another_list_and_other_instructions_run_unchanged(make: Make, tmp_path: Path):
    ideas = write_rows(tmp_path / "ideas.jsonl", [{"id": n, "idea": f"{{examples}} {n}"} for n in range(20)] * 2)
    (rows,) = make(
        items={"path": str(ideas), "column": "idea"},
        instructions={"negative": "No to {item}! {examples}", "positive": "Yes to {item}! {examples}"},
    ).values()
    assert rows
    assert all("{examples}" in row["prompt"][0]["content"] for row in rows)


def test_a_model_without_a_chat_template_gets_and_gives_text(
    make: Make,
    spec: dict[str, Any],
    writer: Path,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
):
    spec["instructions"] = PLAIN
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(writer)
    (writer / "chat_template.jinja").unlink(missing_ok=True)
    (rows,) = make(examples=None).values()
    assert {type(row[name]) for row in rows for name in ("prompt", "chosen", "rejected")} == {str}
    assert read("trl-explicit", rows[0]).prompt.startswith("Describe city")
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"path": "demo:reviewer2", "column": "city"}, "no items"),
        ({"path": "cities.txt", "column": "city"}, "column has no effect"),
        ({"path": "rows.jsonl"}, "set items.column to one of"),
        ({"path": "empty.txt"}, "no items"),
        ({"path": "gone.txt"}, "cannot be read"),
    ],
)
def test_items_that_cannot_be_found_are_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: dict[str, str], message: str
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=message):
        make(items=items)


def test_the_command_prints_its_counts_and_refuses_what_would_do_nothing(
    spec: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe, output = tmp_path / "recipe.yaml", str(tmp_path / "pairs.jsonl")
    recipe.write_text(write_yaml(spec), encoding="utf-8")
    convert_data(str(recipe), output, "contrastive", overrides=["seed=5", "splits={train: 3}"], json_output=True)
    counts = json.loads(capsys.readouterr().out)
    assert counts["used"] == 3
    assert counts["files"] == {"train": str(tmp_path / "pairs-train.jsonl")}
    for changes in ({"split": "test"}, {"column_map": ["a=b"]}, {"output": "-"}):
        with pytest.raises(UsageError):
            convert_data(str(recipe), **{"output": output, "format": "contrastive", **changes})
    with pytest.raises(UsageError, match="--set"):
        convert_data("rows.jsonl", output, overrides=["seed=5"])


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
