"""Folders of models and of finished runs whose files are cut, edited or gone: one line, or the right weights."""

import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from fault_runs import Scene
from forked import Ended
from safetensors.torch import load_file, save_file
from tiny_runs import merge, write_recipe
from tiny_world import save_adapter, save_llama
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

MEMORY = 6 << 30
SECONDS = 30.0
OTHER_WEIGHTS = 71
VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 10**12, 1.5, 1e400, "", "abc", "auto", [], {}, [1], {"a": 1}, [[]]]
TEXTS = ["", "{", "[]", "null", "7", '"x"', "\x00", "[" * 100_000, '{"a": 1}', "{}"]
MODELS = ("llama", "sharded", "gpt2", "adapter")
Change = Callable[[Path, random.Random], None]


@pytest.fixture(scope="session")
def models(warm: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Four folders: a model in one file, one in several, one of another architecture, and an adapter."""
    folder = warm / "models"
    small = {"hidden_size": 32, "intermediate_size": 48}
    base = save_llama(folder / "llama", tokenizer, **small)
    save_adapter(folder / "adapter", base)
    tokenizer.save_pretrained(folder / "adapter")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder / "sharded", max_shard_size="60KB")
    tokenizer.save_pretrained(folder / "sharded")
    gpt2 = GPT2Config(vocab_size=384, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def runs(warm: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: all weights, and an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {"full": {}, "lora": {"lora": {"r": 2}}}.items():
        scene = Scene(folder, recipe_of(warm, models / "llama", changes))
        ended = scene.run(folder / name, DPOCTL_CACHE=str(folder / "cache"))
        assert ended.code == 0, ended.err
    return folder


def recipe_of(warm: Path, model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "method": "dpo",
        "model": {"model_name_or_path": str(model)},
        "data": {"train": [str(warm / "pairs.jsonl")], "eval": [str(warm / "heldout.jsonl")], "max_length": 128},
        "training": {
            "output_dir": "run",
            "global_batch_size": 5,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "eval_steps": 9,
        },
    }
    return merge(recipe, changes)


def edit_json(file: Path, rng: random.Random) -> None:
    """Set, add or remove a key, at any depth that is not the vocabulary."""
    content = json.loads(file.read_text())
    here = content
    while isinstance(here, dict) and here:
        key = rng.choice(sorted(here))
        if isinstance(here[key], dict) and here[key] and key != "vocab" and rng.random() < 0.6:
            here = here[key]
            continue
        if rng.random() < 0.25:
            del here[key]
        else:
            here[key] = rng.choice(VALUES)
        break
    file.write_text(json.dumps(content))


def other_text(file: Path, rng: random.Random) -> None:
    file.write_text(rng.choice(TEXTS))


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    # As often in the header as behind it.
    content[rng.randrange(min(len(content), rng.choice([8, 2000, len(content)])))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()


def bytes_more(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice([1, 8, 100])))


def other_tensors(file: Path, rng: random.Random) -> None:
    """Drop, add, rename, reshape or convert a tensor."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    kinds = [torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8, torch.bfloat16]
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name.replace(".0.", ".2.") + rng.choice(["", ".bias", "2"])] = tensors[name].clone()
        case 2:
            tensors[rng.choice([f"{name}x", f"model.{name}", name.partition(".")[2] or "x", name.upper()])] = (
                tensors.pop(name)
            )
        case 3:
            tensors[name] = tensors[name][: rng.randrange(len(tensors[name]))].contiguous()
        case 4:
            tensors[name] = tensors[name].to(rng.choice(kinds))
        case 5:
            tensors[name] = (
                tensors[name].T.contiguous() if tensors[name].ndim == 2 else tensors[name][None].contiguous()
            )
    save_file(tensors, file, metadata={"format": "pt"})


