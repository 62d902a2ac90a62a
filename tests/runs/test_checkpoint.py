import dataclasses
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import flip, names, save, small, tree_equal
from torch import nn

from dpoctl.errors import RunError
from dpoctl.runs.checkpoint import (
    Checkpoint,
    capture_rng,
    find_damage,
    load,
    newest,
    read_manifest,
    recover,
    restore_rng,
    write_manifest,
)
from dpoctl.runs.serialization import read_tree, write_tree


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, centered=True)


def paged_adamw_32bit(parameters: Any) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=1e-2)
    return optimizer


def paged_adamw_8bit(parameters: Any) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-2)
    return optimizer


class Training:
    """A tiny net with dropout: its weights depend on the optimizer's state and on every random draw."""

    def __init__(self, build: Callable[..., torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 80), nn.Dropout(0.2), nn.Tanh(), nn.Linear(80, 4))
        self.optimizer = build(self.net.parameters())
        self.step = 0

    def run(self, until: int) -> None:
        while self.step < until:
            self.optimizer.zero_grad()
            self.net(torch.randn(6, 64)).square().mean().backward()
            self.optimizer.step()
            self.step += 1

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.step,
            self.net.state_dict(),
            self.optimizer.state_dict(),
            capture_rng(),
            {"budget": 512, "note": None},
        )

    def restore(self, saved: Checkpoint) -> None:
        self.step = saved.step
        self.net.load_state_dict(saved.weights)
        self.optimizer.load_state_dict(saved.optimizer)
        restore_rng(saved.rng)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("build", [adamw, rmsprop, paged_adamw_32bit, paged_adamw_8bit])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, build):
    straight = Training(build)
    straight.run(until=12)

    first = Training(build)
    first.run(until=5)
    save(tmp_path / "checkpoints", first.checkpoint())
    first.run(until=9)  # beyond the checkpoint, then lost

    torch.manual_seed(99)
    second = Training(build)
    second.restore(load(newest(tmp_path / "checkpoints")))
    assert second.step == 5
    second.run(until=12)

    for name, tensor in straight.net.state_dict().items():
        assert torch.equal(tensor, second.net.state_dict()[name]), name
    assert tree_equal(straight.optimizer.state_dict(), second.optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_8bit_states_keep_their_quantized_bytes(tmp_path):
    training = Training(paged_adamw_8bit)
    training.run(until=2)
    save(tmp_path, training.checkpoint())
    back = load(newest(tmp_path)).optimizer
    large = back["state"][0]["__bnb_optimizer_quant_state__"]
    assert large["state1"].dtype == torch.uint8  # 64 x 80 elements: beyond the 4,096 below which 32 bits are kept
    assert large["absmax1"].shape == (20,)
    assert back["state"][3]["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.float32
    assert tree_equal(training.optimizer.state_dict(), back)


def test_everything_in_a_checkpoint_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", small(7))
    assert path.name == "step-000007"
    back = load(path)
    assert (back.step, back.extra, back.rng, back.world_size) == (7, {"step was": 7}, small(7).rng, 1)
    assert tree_equal(back.weights, small(7).weights)
    assert tree_equal(back.optimizer, small(7).optimizer)
    assert (tmp_path / "LATEST").read_text() == "step-000007\n"
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_a_checkpoint_holds_no_leftover_and_its_manifest_lists_all_of_it(tmp_path):
    path = save(tmp_path / "checkpoints", small(1))
    assert set(read_manifest(path)["files"]) | {"manifest.json"} == set(names(path))


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, small(step), keep=2)
    assert names(tmp_path) == ["step-000030", "step-000040"]
    save(tmp_path, small(50), keep=1)
    assert names(tmp_path) == ["step-000050"]
    save(tmp_path, small(60), keep=None)
    assert names(tmp_path) == ["step-000050", "step-000060"]


def test_the_best_checkpoint_that_a_kept_one_names_is_kept_too(tmp_path):
    bests = {10: None, 20: 20, 30: 20, 40: 20, 50: 50, 60: 50, 70: 50}
    kept = {}
    for step, best in bests.items():
        save(tmp_path, dataclasses.replace(small(step), best=best), keep=2)
        kept[step] = [int(name.removeprefix("step-")) for name in names(tmp_path)]
    assert kept[40] == [20, 30, 40]
    # A run that has to go on from step 40 still has the best one that it knows.
    assert kept[50] == [20, 40, 50]
    assert kept[60] == [50, 60]
    assert kept[70] == [50, 60, 70]
    assert load(tmp_path / "step-000070").best == 50


def test_pruning_counts_good_checkpoints_only_and_leaves_strangers_alone(tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, small(10))
    save(checkpoints, small(20))
    (checkpoints / "step-009999").mkdir()
    (checkpoints / "step-abc").mkdir()
    (checkpoints / "step-000001").symlink_to(outside)
    (checkpoints / "step-000020" / "weights.safetensors").write_bytes(b"torn")
    save(checkpoints, small(30), keep=2)
    assert names(checkpoints) == [
        *("step-000001", "step-000010", "step-000020", "step-000030", "step-009999", "step-abc")
    ]
    save(checkpoints, small(40), keep=2)
    assert "step-000010" not in names(checkpoints)
    assert outside.is_dir()


def test_at_every_instant_of_pruning_a_good_checkpoint_is_there(tmp_path, monkeypatch):
    save(tmp_path, small(10), keep=1)
    seen: list[bool] = []
    for function in ("rename", "unlink", "rmdir", "fsync"):
        original = getattr(os, function)

        def watched(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            seen.append(any(find_damage(folder) is None for folder in tmp_path.glob("step-*")))
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, function, watched)
    save(tmp_path, small(20), keep=1)
    monkeypatch.undo()
    assert len(seen) > 10
    assert all(seen)
    assert names(tmp_path) == ["step-000020"]


def test_a_failing_deletion_only_warns(tmp_path, monkeypatch, capsys):
    save(tmp_path, small(10), keep=1)

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "not yours", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    save(tmp_path, small(20), keep=1)
    assert "cannot delete an old checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    assert newest(tmp_path).name == "step-000020"
    recover(tmp_path)
    assert names(tmp_path) == ["step-000020"]


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_flip_first(file: Path) -> None:
    flip(file, 0)


def damage_flip_middle(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def damage_flip_last(file: Path) -> None:
    flip(file, file.stat().st_size - 2)  # the very last byte of a JSON file is only a newline


DAMAGES = [damage_truncate, damage_empty, damage_flip_first, damage_flip_middle, damage_flip_last, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken_with_one_warning(tmp_path, damage, capsys):
    save(tmp_path, small(10))
    whole = save(tmp_path, small(20))
    spare = tmp_path.parent / f"{tmp_path.name}-spare"
    shutil.copytree(whole, spare)
    for file in names(whole):
        damage(whole / file)
        assert newest(tmp_path).name == "step-000010", file
        message = capsys.readouterr().err
        assert message.count("warning") == 1
        assert file in message
        assert "using step-000010 instead" in message
        shutil.rmtree(whole)
        shutil.copytree(spare, whole)
    assert newest(tmp_path) == whole
    assert capsys.readouterr().err == ""


def test_a_bit_flipped_anywhere_is_found(tmp_path):
    path = save(tmp_path, small(10))
    file = path / "weights.safetensors"
    for offset in range(0, file.stat().st_size, 7):
        flip(file, offset)
        assert find_damage(path) == "weights.safetensors has a wrong checksum"
        flip(file, offset)
    assert find_damage(path) is None


def test_when_all_are_damaged_the_run_stops_and_names_them(tmp_path):
    for step in (10, 20):
        flip(save(tmp_path, small(step)) / "optimizer.json", 3)
    with pytest.raises(RunError, match=r"step-000020 \(optimizer.json .*step-000010") as failure:
        newest(tmp_path)
    assert "--overwrite" in str(failure.value)


def test_without_any_checkpoint_there_is_no_newest(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    path = save(tmp_path / "checkpoints", small(10))
    content = read_manifest(path)
    (tmp_path / "outside").write_text("x")
    write_manifest(path, {**content, "files": {"../../outside": {"size": 1, "sha256": "0"}}})
    assert find_damage(path) == "../../outside is not a file of this checkpoint"


def test_a_checkpoint_of_a_newer_format_is_refused_by_that_name(tmp_path):
    path = save(tmp_path, small(10))
    write_manifest(path, {**read_manifest(path), "format": 3})
    assert find_damage(path) == "manifest.json has format 3, but this version reads format 2"


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_of_its_step(tmp_path):
    save(tmp_path, small(10))
    flip(save(tmp_path, small(20)) / "rng-rank-0.json", 0)
    save(tmp_path, small(20), keep=2)
    assert find_damage(tmp_path / "step-000020") is None
    assert names(tmp_path) == ["step-000010", "step-000020"]


def draw():
    return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)


def test_the_draws_after_a_restore_are_those_after_the_capture(tmp_path):
    np.random.normal()  # leaves a cached second value behind, and so does gauss
    random.gauss(0, 1)
    write_tree(tmp_path, "rng", capture_rng())
    expected = draw()
    draw()
    restore_rng(read_tree(tmp_path, "rng"))
    assert draw() == expected


def test_states_of_devices_that_are_gone_are_passed_over():
    state = {**capture_rng(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 99}
    if torch.cuda.device_count() == 0:
        restore_rng(state)
