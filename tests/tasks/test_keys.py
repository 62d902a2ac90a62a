"""No key is ignored: each is changed once, and something that it promises must change with it."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin
from unittest.mock import MagicMock

import datasets
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, constants
from key_cases import BENCHMARK_KEYS, CASES, GATE_CASES, JUDGE_CASES, REPORT, SOURCE_CASES, Outcome
from loss_samples import random_scores
from pydantic import BaseModel
from scripted_server import scripted, steady
from tiny_runs import merge, pair_rows
from tiny_world import build_world
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from dpoctl.core.logps import Scorer
from dpoctl.data.cache import cache_dir
from dpoctl.errors import UserError
from dpoctl.losses import LOSSES
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.eval_sections import GateSection
from dpoctl.recipe.judge_section import JudgeSection
from dpoctl.recipe.key_errors import hints, unwrap
from dpoctl.recipe.schema import Recipe
from dpoctl.runs import trackers
from dpoctl.runs.gates import check_gates
from dpoctl.tasks import judging
from dpoctl.tasks import train as training
from dpoctl.tasks.judging import build_judge
from dpoctl.tasks.served import Endpoint
from dpoctl.tasks.sharding import choose_sharding
from dpoctl.tasks.task import build_terms

Run = Callable[..., dict[str, Any]]

BASE: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "{tiny}"},
    "data": {"train": ["{pairs.jsonl}"], "eval": ["{heldout.jsonl}"], "max_length": 128},
    "training": {"global_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1, "eval_steps": 2, "seed": 1},
}


Watch = Callable[[dict[str, Any], dict[str, Any]], Outcome]


def leaves(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of a section that holds no further section, dotted."""
    for name in model.model_fields:
        inner = section_in(hints(model)[name])
        if inner is not None:
            yield from leaves(inner, f"{above}{name}.")
        else:
            yield above + name


def section_in(hint: Any) -> type[BaseModel] | None:
    """The section that a type is, or holds as a list's or a mapping's items."""
    kind, _ = unwrap(hint)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return section_in(get_args(kind)[-1]) if get_origin(kind) in (list, dict) else None


def test_the_table_has_every_key_of_the_schema_and_no_other() -> None:
    of_sources = {f"data.{where}.{key}" for where in ("train", "eval") for key in SOURCE_CASES}
    of_sources |= {f"eval.gates.{key}" for key in GATE_CASES} | {f"eval.benchmarks.{key}" for key in BENCHMARK_KEYS}
    of_sources |= {f"eval.judge.{key}" for key in JUDGE_CASES}
    keys = set(leaves(Recipe))
    assert keys - CASES.keys() - of_sources == set(), "a key without a case: say here what it changes"
    assert CASES.keys() | of_sources == keys


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    return build_world(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, world: dict[str, str], train: Run, tmp_path: Path) -> Watch:
    """Train a recipe of two steps, with changes that give a key its meaning and a change of that key."""

    def run(given: dict[str, Any], change: dict[str, Any]) -> Outcome:
        seen = Outcome(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        recipe = merge(placed(merge(BASE, {"training.output_dir": str(seen.folder)}), world), placed(given, world))
        with monkeypatch.context() as patch:
            spy(patch, seen, world)
            try:
                recipe = train(recipe, placed(change, world))
            except UserError as error:
                seen.refused = error.message
            except OnlyData:
                return seen
            seen.references = len(list((cache_dir() / "reference").glob("*.npy")))
        seen.folder = Path(recipe["training"]["output_dir"])
        return seen

    return run


def spy(patch: pytest.MonkeyPatch, seen: Outcome, world: dict[str, str]) -> None:
    """Note what reaches the libraries; the hub's data set and wandb's tracker are stand-ins."""
    rows = datasets.Dataset.from_list(pair_rows(6))

    def remember(name: str, call: Callable[..., Any]) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            seen.asked.setdefault(name, []).append({**options, "arguments": arguments})
            return call(*arguments, **options)

        return staticmethod(wrapped)

    def of_two_processes(recipe: Recipe, accelerator: Accelerator, *arguments: Any, **options: Any) -> None:
        two: Any = SimpleNamespace(
            num_processes=2, is_main_process=True, device=accelerator.device, gather=lambda tensor: tensor
        )
        seen.asked.setdefault("sharding", []).append(choose_sharding(recipe, two, *arguments, **options))

    def count(name: str, kind: type) -> None:
        forward = kind.forward  # type: ignore[attr-defined]

        def counted(self: Any, *arguments: Any, **options: Any) -> Any:
            seen.forwards[name] += self.training and torch.is_grad_enabled()
            return forward(self, *arguments, **options)

        patch.setattr(kind, "forward", counted)

    patch.setenv("DPOCTL_CACHE", f"{seen.folder}-cache")
    patch.setattr(constants, "HF_HUB_CACHE", world["hub"])
    patch.setattr(AutoModelForCausalLM, "from_pretrained", remember("model", AutoModelForCausalLM.from_pretrained))
    patch.setattr(datasets, "load_dataset", remember("dataset", lambda *_, **__: rows))
    patch.setattr(trackers, "installed_version", lambda _: "1")
    patch.setitem(trackers.TRACKERS, "wandb", remember("wandb", lambda _: MagicMock()))
    patch.setattr(training, "compile_layers", remember("compile", lambda _: None))
    patch.setattr(training, "choose_sharding", of_two_processes)
    patch.setattr(training, "set_rank_timeout", remember("timeout", training.set_rank_timeout))
    patch.setenv("HF_TOKEN", "some-token")
    patch.setattr(HfApi, "create_repo", remember("repository", lambda *_, **__: None))
    patch.setattr(HfApi, "upload_folder", remember("upload", lambda *_, **__: "https://hub"))
    count("scorer", Scorer)
    count("mlp", LlamaMLP)


def placed(value: Any, world: dict[str, str]) -> Any:
    """Put the world's paths into the texts of nested data."""
    if isinstance(value, dict):
        return {key: placed(item, world) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, world) for item in value]
    for name, path in world.items():
        value = value.replace(f"{{{name}}}", path) if isinstance(value, str) else value
    return value


