"""What a run depends on and its checkpoints do not hold: another one is refused by name, or said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import metrics_of
from tiny_world import save_adapter, save_llama
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpoctl.errors import UsageError
from dpoctl.runs import checkpoint

Run = Callable[..., dict[str, Any]]
SHORT = {
    "data.eval": {},
    "training.eval_steps": None,
    "training.max_steps": 3,
    "training.save_steps": 2,
    "training.save_total_limit": None,
}
LORA = SHORT | {"lora": {"r": 2}}


@pytest.fixture
def world(tiny_llama_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "base": tiny_llama_folder,
        "adapter": save_adapter(tmp_path / "adapter", tiny_llama_folder),
        "reference": shutil.copytree(tiny_llama_folder, tmp_path / "reference"),
    }


def one_weight(folder: Path, name: str = "model.safetensors") -> None:
    """Change the last weight of the first tensor by a little."""
    tensors = load_file(folder / name)
    first = tensors[min(tensors)]
    first.view(-1)[-1] += 1e-3
    save_file(tensors, folder / name, metadata={"format": "pt"})


def setting(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["paper"])
    tokenizer.save_pretrained(folder)


def another_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", " <|im_end|>"))


def another_run(folder: Path) -> None:
    """The same recipe of another seed, trained anew."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    save_llama(folder, tokenizer, seed=7)


