"""A sharded run gives the numbers of one process, on any number of ranks, through kills and changes of their number."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fault_runs import Scene, outcome, rows_of
from forked import in_ranks
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_runs import merge, pair_rows, write_rows
from tiny_world import rated, save_adapter, save_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpoctl.errors import UsageError
from dpoctl.recipe import Recipe, parse_recipe
from dpoctl.tasks.footprint import states_of
from dpoctl.tasks.sharding import choose_sharding

Run = Callable[..., dict[str, Any]]
LORA: dict[str, Any] = {"lora": {"r": 4, "lora_alpha": 8}}
STEPS = {"training.max_steps": 20, "training.eval_steps": 10, "training.save_steps": 10}
SHARDED = {"training.sharding": "full", "training.max_tokens_per_device": 100}
TWO = ("--num-processes", "2")
COMPARED = ("loss", "grad_norm", "eval_loss")
# In the whole suite only.
RARE = {
    *("modules that are trained whole", "an adapter over an adapter", "an adapter that is continued"),
    *("tied embeddings", "a live reference", "recomputed layers", "some weights", "ranks and LoRA+"),
}
LONG = "in the whole suite only"
# Its weights of pairs nearly cancel, so that two roundings of one process differ as much.
COARSE = {"beta-dpo": 1e-5}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "4-bit LoRA": LORA | {"quantization": {"load_in_4bit": True}},
    "some weights": {"training.trainable": ["layers.1", "norm", "lm_head"]},
    "ranks and LoRA+": {
        "lora": {"r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True, "loraplus_lr_ratio": 4.0},
        "training.lr_scheduler_type": "inverse_sqrt",
    },
    "modules that are trained whole": {"lora": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "an adapter over an adapter": {"model.model_name_or_path": "adapter", "lora": {"r": 4, "start": "new"}},
    "an adapter that is continued": {"model.model_name_or_path": "adapter", "lora": {"start": "continue"}},
    "tied embeddings": {"model.model_name_or_path": "tied"},
    "sft": {"method": "sft"},
    "beta-dpo": {"dpo.loss": {"type": "beta_dpo"}},
    "kto": {"dpo.loss": {"type": "kto"}, "data.train": ["unpaired.jsonl"], "data.eval": ["unpaired.jsonl"]},
    "plackett-luce": {
        "dpo.loss": {"type": "plackett_luce"},
        "data.train": ["rated.jsonl"],
        "data.eval": ["rated.jsonl"],
    },
    "a live reference": {"dpo.reference": {"mode": "live"}},
    "a moving reference": {"dpo.reference": {"mode": "live", "sync_steps": 3, "sync_alpha": 0.6}},
    "another reference": {"dpo.reference": {"path": "other"}},
    "recomputed layers": {"training.gradient_checkpointing": True},
    "host memory": {"training.cpu_offload": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Models and data for all cases."""
    folder = tmp_path_factory.mktemp("sharding")
    save_llama(folder / "tiny", tokenizer)
    save_llama(folder / "other", tokenizer, seed=3)
    save_llama(folder / "tied", tokenizer, tie_word_embeddings=True)
    save_llama(folder / "wide", tokenizer, hidden_size=128)
    save_adapter(folder / "adapter", folder / "tiny")
    rows = pair_rows(23)
    write_rows(folder / "pairs.jsonl", rows)
    # On two ranks and more, one of them has no row of the last batch.
    write_rows(folder / "heldout.jsonl", pair_rows(1, seed=1))
    write_rows(folder / "rated.jsonl", [rated(row, number + 1) for number, row in enumerate(rows)])
    sides = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    write_rows(folder / "unpaired.jsonl", sides)
    return folder


@pytest.fixture
def scene(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.chdir(world)
    recipe = {
        "method": "dpo",
        "model": {"model_name_or_path": "tiny", "dtype": "float32"},
        "data": {"train": ["pairs.jsonl"], "eval": ["heldout.jsonl"], "max_length": 128},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "global_batch_size": 5,
            "learning_rate": 5e-4,
            "logging_steps": 1,
            "eval_steps": 10,
            "seed": 1,
        },
    }
    return Scene(tmp_path, merge(recipe, STEPS))