BASELINES: dict[str, Outcome] = {}


def before_and_after(watch: Watch, given: dict[str, Any], change: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """The run without the change, which several keys share, and the run with it."""
    context = json.dumps(given, sort_keys=True)
    if context not in BASELINES:
        BASELINES[context] = watch(given, {})
    assert BASELINES[context].refused is None
    return BASELINES[context], watch(given, change)


@pytest.mark.parametrize("key", CASES)
def test_a_changed_key_changes_what_it_promises(key: str, watch: Watch) -> None:
    case = CASES[key]
    before, after = before_and_after(watch, case.given, {key: case.value})
    sees = attrgetter(case.sees) if isinstance(case.sees, str) else case.sees
    assert (after.refused is None) == (case.sees != "refused"), after.refused
    assert sees(before) != sees(after)


class OnlyData(Exception):
    """The end of a run whose data are prepared."""


def end_after_data(*_: Any, **__: Any) -> None:
    raise OnlyData


SEEN_IN_TRAINING = ("prompt_truncation",)
"""Keys of sources whose effect no count of the data shows."""


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("key", SOURCE_CASES)
def test_a_changed_key_of_a_source_changes_what_it_promises(
    key: str, where: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key not in SEEN_IN_TRAINING:
        monkeypatch.setattr(training, "_train", end_after_data)
    value, given, sees = SOURCE_CASES[key]
    source = {"path": "{pairs.jsonl}"} | given

    def data(source: dict[str, Any]) -> dict[str, Any]:
        return {"data.train": [source]} if where == "train" else {"data.eval": {"eval": [source]}}

    before, after = watch(data(source), {}), watch(data(source | {key: value}), {})
    assert before.refused is None
    assert after.refused is None
    views = [sees(o.account if where == "train" else o.eval_account, o) for o in (before, after)]
    assert views[0] != views[1]


@pytest.mark.parametrize("key", GATE_CASES)
def test_a_changed_key_of_a_gate_changes_its_verdict(key: str) -> None:
    given, change = GATE_CASES[key]
    gates = [GateSection(**given), GateSection(**given | change)]
    assert [gate.passed for gate in check_gates(REPORT, gates)] == [True, False]


@pytest.mark.parametrize("key", JUDGE_CASES)
def test_a_changed_key_of_a_judge_changes_what_it_asks_or_answers(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OTHER_KEY", "another")
    monkeypatch.setattr(judging, "Endpoint", partial(Endpoint, retries=0))
    (tmp_path / "own.txt").write_text("{prompt} {first} {second}")
    given, change = JUDGE_CASES[key]
    outcomes = []
    with scripted(steady(lambda body: "[[7]]", 0.05)) as server:
        for number, keys in enumerate((given, given | change)):
            monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / str(number)))
            keys = placed(keys, {"template": str(tmp_path / "own.txt")})
            section = JudgeSection(**(({} if keys["type"] == "command" else {"url": server.url}) | keys))
            server.most, before = 0, len(server.bodies)
            try:
                votes = str(build_judge(section)(["hm?"] * 2, ["a", "b"], ["c", "d"]))
            except UserError as error:
                votes = error.message
            asked = sorted(json.dumps(body) for body in server.bodies[before:])
            keys_sent = [headers["authorization"] for headers in server.headers[before:]]
            outcomes.append((votes, asked, keys_sent, server.most))
    assert outcomes[0] != outcomes[1]


JUDGED_ROWS = {"rankings": ["{rankings.jsonl}"], "labels": ["{labels.jsonl}"]}
OTHER_LOSSES = {"sigmoid": "hinge", "plackett_luce": "s_dpo", "s_dpo": "plackett_luce"}


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_trains_in_its_own_way(kind: str, watch: Watch) -> None:
    rows = JUDGED_ROWS.get(LOSSES[kind].rows)
    given: dict[str, Any] = {"data.train": rows, "data.eval": rows} if rows else {}
    # Nothing else judges labels.
    other = {"type": "kto", "desirable_weight": 0.5} if kind == "kto" else {"type": OTHER_LOSSES.get(kind, "sigmoid")}
    change = {"dpo.loss.desirable_weight": 1.0} if kind == "kto" else {"dpo.loss": {"type": kind}}
    before, after = before_and_after(watch, given | {"dpo.loss": other}, change)
    assert after.refused is None
    assert after.weights != before.weights
    assert all(math.isfinite(value) for row in after.curve for key, value in row.items() if key.endswith("loss"))


# The other values of hyperparameters that are neither true nor a number, or that have to be within bounds.
OTHER_VALUES: dict[str, Any] = {
    "momentum": 0.5,
    "beta_min": 0.09,
    "beta_max": 0.11,
    "gap_scale": "reward",
    "debias": False,
    "parity": "original",
    "base": "hinge",
    "divergence": "forward_kl",
}
ALPHA_DIVERGENCE = {"divergence": "alpha"}


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind, loss in LOSSES.items() for key in fields(loss)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_changed_hyperparameter_changes_what_its_loss_computes(kind: str, key: Field[Any]) -> None:
    given = {"type": kind} | (ALPHA_DIVERGENCE if (kind, key.name) == ("f_dpo", "alpha") else {})
    default = 0.5 if key.name == "alpha" and key.default is None else key.default
    other = not default if isinstance(default, bool) else OTHER_VALUES.get(key.name)
    other = 1.7 * default + 0.1 if other is None else other
    assert computed(given) != computed(given | {key.name: other})


def computed(loss: dict[str, Any]) -> list[float]:
    """What a recipe's losses come to in the first steps of a run."""
    text = write_yaml(merge(BASE, {"dpo.loss": loss, "training.output_dir": "run"}))
    terms = build_terms(parse_recipe(text, "r", command="dpo").dpo.loss)
    memory: dict[int, dict[str, float]] = {}
    sums = []
    for step in range(4):
        for number, term in enumerate(terms):
            scores = random_scores(term.loss, seed=step)
            # Some below the policy's usual, some above.
            scores = replace(scores, confidence=scores.confidence + 0.5)  # type: ignore[operator]
            now, memory[number] = term.loss.for_step(scores, memory.get(number, {}), step=step, seed=0)
            sums.append(term.weight * float(now(scores).sum()))
    return sums


# A run that goes on where another ended does not do the same again.
REPEATABLE = [case.given for case in CASES.values() if case.given.get("training.resume") != "auto"]


DIFFERENT = list({json.dumps(given): given for given in REPEATABLE}.values())


@pytest.mark.parametrize("number", range(len(DIFFERENT)), ids=lambda number: str(DIFFERENT[number]))
def test_the_same_recipe_gives_the_same_bits(number: int, watch: Watch, whole: bool) -> None:
    """Without this, whatever differs above would prove nothing."""
    if not whole and number % 3:
        pytest.skip("part of the whole suite")
    given = DIFFERENT[number]
    before, after = before_and_after(watch, given, {})
    assert (before.curve, before.weights) == (after.curve, after.weights)
    assert (before.forwards, before.references, before.files) == (after.forwards, after.references, after.files)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("revision", {"model.revision": "v2"}),
        ("prompt_truncation", {"data.prompt_truncation": "keep_start"}),
        ("run_name", {"training.run_name": "mine", "training.report_to": ["tensorboard"]}),
        ("adam_beta2", {"training.adam_beta2": 0.5, "training.optim": "rmsprop"}),
        ("eval_on_start", {"training.eval_on_start": True, "data.eval": None, "training.eval_steps": None}),
        ("loss_on", {"sft.loss_on": "last"}),
        ("train_on_think", {"dpo.train_on_think": "nonempty"}),
        ("prompt_truncation", {"data.train": [{"path": "{pairs.jsonl}", "prompt_truncation": "keep_start"}]}),
        ("pairs", {"data.train": [{"path": "{pairs.jsonl}", "pairs": "all"}]}),
        ("min_margin", {"data.train": [{"path": "{pairs.jsonl}", "min_margin": 1.0}]}),
        ("ties", {"data.train": [{"path": "{pairs.jsonl}", "ties": "keep"}]}),
        ("dimension", {"data.train": [{"path": "{pairs.jsonl}", "format_options": {"dimension": "safer"}}]}),
        *((key, {"data.train": [{"path": "{pairs.jsonl}", key: "x"}]}) for key in ("name", "split", "revision")),
        ("data_files", {"data.train": [{"path": "{pairs.jsonl}", "data_files": ["x"]}]}),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_by_name(key: str, change: dict[str, Any], watch: Watch) -> None:
    refused = watch({}, change).refused
    assert refused is not None
    assert key in refused or "sft has no effect" in refused