Case = tuple[dict[str, Any], Callable[[dict[str, Path]], None], str]
ADAPTER = SHORT | {"model.model_name_or_path": "adapter"}
CASES: dict[str, Case] = {
    "LoRA, one weight of the base": (LORA, lambda w: one_weight(w["base"]), "model"),
    "LoRA, the base trained anew": (LORA, lambda w: another_run(w["base"]), "model"),
    "LoRA SFT, one weight of the base": (LORA | {"method": "sft"}, lambda w: one_weight(w["base"]), "model"),
    "LoRA, a setting of the base": (LORA, lambda w: setting(w["base"] / "config.json", rms_norm_eps=1e-3), "model"),
    "LoRA over an adapter, its weights": (
        ADAPTER | {"lora": {"start": "new"}},
        lambda w: one_weight(w["adapter"], "adapter_model.safetensors"),
        "adapter",
    ),
    "LoRA over an adapter, its scale": (
        ADAPTER | {"lora": {"start": "continue"}},
        lambda w: setting(w["adapter"] / "adapter_config.json", lora_alpha=3),
        "adapter",
    ),
    "LoRA over an adapter, its base": (ADAPTER | {"lora": {"start": "new"}}, lambda w: one_weight(w["base"]), "model"),
    "LoRA, reference.path": (
        LORA | {"dpo.reference.path": "reference"},
        lambda w: one_weight(w["reference"]),
        "reference",
    ),
    "full, a live reference.path": (
        SHORT | {"dpo.reference": {"path": "reference", "mode": "live"}},
        lambda w: one_weight(w["reference"]),
        "reference",
    ),
    "full, a cached reference": (SHORT, lambda w: one_weight(w["base"]), "model"),
    "full, a live reference": (SHORT | {"dpo.reference.mode": "live"}, lambda w: one_weight(w["base"]), "model"),
    "full SFT, a setting of the model": (
        SHORT | {"method": "sft"},
        lambda w: setting(w["base"] / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        "model",
    ),
    "a token more": (SHORT, lambda w: another_token(w["base"]), "tokenizer"),
    "another end of a turn": (SHORT, lambda w: another_template(w["base"]), "chat_template"),
}


def placed(changes: dict[str, Any], world: dict[str, Path]) -> dict[str, Any]:
    """The changes with the folders in place of their names."""
    text = json.dumps(changes)
    for name, folder in world.items():
        text = text.replace(f'"{name}"', json.dumps(str(folder)))
    placed: dict[str, Any] = json.loads(text)
    # The key itself is no folder.
    return {key: value for key, value in placed.items() if key != "method"}


def back_to(run: Path, step: int = 2) -> None:
    """Leave a run as a kill after this step would have."""
    for entry in (*run.glob("checkpoints/step-*"), *run.glob("*.safetensors")):
        if entry.name != f"step-{step:06d}":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def rows(run: Path) -> list[Any]:
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


def files_of(run: Path) -> list[Any]:
    files = (path for path in run.rglob("*") if path.name != "run_status.json")
    return sorted((path, path.stat().st_mtime_ns) for path in files)


@pytest.mark.parametrize("what", CASES)
def test_a_changed_input_is_refused_by_its_name(
    what: str, dpo_recipe: dict[str, Any], world: dict[str, Path], train: Run
) -> None:
    changes, change, name = CASES[what]
    recipe, changes = dpo_recipe | {"method": changes.get("method", "dpo")}, placed(changes, world)
    run = Path(train(recipe, changes)["training"]["output_dir"])
    back_to(run)
    change(world)
    before = files_of(run)
    with pytest.raises(
        UsageError, match=rf"changed since the run started: {name} \([^)]*\); .*--allow-changed {name}$"
    ):
        train(recipe, changes, resume=True)
    assert files_of(run) == before


def test_a_changed_input_is_allowed_by_its_name_and_then_is_the_one_of_the_run(
    dpo_recipe: dict[str, Any], world: dict[str, Path], train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    whole = rows(run)
    back_to(run)
    train(dpo_recipe, LORA, resume=True)
    assert rows(run) == whole
    assert "changed since" not in capsys.readouterr().err
    back_to(run)
    another_run(world["base"])
    another_template(world["base"])
    with pytest.raises(UsageError, match=r"--allow-changed model --allow-changed chat_template$"):
        train(dpo_recipe, LORA, resume=True)
    with pytest.raises(UsageError, match=r"run started: chat_template \(another text\); "):
        train(dpo_recipe, LORA, resume=True, allow_changed=["model"])
    train(dpo_recipe, LORA, resume=True, allow_changed=["model", "chat_template"])
    assert rows(run) != whole
    back_to(run, 3)
    train(dpo_recipe, LORA, resume=True)


def test_weights_that_are_not_used_any_more_are_said_and_change_no_bit(
    dpo_recipe: dict[str, Any], world: dict[str, Path], train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """In full fine-tuning without a reference, or with one that moves, the checkpoint holds all weights."""
    moving = {"dpo.reference": {"mode": "live", "sync_steps": 1, "sync_alpha": 0.5}}
    for number, (method, more) in enumerate((("sft", {}), ("dpo", moving))):
        changes = SHORT | more | {"training.output_dir": f"{dpo_recipe['training']['output_dir']}-{number}"}
        recipe = dpo_recipe | {"method": method}
        run = Path(train(recipe, changes)["training"]["output_dir"])
        whole = rows(run), (run / "model.safetensors").read_bytes()
        back_to(run)
        one_weight(world["base"])
        train(recipe, changes, resume=True)
        assert f"note: {world['base']} has other weights now; the run goes on with its own" in capsys.readouterr().err
        assert (rows(run), (run / "model.safetensors").read_bytes()) == whole


def test_a_copy_of_the_same_files_elsewhere_is_the_same_model(
    dpo_recipe: dict[str, Any], world: dict[str, Path], train: Run, tmp_path: Path
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    whole = rows(run)
    back_to(run)
    world["base"].rename(tmp_path / "moved")
    moved = LORA | {"model.model_name_or_path": str(tmp_path / "moved")}
    train(dpo_recipe, moved, resume=True, allow_changed=["model.model_name_or_path"])
    assert rows(run) == whole


def resumed_with(run: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checkpoints of a run say that another machine wrote them."""
    load = checkpoint.load

    def loaded(*arguments: Any) -> Any:
        found = load(*arguments)
        found.extra["inputs"]["machine"] |= machine
        return found

    monkeypatch.setattr(checkpoint, "load", loaded)
    back_to(run)


def test_what_changes_only_bits_is_said_in_one_line(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, SHORT)["training"]["output_dir"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    other = {"threads": 2, "processes": 2, "torch": "1.0", "device": "cuda (bfloat16)"}
    resumed_with(run, other, monkeypatch)
    capsys.readouterr()
    train(dpo_recipe, SHORT, resume=True)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "changed since" in line)
    assert line.startswith("note: changed since the run started: device (cuda (bfloat16) -> cpu (float32)), ")
    assert "processes (2 -> 1), threads (2 -> 1), torch (1.0 -> " in line
    assert line.endswith(": the same mathematics, but not the same bits")


def test_the_number_of_threads_is_that_of_the_run_where_nobody_asks_for_another(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, SHORT)["training"]["output_dir"])
    whole = (run / "model.safetensors").read_bytes()
    back_to(run)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        train(dpo_recipe, SHORT, resume=True)
        assert torch.get_num_threads() == threads
        assert "changed since" not in capsys.readouterr().err
        # A machine with fewer cores than the run had threads.
        resumed_with(run, {"threads": 4096}, monkeypatch)
        train(dpo_recipe, SHORT, resume=True)
        assert f"threads (4096 -> {threads})" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    assert (run / "model.safetensors").read_bytes() == whole
