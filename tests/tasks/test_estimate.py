"""The estimate of a run: what is traced is what a real step takes, and what is chosen follows from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import build_tiny
from flops import LiveBytes, counted
from memory_store import MemoryStore, random_pairs
from tiny_runs import merge
from transformers import PreTrainedTokenizerFast

from dpoctl.core.logps import Scorer
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths
from dpoctl.core.reader import Reader
from dpoctl.core.trace import Phase, Trace
from dpoctl.data.cache import Cache
from dpoctl.model.load import load_policy
from dpoctl.model.memory import set_gradient_checkpointing
from dpoctl.model.probe import ProbeResult
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.schema import TrainingSection
from dpoctl.tasks import estimate, footprint
from dpoctl.tasks.estimate import Division, Estimator, flops_of
from dpoctl.tasks.footprint import Footprint, Subject, measure_footprint
from dpoctl.tasks.task import build_task

LORA: dict[str, Any] = {"lora": {"r": 4, "lora_alpha": 8}}
HOST = torch.device("cpu")
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of six layers, wide enough that its activations are what counts."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny("llama", **SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(model: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Subject]:
    """Return what is estimated, for changes to a recipe."""
    store: Any = MemoryStore(random_pairs(40))

    def make(changes: dict[str, Any] | None = None, **fields: Any) -> Subject:
        recipe = {
            "method": "dpo",
            "model": {"model_name_or_path": str(model)},
            "data": {"train": [{"path": "pairs.jsonl"}]},
            "training": {"output_dir": "run", "global_batch_size": 20, "learning_rate": 1e-3},
        }
        parsed = parse_recipe(yaml.safe_dump(merge(recipe, changes or {})), "recipe.yaml", command="dpo")
        dtype = torch.bfloat16 if parsed.model.dtype == "bfloat16" else torch.float32
        return replace(Subject(parsed, tokenizer, store, Lengths.of(store), "cpu", dtype, 1), **fields)

    return make


def real_peak(subject: Subject, every: int) -> tuple[int, int]:
    """Bytes that a real forward and backward make at most at once, and its FLOPs, of tensors that operators return."""
    policy = load_policy(subject.recipe, subject.tokenizer, HOST)
    set_gradient_checkpointing(policy.causal, every)
    scorer = Scorer(policy.model, policy.causal, ProbeResult("shared", True, "")).train()
    task = build_task(subject.recipe)
    responses = np.linspace(-90, -30, int(subject.store.response_start[-1]), dtype=np.float32)
    reader = Reader(subject.store, "shared", HOST, 3, ref_logps=responses)
    accelerator: Any = SimpleNamespace(
        device=HOST, num_processes=1, process_index=0, is_main_process=True, backward=lambda loss: loss.backward()
    )
    objective = Objective(accelerator, scorer, task.terms, task.report)
    step = subject.plan(1 << 40).step(0)
    batches, live = reader.batches(step.schedule[0]), LiveBytes()
    # A view of a weight is not made by the operator that returns it.
    live.known = {tensor.untyped_storage()._cdata for tensor in [*policy.model.parameters(), *policy.model.buffers()]}
    with torch.autocast("cpu", subject.dtype, enabled=subject.dtype != torch.float32):
        with live:
            objective.backward(step, reader, Meter(HOST), batches)
        # By itself: its hooks keep tensors alive.
        with counted(memory=False) as work:
            objective.backward(step, reader, Meter(HOST), batches)
    return live.peak, work.flops


@pytest.mark.long("full, recomputed", "lora")
@pytest.mark.parametrize(
    ("changes", "every"),
    [({}, 0), ({}, 1), (LORA, 0), (LORA | {"model.dtype": "bfloat16"}, 1)],
    ids=["full", "full, recomputed", "lora", "lora in bfloat16, recomputed"],
)
def test_a_traced_step_takes_what_a_real_one_takes(
    changes: dict[str, Any], every: int, subject: Callable[..., Subject]
) -> None:
    """Two depths of two and four layers tell the peak of six, without a number being computed."""
    what = subject(changes)
    peak, flops = real_peak(what, every)
    found = measure_footprint(what, 1 << 40, every)
    trace = found.trace
    assert found.method == "trace"
    moments = {name: phase.peak for name, phase in trace.phases.items() if name != "update"}
    assert max(moments.values()) - trace.weights - trace.optimizer == pytest.approx(peak, rel=0.03)
    assert sum(trace.flops[name] for name in ("layers", "head", "attention")) == pytest.approx(flops, rel=0.02)


def test_a_trace_is_taken_once(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = subject(cache=Cache(tmp_path))
    first = measure_footprint(what, 60, 0)
    monkeypatch.setattr(footprint, "_traced", lambda *_: pytest.fail("traced again"))
    assert measure_footprint(what, 60, 0) == first
    (file,) = (tmp_path / "estimates").iterdir()
    file.write_text(file.read_text()[:100])
    monkeypatch.setattr(footprint, "_traced", lambda *_: first)
    assert measure_footprint(what, 60, 0) == first, "a damaged file is traced anew"


def test_a_model_that_cannot_be_traced_gets_a_formula(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = subject()
    traced = measure_footprint(what, 1 << 40, 0)
    monkeypatch.setattr(footprint, "_traced", lambda *_: 1 / 0)
    guessed = measure_footprint(what, 1 << 40, 0)
    assert (guessed.method, guessed.parameters, guessed.trained) == ("formula", traced.parameters, traced.trained)
    assert guessed.trace.phases["head"].peak == pytest.approx(traced.trace.phases["head"].peak, rel=0.4)


def test_work_is_that_of_all_records(subject: Callable[..., Subject]) -> None:
    """From the fullest micro-batch, each part scaled by what it grows with, to rows that it does not hold."""
    what = subject()
    small, whole = measure_footprint(what, 300, 0), measure_footprint(what, 1 << 40, 0)
    records = what.plan(1 << 40).step(0).schedule[0][0]
    exact = sum(whole.trace.flops[name] for name in ("layers", "head", "attention"))
    assert small.tokens < 0.7 * whole.tokens
    assert flops_of(small, what.lengths, list(records), passes=False) == pytest.approx(exact, rel=0.02)


def lines(fitting: dict[int, int]) -> Callable[..., Footprint]:
    """A stand-in whose bytes are those at which so many tokens fit into a gigabyte, by recomputed layers."""

    def measured(subject: Any, budget: int, every: int) -> Footprint:
        peak = int(budget * 1e9 / fitting.get(every, 1))
        phases = {"forward": Phase(peak, 0, 0)}
        return Footprint(Trace(0, 0, 0, peak, phases, {}), budget, budget, 1, 1, 1)

    return measured


@pytest.mark.parametrize(
    ("kind", "longest", "fitting", "expected"),
    [
        ("cpu", 1500, {0: 100_000}, (2048, 0)),
        ("cpu", 5000, {0: 100_000}, (2048, 0)),
        ("cpu", 1500, {0: 2500, 4: 2900, 2: 3100}, (2048, 0)),
        ("cuda", 1500, {0: 2500, 4: 2900, 2: 3200}, (3200, 2)),
        ("cuda", 1500, {0: 1_000_000}, (262_144, 0)),
        ("cpu", 1500, {0: 10, 4: 20, 2: 30, 1: 1800}, (1800, 1)),
    ],
)
def test_layers_are_recomputed_where_two_of_the_longest_records_do_not_fit_otherwise(
    kind: str, longest: int, fitting: dict[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure_footprint", lines(fitting))
    monkeypatch.setattr(estimate, "FRAGMENTATION", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(estimate, "HOLES", 0)
    training = TrainingSection(output_dir="run", learning_rate=1e-5)
    config = SimpleNamespace(hidden_size=256, vocab_size=1 << 20, num_hidden_layers=4)
    recipe = SimpleNamespace(training=training, lora=None)
    lengths = SimpleNamespace(tokens=np.array([10, longest]))
    what: Any = SimpleNamespace(
        recipe=recipe, config=config, depth=4, kind=kind, lengths=lengths, model=None, dtype=torch.float32
    )
    chosen = Estimator(what, 1e9).choose()
    assert (chosen.budget, chosen.every) == (pytest.approx(expected[0], rel=0.02), expected[1])
    assert chosen.fits


def test_a_divided_model_takes_its_share(subject: Callable[..., Subject]) -> None:
    what = subject({"model.dtype": "bfloat16"})
    whole, shared = (Estimator(what, 1e12, Division(shards)) for shards in (1, 4))
    before, after = (estimator._parts(measure_footprint(what, 300, 0), 0)[0] for estimator in (whole, shared))
    assert after["weights"] == before["weights"] // 4
    assert after["optimizer state"] == before["optimizer state"] // 4
    assert after["activations"] < before["activations"], "weights are gathered in bfloat16, and not cast"
    assert after["gathered layers"] > 0 == before["gathered layers"]


def full(kept: int, trained: int = 1000) -> Footprint:
    """A model that is trained whole in float32, whose forward keeps so many bytes."""
    states = 12 * trained
    phases = {"head": Phase(states + kept, 0, 0)}
    return Footprint(Trace(4 * trained, 8 * trained, 0, kept, phases, {}), 10, 10, 1, trained, trained)


def test_a_checkpoint_is_written_from_copies_which_may_be_the_most_that_a_cpu_holds(
    subject: Callable[..., Subject],
) -> None:
    """Weights and two moments in float32, twice, where a step has less beside them than they are."""
    on_cpu, on_gpu = (Estimator(subject(kind=kind), 1e12) for kind in ("cpu", "cuda"))
    parts, phase = on_cpu._parts(full(kept=6_000), 0)
    assert (phase, parts["checkpoint"], sum(parts.values())) == ("writing of a checkpoint", 12_000, 24_000)
    assert on_cpu._parts(full(kept=13_000), 0)[1] == "head"
    assert on_gpu._parts(full(kept=6_000), 0)[1] == "head", "copies are on the host"


def test_layers_that_are_recomputed_leave_holes(subject: Callable[..., Subject]) -> None:
    estimator = Estimator(subject(), 1e12)
    none, half, all_layers = (estimator._parts(full(13_000), every)[0]["fragmentation"] for every in (0, 2, 1))
    assert all_layers - none == pytest.approx(2 * (half - none), rel=0.01)
    assert all_layers > half > none > 0
