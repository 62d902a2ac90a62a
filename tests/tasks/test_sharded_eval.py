"""`dpoctl eval` of a model that its ranks share gives the numbers of one process."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from forked import Ended, Fault, run
from tiny_runs import merge, pair_rows, write_rows
from tiny_world import save_adapter, save_llama
from transformers import PreTrainedTokenizerFast

from dpoctl.errors import UsageError
from dpoctl.model.sharding import Sharding, part
from dpoctl.recipe import parse_recipe
from dpoctl.tasks import sharding
from dpoctl.tasks.baselines import Baseline
from dpoctl.tasks.evaluate import run as evaluate
from dpoctl.tasks.sharding import choose_eval_sharding

Run = Callable[..., dict[str, Any]]
LORA: dict[str, Any] = {"lora": {"r": 4, "lora_alpha": 8}}
NUMBERS = ("loss", "loss_se", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "4-bit LoRA": LORA | {"quantization": {"load_in_4bit": True}},
    "an adapter over an adapter": {"model.model_name_or_path": "adapter", "lora": {"r": 4, "start": "new"}},
    "another reference": {"dpo.reference": {"path": "other"}},
    "sft": {"method": "sft"},
    "tied embeddings": {"model.model_name_or_path": "tied"},
    "host memory": {"training.cpu_offload": True},
    "a loss of whole steps": {"dpo.loss": {"type": "aot"}},
}


@pytest.fixture
def recipe(
    dpo_recipe: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Seven rows, a set of one row, and three prompts: on two ranks, one of them has a row and a text less."""
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "other", tokenizer, seed=3)
    save_llama(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    save_adapter(tmp_path / "adapter", dpo_recipe["model"]["model_name_or_path"])
    single = write_rows(tmp_path / "single.jsonl", pair_rows(1, seed=2))
    evals = {"eval": dpo_recipe["data"]["eval"], "single": [str(single)]}
    samples = {"prompts": ["why?", "hello, world", "the capital of France?"], "max_new_tokens": 6}
    training = dpo_recipe["training"] | {"max_steps": 3, "eval_steps": 3, "max_tokens_per_device": 100}
    return dpo_recipe | {
        "data": dpo_recipe["data"] | {"eval": evals},
        "training": training,
        "eval": {"samples": samples},
    }


@pytest.fixture
def alone(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def read(run: Path, **options: Any) -> dict[str, Any]:
        capfd.readouterr()
        evaluate(run, json_output=True, **options)
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    return read


@pytest.fixture
def shared(tmp_path: Path) -> Callable[..., Ended]:
    """Evaluate with two ranks, in forks, without what one process has computed."""

    def call(folder: Path | str, *options: str | Path, faults: tuple[Fault, ...] = ()) -> Ended:
        env = {"DPOCTL_CACHE": str(tmp_path / "fresh")}
        arguments = ("eval", folder, *options, "--num-processes", "2", "--json")
        return run(*arguments, files=tmp_path / "said", faults=faults, env=env)

    return call


def divide(folder: Path, before: str = "sharding: auto", after: str = "sharding: full") -> None:
    """Change the recipe of a finished run."""
    resolved = folder / "recipe.resolved.yaml"
    text = resolved.read_text()
    assert before in text
    resolved.write_text(text.replace(before, after))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in (name for name in NUMBERS if name in one):
        assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_a_model_measure_what_one_process_does(
    case: str, recipe: dict[str, Any], train: Run, alone: Any, shared: Callable[..., Ended]
) -> None:
    changes = {name: value for name, value in CASES[case].items() if name != "training.cpu_offload"}
    method = changes.pop("method", "dpo")
    folder = Path(train(recipe | {"method": method}, changes)["training"]["output_dir"])
    expected = alone(folder)
    divide(folder)
    if case == "host memory":
        divide(folder, "cpu_offload: false", "cpu_offload: true")
    ended = shared(folder)
    assert ended.code == 0, ended.err[-3000:]
    assert "sharding: the models are divided over 2 processes" in ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert_same(expected, found)
    assert_same(expected["sets"]["single"], found["sets"]["single"])
    assert found["samples"] == expected["samples"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-7)
    assert expected["kl"] > 0


def counting(folder: Path) -> Fault:
    """Write down the share of each divided model that a rank holds, and how many are held before it."""

    def install() -> None:
        divide, before = Sharding.divide, weakref.WeakSet[torch.nn.Module]()

        def counted(self: Sharding, module: torch.nn.Module) -> None:
            others = len(before)
            before.add(module)
            divide(self, module)
            whole = sum(parameter.numel() for parameter in module.parameters())
            held = sum(part(parameter).numel() for parameter in module.parameters())
            with (folder / f"rank-{torch.distributed.get_rank()}").open("a") as file:
                file.write(f"{others} {held / whole}\n")

        Sharding.divide = counted  # type: ignore[method-assign]

    return install


def little_memory() -> None:
    sharding.free_bytes = lambda device: 4e5  # type: ignore[assignment]


def test_a_model_that_does_not_fit_is_shared_also_by_a_rank_without_rows_and_texts(
    recipe: dict[str, Any], train: Run, alone: Any, shared: Callable[..., Ended], tmp_path: Path
) -> None:
    single = {"eval": {"samples": {"prompts": ["why?"], "max_new_tokens": 6}}, "data.eval": ["single.jsonl"]}
    folder = Path(train(recipe | {"eval": single.pop("eval")}, single)["training"]["output_dir"])
    expected = alone(folder)
    ended = shared(folder, faults=(counting(tmp_path), little_memory))
    assert ended.code == 0, ended.err[-3000:]
    assert "sharding: the models of this evaluation need" in ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert_same(expected, found)
    assert (found["num_pairs"], found["samples"]) == (1, expected["samples"])
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-7)
    for rank in range(2):
        lines = [line.split() for line in (tmp_path / f"rank-{rank}").read_text().splitlines()]
        # The model that gives the reference's log-probabilities, the policy, and beside it the reference that writes.
        assert [int(others) for others, _ in lines] == [0, 0, 1]
        assert all(0.4 < float(share) < 0.6 for _, share in lines)


@pytest.mark.long
@pytest.mark.parametrize("against", ["other", "adapter"])
@pytest.mark.parametrize("model", ["run", "tied", "adapter"])
def test_other_models_are_shared_too(
    model: str, against: str, recipe: dict[str, Any], train: Run, alone: Any, shared: Any, heldout: Path
) -> None:
    if model == "run":
        train(recipe, LORA)
    sampled = "eval.samples={num: 3, max_new_tokens: 6}"
    folder = Path(model)
    expected = alone(folder, data=str(heldout), baseline=Baseline.of(against, None), overrides=[sampled])
    ended = shared(folder, "--data", heldout, "--against", against, "--set", sampled, faults=(little_memory,))
    assert ended.code == 0, ended.err[-3000:]
    assert "divided over 2 processes" in ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert_same(expected, found)
    assert found["samples"] == expected["samples"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dtype": "float16"}, "a sharded model cannot compute in float16; evaluate it with one process"),
        (LORA | {"quantization": {"load_in_8bit": True}}, "a model of 8 bits cannot be sharded: .*; evaluate it with"),
        ({"lora": {"use_dora": True}}, "lora.use_dora needs whole weight matrices, .*; evaluate it with one process"),
    ],
)
def test_a_kind_of_model_that_cannot_be_shared_is_refused_by_name(
    changes: dict[str, Any],
    message: str,
    recipe: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(ranks: int, **more: Any) -> Sharding | None:
        text = yaml.safe_dump(merge(recipe, changes | {f"training.{name}": value for name, value in more.items()}))
        joined: Any = SimpleNamespace(num_processes=ranks, device=torch.device("cpu"))
        return choose_eval_sharding(parse_recipe(text, "recipe.yaml", command="dpo"), joined, tokenizer, models=1)

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=message):
        choose(2)
    assert choose(1) is None
    assert choose(2, sharding="none") is None


def test_benchmarks_are_refused_where_no_process_holds_the_model(
    tiny_llama_folder: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided = Sharding(torch.device("cpu"), 2)
    monkeypatch.setattr("dpoctl.tasks.evaluate.choose_eval_sharding", lambda *_, **__: divided)
    monkeypatch.setattr("dpoctl.tasks.evaluate.check_benchmarks", lambda *_, **__: None)
    with pytest.raises(UsageError, match=r"eval\.benchmarks: one process runs them, and it holds only a part"):
        evaluate(tiny_llama_folder, data=str(heldout), overrides=["eval.benchmarks=[arc_easy]"])