def finished(scene: Scene, name: str, *options: str) -> Path:
    """Run a scene to its end, and return the run directory."""
    ended = scene.run(scene.folder / name, *options)
    assert ended.code == 0, ended.err[-3000:]
    return scene.folder / name


def assert_same(one: Path, other: Path, *, coarse: float = 1e-6, since: int = 0) -> None:
    """Compare the losses and gradient norms of two runs, from a step on."""
    first, second = ([row for row in rows_of(run) if row["step"] > since] for run in (one, other))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for row, same in zip(first, second, strict=True):
        for name in set(COMPARED) & row.keys():
            assert row[name] == pytest.approx(same[name], rel=1e-5, abs=coarse), (row["step"], name)


@pytest.mark.long("LoRA", "another reference", "host memory", "kto", "plackett-luce")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_a_model_give_the_numbers_of_one_process(case: str, scene: Scene, whole: bool) -> None:
    if case in RARE and not whole:
        pytest.skip(LONG)
    scene = scene.changed(CASES[case])
    alone = finished(scene.changed({"training.cpu_offload": False}), "alone")
    assert_same(alone, finished(scene.changed(SHARDED), "sharded", *TWO), coarse=COARSE.get(case, 1e-6))


@pytest.mark.long("full-1")
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("case", ["full", "4-bit LoRA"])
def test_four_ranks_give_them_too_with_replicas_and_without(
    case: str, replicas: int, scene: Scene, whole: bool
) -> None:
    if (case, replicas) not in {("full", 1), ("4-bit LoRA", 2)} and not whole:
        pytest.skip(LONG)
    scene = scene.changed(CASES[case])
    sharded = scene.changed(SHARDED | {"training.replicas": replicas})
    run = finished(sharded, "four", "--num-processes", "4")
    assert_same(finished(scene, "alone"), run)
    manifest = json.loads((run / "checkpoints" / "step-000020" / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["shards"]) == (4, 4 // replicas)


def interrupted(run: Path, name: str) -> Path:
    """A copy of a run as it stood after its checkpoint in the middle."""
    copy = run.with_name(name)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step-000020"))
    return copy


@pytest.mark.long("2-1")
@pytest.mark.parametrize(("before", "now"), [(2, 1), (2, 3), (4, 2), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, now: int, scene: Scene, whole: bool) -> None:
    if (before, now) not in {(2, 1), (4, 2)} and not whole:
        pytest.skip(LONG)
    # A filter of beta-DPO's kind, dropout or random draws would differ: the maths of this run has none.
    scene = scene.changed(SHARDED | {"training.lr_scheduler_type": "constant"})
    complete = finished(scene, "whole", "--num-processes", str(before))
    again = interrupted(complete, "again")
    ended = scene.finish(again, "--num-processes", str(now))
    assert "resumed from step 10" in ended.err
    assert_same(complete, again, since=10)
    weights, resumed = (load_file(run / "model.safetensors") for run in (complete, again))
    for name, tensor in weights.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["full", "a moving reference"])
def test_the_same_number_of_ranks_resumes_to_the_same_bits(case: str, scene: Scene, whole: bool) -> None:
    if case == "full" and not whole:
        pytest.skip(LONG)
    scene = scene.changed(SHARDED | CASES[case])
    complete = finished(scene, "whole", *TWO)
    again = interrupted(complete, "again")
    scene.finish(again, *TWO)
    assert outcome(again) == outcome(complete)


def test_a_damaged_part_is_found_and_the_older_checkpoint_is_used(scene: Scene) -> None:
    scene = scene.changed(SHARDED)
    complete = finished(scene, "whole", *TWO)
    again = complete.with_name("again")
    shutil.copytree(complete, again)
    part = again / "checkpoints" / "step-000020" / "weights-shard-1.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ended = scene.finish(again, *TWO)
    assert "step-000020 (weights-shard-1.safetensors has a wrong checksum); using step-000010 instead" in ended.err
    assert outcome(again) == outcome(complete)


def test_the_state_of_an_optimizer_of_8_bits_is_not_divided_anew(scene: Scene) -> None:
    # bitsandbytes keeps the moments of small tensors in 32 bits.
    scene = scene.changed(SHARDED | {"training.optim": "adamw_8bit", "model.model_name_or_path": "wide"})
    scene = scene.changed({"training.max_steps": 2, "training.save_steps": 1})
    run = finished(scene, "run", *TWO)
    shutil.rmtree(run / "checkpoints" / "step-000002")
    ended = scene.run(run, "--resume")
    assert ended.code == 1
    assert "the state of an 8-bit optimizer cannot be divided anew" in ended.last


@pytest.mark.long("full-AutoModelForCausalLM")
@pytest.mark.parametrize(("case", "loader"), [("full", AutoModelForCausalLM), ("LoRA", AutoPeftModelForCausalLM)])
def test_the_model_loads_without_dpoctl(case: str, loader: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene.changed(CASES[case])
    runs = [finished(scene, "alone"), finished(scene.changed(SHARDED), "sharded", *TWO)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (loader.from_pretrained(run)(input_ids=ids).logits.log_softmax(-1) for run in runs)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def counting(folder: Path) -> Any:
    """Write down how many numbers this rank holds of weights, gradients and moments, after the last step."""

    def install() -> None:
        from dpoctl.model.sharding import Gradients
        from dpoctl.tasks.recorder import Recorder

        sizes: dict[str, int] = {}
        clip, save = Gradients.clip, Recorder.save

        def clipped(self: Any, bound: float) -> Any:
            norm = clip(self, bound)
            sizes["gradients"] = sum(own.grad.numel() for _, own in self.parts() if own.grad is not None)
            return norm

        def saved(self: Any, step: int, **options: Any) -> None:
            save(self, step, **options)
            sizes["weights"] = sum(tensor.numel() for tensor in self._policy.trainable_state().values())
            states = self._stepper.optimizer.optimizer.state.values()
            sizes["moments"] = sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states) // 2
            (folder / f"rank-{self._accelerator.process_index}").write_text(json.dumps(sizes))

        Gradients.clip, Recorder.save = clipped, saved  # type: ignore[method-assign]

    return in_ranks(install)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_and_no_more(ranks: int, scene: Scene, whole: bool) -> None:
    if ranks > 2 and not whole:
        pytest.skip(LONG)
    scene = scene.changed(SHARDED | {"training.max_steps": 2})
    options = ("--num-processes", str(ranks))
    assert scene.run(scene.folder / "run", *options, faults=[counting(scene.folder)]).code == 0
    size = sum(tensor.numel() for tensor in load_file(scene.folder / "run" / "model.safetensors").values())
    for rank in range(ranks):
        sizes = json.loads((scene.folder / f"rank-{rank}").read_text())
        assert set(sizes) == {"weights", "gradients", "moments"}
        for held in sizes.values():
            assert 0 < held <= size * (1 / ranks + 0.1)


def test_in_bfloat16_the_reference_comes_from_the_gathered_weights(scene: Scene) -> None:
    scene = scene.changed({"model.dtype": "bfloat16", "training.max_steps": 1, "training.eval_steps": 1})
    # Its cached numbers are those of float32 norms, which the sharded run must not take.
    finished(scene, "alone")
    first = rows_of(finished(scene.changed(SHARDED), "sharded", *TWO))
    margins = [row["rewards/margins"] for row in first if row["step"] == 1 and "rewards/margins" in row]
    assert margins == [0.0]


def test_gradients_are_divided_after_every_micro_batch(scene: Scene) -> None:
    def look(folder: Path) -> None:
        from dpoctl.core.objective import Objective

        backward = Objective._backward_share

        def shared(self: Any, share: Any) -> None:
            backward(self, share)
            kinds = {type(p.grad).__name__ for p in self.scorer.parameters()}
            with (folder / f"rank-{self.accelerator.process_index}").open("a") as file:
                file.write(f"{' '.join(sorted(kinds))}\n")

        Objective._backward_share = shared  # type: ignore[method-assign]

    scene = scene.changed(SHARDED | {"training.max_steps": 2})
    faults = [in_ranks(lambda: look(scene.folder))]
    assert scene.run(scene.folder / "run", *TWO, faults=faults).code == 0
    for rank in range(2):
        seen = (scene.folder / f"rank-{rank}").read_text().splitlines()
        assert len(seen) > 2
        assert set(seen) == {"DTensor"}


def test_a_model_that_does_not_fit_is_shared(scene: Scene) -> None:
    from dpoctl.tasks import sharding

    def little_memory() -> None:
        sharding.free_bytes = lambda device: 2e6  # type: ignore[assignment]

    scene = scene.changed({"training.sharding": "auto", "training.max_steps": 2})
    ended = scene.run(scene.folder / "run", *TWO, faults=[in_ranks(little_memory)])
    assert ended.code == 0
    assert "free for each process: divided over 2 processes" in ended.err
    assert (scene.folder / "run" / "checkpoints" / "step-000002" / "weights-shard-1.safetensors").exists()


LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("changes", "gigabytes"),
    [
        # 8.03 B parameters: weights 4, gradients 4, moments 8, and 2 for their copies in bfloat16.
        ({}, 8.030 * 18),
        ({"training.param_dtype": "bfloat16", "training.optim": "adamw_8bit"}, 8.030 * 6),
        ({"model.dtype": "float32"}, 8.030 * 16),
    ],
)
def test_the_bytes_of_a_model_of_8b_parameters(
    changes: dict[str, Any], gigabytes: float, scene: Scene, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = {"from_scratch": {"config": LLAMA_8B, "tokenizer": {"vocab_size": 1024}}, "dtype": "bfloat16"}
    recipe = parse(scene.recipe | {"model": model}, changes)
    dtype = torch.float32 if changes.get("model.dtype") == "float32" else torch.bfloat16
    needed = sum(states_of(recipe, tokenizer, dtype).values())
    assert needed / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def parse(recipe: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    return parse_recipe(yaml.safe_dump(merge(recipe, changes)), "recipe.yaml", command=recipe["method"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dtype": "float16"}, "a sharded model cannot compute in float16"),
        (LORA | {"quantization": {"load_in_8bit": True}}, "a model of 8 bits cannot be sharded"),
        ({"training.replicas": 3}, "training.replicas is 3, which does not divide 4 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    changes: dict[str, Any], message: str, scene: Scene, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = parse(scene.recipe, {"training.sharding": "full"} | changes)
    four: Any = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=message):
        choose_sharding(recipe, four, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.optim": "muon"}, "training.optim: muon needs whole matrices"),
        ({"lora": {"use_dora": True}}, "lora.use_dora needs whole weight matrices"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights needs whole weight matrices"),
        ({"method": "sft", "sft": {"router_aux_loss_coef": 0.1}}, "sft.router_aux_loss_coef has not been tried"),
    ],
)
def test_what_needs_whole_matrices_is_refused_also_if_a_launcher_asks(
    changes: dict[str, Any],
    message: str,
    scene: Scene,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = parse(scene.recipe | {"method": changes.get("method", "dpo")}, changes)
    four: Any = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=message):
        choose_sharding(recipe, four, tokenizer)


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({"training.sharding": "full"}, 1, "training.sharding: full has no effect"),
        ({"training.cpu_offload": True}, 2, "training.cpu_offload has no effect"),
        ({"training.replicas": 2}, 2, "training.replicas has no effect"),
    ],
)
def test_a_key_without_effect_is_named(
    changes: dict[str, Any],
    ranks: int,
    said: str,
    scene: Scene,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few: Any = SimpleNamespace(num_processes=ranks, device=torch.device("cpu"), gather=lambda tensor: tensor)
    assert choose_sharding(parse(scene.recipe, changes), few, tokenizer) is None
    assert f"note: {said}" in capsys.readouterr().err


def test_samples_are_those_of_one_process(scene: Scene) -> None:
    # Three prompts on two ranks, of which one therefore draws a text less.
    prompts = {"prompts": ["why?", "hello, world", "the capital of France?"], "max_new_tokens": 6}
    scene = scene.changed({"eval.samples": prompts, "training.max_steps": 10})
    runs = [finished(scene, "alone"), finished(scene.changed(SHARDED), "sharded", *TWO)]
    one, other = ({file.name: file.read_text() for file in (run / "samples").glob("step-*.jsonl")} for run in runs)
    assert one == other
    assert len(one) > 1