def other_bias(folder: Path, rng: random.Random) -> None:
    """Weights that the configuration does not know: biases of a model that has them no more, a layer more, a head."""
    (file, *_) = sorted(folder.glob("*model*.safetensors"))
    tensors = load_file(file)
    prefix = rng.choice(["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "score.weight"])
    save_file(tensors | {prefix: torch.ones(32)}, file, metadata={"format": "pt"})


def change_of(name: str, rng: random.Random) -> Change:
    changes: list[Change] = [cut, flip, remove, bytes_more]
    if name.endswith(".json"):
        changes += [edit_json] * 12 + [other_text] * 2
    if name.endswith(".safetensors"):
        changes += [other_tensors] * 8
    return rng.choice(changes)


def mutated(original: Path, copy: Path, rng: random.Random) -> str:
    """Copy a folder, change one of its files, and say which and how."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    files = sorted(file.name for file in copy.iterdir() if file.is_file() and file.stat().st_size)
    weighty = [name for name in files if name.endswith((".safetensors", "config.json", "index.json"))]
    name = rng.choice(files if rng.random() < 0.4 else weighty)
    if name.endswith(".safetensors") and rng.random() < 0.1 and "model" in name:
        other_bias(copy, rng)
        return f"{original.name}: a weight more"
    change = change_of(name, rng)
    change(copy / name, rng)
    return f"{original.name}/{name}: {change.__name__}"


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def compared(folder: Path) -> Callable[[], None]:
    """A fault that ends the process where the model that was loaded is not what its files hold."""

    def install() -> None:
        from dpoctl.tasks import train as task

        load = task.load_policy

        def loaded(*arguments: Any, **options: Any) -> Any:
            policy = load(*arguments, **options)
            state = {
                name.replace(".base_layer", "").replace(".reference", ""): tensor
                for name, tensor in policy.causal.state_dict().items()
                if ".default" not in name
            }
            prefix = f"{policy.causal.base_model_prefix}."
            held: dict[str, Any] = {}
            for file in folder.glob("*.safetensors"):
                held |= {
                    place_of(name.removeprefix("base_model.model."), prefix, state): tensor
                    for name, tensor in load_file(file).items()
                }
            wrong = [
                name for name, t in held.items() if name not in state or not torch.equal(state[name], t.to(state[name]))
            ]
            if (folder / "config.json").is_file():
                wrong += [name for name in state if "lora_" not in name and name not in held and "lm_head" not in name]
            else:
                wrong += [name for name in state if "lora_" in name and name not in held]
            if wrong:
                sys.stderr.write(f"error: other weights: {wrong[:3]}\n")
                sys.stderr.flush()
                os._exit(OTHER_WEIGHTS)
            return policy

        task.load_policy = loaded

    return install


def place_of(name: str, prefix: str, state: dict[str, Any]) -> str:
    """The name in the model; transformers takes a prefix too many or too few for the same weight."""
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), name)


def problem_of(ended: Ended) -> str | None:
    """What is wrong with the end of a command, if anything is."""
    if ended.code == 0:
        return None
    if ended.code == 1 and " is not finite" in ended.last:
        return None  # what a flipped bit of a weight that nothing vouches for may come to
    if ended.code not in (2, 3, 5):
        return f"exit code {ended.code}: {ended.last[:300]}"
    if "Traceback" in ended.err or not ended.last.startswith("error: ") or ended.err.count("error: ") > 1:
        return f"not one line: {ended.err[-300:]}"
    return None


def played(count: int, one: Callable[[int], tuple[str, str | None]], tally: Any, title: str) -> None:
    failures = []
    for number in range(count):
        what, problem = one(number)
        tally(title, problem is None)
        if problem is not None:
            failures.append(f"{number}: {what}: {problem}")
    assert not failures, "\n".join([f"{len(failures)} of {count}", *failures])


def test_a_folder_of_a_model_whatever_is_wrong_with_it(
    warm: Path, models: Path, whole: bool, tally: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "model"

    def one(number: int) -> tuple[str, str | None]:
        rng = random.Random(number)
        name = MODELS[number % len(MODELS)]
        what = mutated(models / name, copy, rng)
        lora = {"start": rng.choice(["new", "continue"])} if name == "adapter" else {"r": 2}
        changes = {"lora": lora} if name == "adapter" or rng.random() < 0.5 else {}
        scene = Scene(tmp_path, recipe_of(warm, copy, changes))
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            ended = scene.start(out, faults=[limited, compared(copy)], DPOCTL_CACHE=str(warm / "cache")).wait(SECONDS)
        except AssertionError as hung:
            return what, str(hung)[:300]
        return what, problem_of(ended)

    played(1_000 if whole else 16, one, tally, "a folder of a model is damaged or edited")


def test_a_folder_of_a_finished_run_whatever_is_wrong_with_it(
    warm: Path, runs: Path, whole: bool, tally: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "run"

    def one(number: int) -> tuple[str, str | None]:
        rng = random.Random(number)
        name = ("full", "lora")[number % 2]
        what = mutated(runs / name, copy, rng)
        recipe = write_recipe(
            tmp_path / "next.yaml", recipe_of(warm, copy, {"lora": {"start": "continue"}} if name == "lora" else {})
        )
        commands: list[list[str | Path]] = [
            ["eval", copy],
            ["chat", copy, "--prompt", "hello?", "--max-new-tokens", "2"],
            ["merge", copy]
            if name == "lora"
            else ["chat", copy, "--reference", "--prompt", "hello?", "--max-new-tokens", "2"],
            ["dpo", recipe, "--output-dir", tmp_path / "out"],
            ["dpo", runs / f"{name}.yaml", "--output-dir", copy, "--resume"],
        ]
        command = commands[number // 2 % len(commands)]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        files = tmp_path / f"said-{number}"
        child = forked.start(*command, files=files, faults=[limited], env={"DPOCTL_CACHE": str(runs / "cache")})
        try:
            ended = child.wait(SECONDS)
        except AssertionError as hung:
            return what, str(hung)[:300]
        what = f"{command[0]}{' --resume' * ('--resume' in command)} {what}"
        # A resume writes the model again.
        if ended.code == 0 and "--resume" not in command and (problem := accepted(runs / name, copy, ended.err)):
            return what, problem
        return what, problem_of(ended)

    played(1_000 if whole else 20, one, tally, "a folder of a finished run is damaged or edited")


def accepted(original: Path, copy: Path, said: str) -> str | None:
    """What was accepted in silence, if anything was."""
    manifest = json.loads((original / "model_manifest.json").read_text())
    for name in manifest["files"]:
        before, now = original / name, copy / name
        if now.is_file() and now.read_bytes() == before.read_bytes():
            continue
        if name.endswith(".safetensors"):
            return f"other weights are accepted: {name}"
        if "changed since the model was exported" not in said and (copy / "model_manifest.json").is_file():
            return f"{name} has changed, and nothing is said"
    return None
