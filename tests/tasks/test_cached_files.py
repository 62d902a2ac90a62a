"""Files that earlier runs left in the cache: verified before they are used, and made anew where they are damaged."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_runs import merge, write_recipe, write_rows

from dpoctl import console
from dpoctl.data import cache as cache_module
from dpoctl.data.cache import Cache, cache_dir
from dpoctl.errors import SetupError
from dpoctl.recipe import parse_recipe
from dpoctl.tasks import inspect, reference_cache
from dpoctl.tasks.reference import Reference
from dpoctl.tasks.reference_cache import ReferenceCache

Run = Callable[..., dict[str, Any]]
FLOAT32 = {"model.dtype": "float32"}
SMALL = FLOAT32 | {"training.max_tokens_per_device": 60}
"""Token budgets that make many groups of a few records."""


def weights(recipe: dict[str, Any]) -> bytes:
    return (Path(recipe["training"]["output_dir"]) / "model.safetensors").read_bytes()


def unpaired(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"question {number % 5}:", "completion": f" {'yes' if number % 2 else 'no'} {number}"}
        for number in range(count)
    ]
    return write_rows(path, [row | {"label": bool(number % 2)} for number, row in enumerate(rows)])


@pytest.fixture
def recipes(dpo_recipe: dict[str, Any], sft_recipe: dict[str, Any], tmp_path: Path) -> dict[str, dict[str, Any]]:
    kto = {
        "data": {"train": [str(unpaired(tmp_path / "kto.jsonl", 12))], "eval": {}},
        "dpo": {"loss": {"type": "kto"}},
        "training": {"eval_steps": None},
    }
    return {
        "sft": merge(sft_recipe, FLOAT32),
        "dpo": merge(dpo_recipe, FLOAT32),
        "kto": merge(dpo_recipe, FLOAT32 | kto),
    }


def flip_a_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_flipped_bit_in_any_cached_file_is_told_and_changes_nothing(
    kind: str, recipes: dict[str, dict[str, Any]], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, rng = recipes[kind], random.Random(kind)
    clean = weights(train(recipe))
    stores = sorted((cache_dir() / "tokens").iterdir())
    shards = sorted((cache_dir() / "reference").glob("*.npy")) if kind != "sft" else []
    assert stores
    assert bool(shards) == (kind != "sft")
    for attempt in range(1):
        victims = [rng.choice([file for file in store.iterdir() if file.stat().st_size]) for store in stores]
        victims += [rng.choice(shards)] if shards else []
        for victim in victims:
            flip_a_bit(victim, rng)
        capfd.readouterr()
        again = train(recipe, {"training.output_dir": f"{recipe['training']['output_dir']}-{attempt}"})
        said = [line for line in capfd.readouterr().err.splitlines() if "warning: damaged" in line]
        assert [sum(str(victim) in line for line in said) for victim in victims] == [1] * len(victims)
        assert len(said) == len(victims)
        assert weights(again) == clean
    train(recipe, {"training.output_dir": recipe["training"]["output_dir"] + "-last"})
    assert "damaged" not in capfd.readouterr().err


@pytest.fixture
def shards(tmp_path: Path) -> ReferenceCache:
    kept = ReferenceCache(Cache(tmp_path / "cache"), "key", ("logps", "head_logps"))
    kept.add(np.arange(3, 8), np.arange(10, dtype=np.float32).reshape(2, 5))
    kept.flush()
    return kept


def test_every_bit_of_a_shard_counts(
    shards: ReferenceCache, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, known = shards.read(9)
    assert known.tolist() == [3 <= response < 8 for response in range(9)]
    assert table[:, 3:8].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert not shards.read(9)[1].any()
        assert not file.exists()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        assert not shards.read(9)[1].any()
    assert "damaged" in capfd.readouterr().err


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The records that a reference computes from now on."""
    seen: list[int] = []
    numbers_of = Reference._numbers_of

    def spy(self: Reference, reader: Any, plan: Any, records: Any) -> Any:
        seen.extend(map(int, records))
        return numbers_of(self, reader, plan, records)

    monkeypatch.setattr(Reference, "_numbers_of", spy)
    return seen


NO_EVAL: dict[str, Any] = {"data.eval": {}, "training.eval_steps": None}


@pytest.mark.parametrize(("steps", "records"), [(2, 10), (4, 20), (5, 23), (7, 23)])
def test_only_the_rows_of_the_schedule_are_computed_in_its_order(
    steps: int, records: int, dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = computed(monkeypatch)
    train(dpo_recipe, SMALL | NO_EVAL | {"training.max_steps": steps})
    assert len(seen) == len(set(seen)) == records
    assert seen == np.random.default_rng([1, 0]).permutation(23)[:records].tolist()


def test_a_longer_run_computes_what_a_shorter_one_has_not(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = dpo_recipe["training"]["output_dir"]
    seen = computed(monkeypatch)
    train(dpo_recipe, SMALL | NO_EVAL | {"training.max_steps": 2, "training.output_dir": f"{out}-short"})
    capfd.readouterr()
    train(dpo_recipe, SMALL | NO_EVAL)
    assert "computing log-probabilities of 13 records; 10 more are in the cache" in capfd.readouterr().err
    assert sorted(seen) == list(range(23))


@pytest.mark.long("loss1")
@pytest.mark.parametrize("loss", [{"type": "sigmoid"}, {"type": "ld_dpo"}])
def test_an_interrupted_pass_goes_on_and_the_run_has_the_same_bits(
    loss: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = merge(dpo_recipe, SMALL | {"dpo.loss": loss})
    with monkeypatch.context() as patch:
        patch.setenv("DPOCTL_CACHE", str(tmp_path / "other"))
        clean = weights(train(recipe, {"training.output_dir": str(tmp_path / "clean")}))
    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "SHARD_SECONDS", -1.0)
        seen = computed(patch)
        numbers_of = Reference._numbers_of

        def interrupted(self: Reference, *arguments: Any) -> Any:
            if len(seen) > 12:
                raise KeyboardInterrupt
            return numbers_of(self, *arguments)

        patch.setattr(Reference, "_numbers_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    before = len(seen)
    more = computed(monkeypatch)
    assert weights(train(recipe)) == clean
    assert 12 < before < 23
    assert len(more) == 23 + 7 - before
    kept = [np.load(file, allow_pickle=False).dtype.names for file in (cache_dir() / "reference").glob("*.npy")]
    assert len(kept) > 3
    assert set(kept) == {("response", "logps", "head_logps")[: 3 if loss["type"] == "ld_dpo" else 2]}


def test_work_without_a_terminal_says_how_far_it_is_and_how_long_it_takes(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    numbers_of = Reference._numbers_of

    def slow(self: Reference, *arguments: Any) -> Any:
        time.sleep(0.1)
        return numbers_of(self, *arguments)

    monkeypatch.setattr(Reference, "_numbers_of", slow)
    train(dpo_recipe, SMALL)
    said = capfd.readouterr().err
    assert "reference: 0 of 23 records\n" in said
    assert ", eta " in next(line for line in said.splitlines() if line.startswith("reference: ") and "eta" in line)


FAILURES = {
    "a file": (lambda path: path.write_text(""), "it is a file, or below one"),
    "below a file": (lambda path: path.parent.write_text(""), "it is a file, or below one"),
}


@pytest.mark.parametrize("command", [["dpo"], ["inspect"], ["dpo", "--dry-run"], ["check"]], ids=" ".join)
@pytest.mark.parametrize("what", FAILURES)
def test_a_cache_folder_that_cannot_be_one_is_refused_in_one_line(
    what: str,
    command: list[str],
    dpo_recipe: dict[str, Any],
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make, reason = FAILURES[what]
    folder = tmp_path / "above" / "cache"
    folder.parent.parent.mkdir(exist_ok=True)
    if what == "a file":
        folder.parent.mkdir()
    make(folder)
    monkeypatch.setenv("DPOCTL_CACHE", str(folder))
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe)
    code = main(command[0], recipe, *command[1:])
    captured = capfd.readouterr()
    said = captured.out + captured.err
    assert f"the cache folder {folder} cannot be written: {reason}; set DPOCTL_CACHE to another folder" in said
    assert "Traceback" not in said
    assert "Errno" not in said
    assert code == (0 if command == ["check"] else 5)


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    made = cache_module._made

    def refuse(path: Path) -> Path:
        if path.is_relative_to(folder):
            raise OSError(30, "Read-only file system", str(path))
        return made(path)

    monkeypatch.setattr(cache_module, "_made", refuse)


def test_beside_a_read_only_cache_a_run_keeps_its_own(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read_only(monkeypatch, cache_dir())
    out = Path(dpo_recipe["training"]["output_dir"])
    train(dpo_recipe, FLOAT32 | {"training.save_steps": 1})
    said = capfd.readouterr().err
    assert said.count(f"the cache folder {cache_dir()} cannot be written (Read-only file system): new files go to") == 1
    assert sorted(path.name for path in (out / "cache").iterdir()) == ["reference", "tokens"]
    train(dpo_recipe, FLOAT32 | {"training.save_steps": 1}, resume=True)
    said = capfd.readouterr().err
    assert "tokenizing" not in said
    assert "computing" not in said
    train(dpo_recipe, FLOAT32, overwrite=True)
    assert "tokenizing" not in capfd.readouterr().err


def test_a_read_only_cache_that_has_everything_is_used(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(dpo_recipe, FLOAT32)
    read_only(monkeypatch, cache_dir())
    capfd.readouterr()
    train(dpo_recipe, FLOAT32 | {"training.output_dir": dpo_recipe["training"]["output_dir"] + "-2"})
    inspect.run(parse_recipe(yaml.safe_dump(dpo_recipe), "recipe.yaml", command="dpo"))
    said = capfd.readouterr().err
    assert "cannot be written" not in said
    assert "tokenizing" not in said
    other = parse_recipe(yaml.safe_dump(merge(dpo_recipe, {"data.max_length": 100})), "recipe.yaml", command="dpo")
    with pytest.raises(SetupError, match=r"cannot be written: Read-only file system; set DPOCTL_CACHE"):
        inspect.run(other)


def test_a_full_cache_folder_is_told_with_its_room(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoctl.data.store import StoreWriter

    def full(self: StoreWriter, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(SetupError, match=r"No space left on device \([\d.]+ GB free\); free some space, or set DPOCTL"):
        train(dpo_recipe)
    assert not list((cache_dir() / "tokens").iterdir())


def test_a_pass_whose_numbers_cannot_be_kept_goes_on(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_cache, "write_atomically", full)
    train(dpo_recipe)
    assert capfd.readouterr().err.count("are not kept for later runs: the cache folder") == 2
    assert not list((cache_dir() / "reference").iterdir())


def test_old_temporary_files_of_a_shard_are_removed(shards: ReferenceCache, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "reference" / ".key.0.npy.0.tmp"
    left.write_text("")
    os.utime(left, (0, 0))
    shards.add(np.arange(1), np.zeros((2, 1), dtype=np.float32))
    shards.flush()
    assert not left.exists()


def test_a_model_that_is_computed_twice_has_the_bits_of_the_first(
    dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    first = train(dpo_recipe, SMALL)
    again = train(dpo_recipe, SMALL | {"training.output_dir": str(tmp_path / "again")})
    one, two = (load_file(Path(run["training"]["output_dir"]) / "model.safetensors") for run in (first, again))
    assert all(np.array_equal(one[name], two[name]) for name in one)
