"""How a step is cut over ranks and micro-batches changes neither loss nor metrics, neither gradient nor memory."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import build_tiny
from forked import as_ranks
from memory_store import MemoryStore
from numpy.typing import NDArray
from torch import Tensor

from dpoctl.core.logps import Scorer
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan, Step
from dpoctl.core.reader import Reader
from dpoctl.data.mismatched import Mismatched
from dpoctl.data.tokenize import Example
from dpoctl.losses import LOSSES, Memory, PreferenceLoss, Term
from dpoctl.model.probe import ProbeResult
from dpoctl.tasks.task import PreferenceMetrics, Task, build_loss, build_terms, sft_metrics

VOCABULARY = 64
SFT = {"type": "sft"}
MIXTURES: dict[str, Any] = {
    "mpo": [{"type": "sigmoid", "weight": 0.8}, {"type": "bco_pair", "weight": 0.2}, SFT],
    "heads in a coupled step": [{"type": "ld_dpo"}, {"type": "aot", "weight": 0.5}],
    "weights in a coupled step": [{"type": "wpo"}, {"type": "beta_dpo", "sft_weight": 0.5}],
    "labels and likelihood": {"type": "kto", "sft_weight": 0.5, "desirable_weight": 1.3},
    "rankings and likelihood": {"type": "plackett_luce", "sft_weight": 0.5},
}


def preference_task(spec: Any) -> Task:
    """The task that a recipe with this `dpo.loss` has."""
    terms = build_terms(spec)
    assert isinstance(terms[0].loss, PreferenceLoss)
    return Task(terms, PreferenceMetrics(terms[0].loss))


TASKS = (
    {f"sft of {average}": Task((Term(1.0, build_loss(average)),), sft_metrics) for average in ("tokens", "responses")}
    | {name: preference_task(spec) for name, spec in MIXTURES.items()}
    | {name: preference_task({"type": name}) for name in LOSSES}
)
CUTS = [(1, 1), (1, 4), (2, 1), (2, 2)]
"""Ranks and micro-batches."""
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5}
IN_FLOAT32 = {"sft of tokens", "sft of responses", *MIXTURES, "sigmoid", "beta_dpo", "bco_pair", "aot", "sppo_hard"}
"""The tasks that are cut in float32 too, unless all are: what is summed in which order, and kept between steps."""


@dataclass(frozen=True)
class Outcome:
    """Of two steps and an evaluation."""

    gradient: Tensor
    metrics: dict[str, float]
    eval_metrics: dict[str, float]
    memory: tuple[Memory, ...]


Outcomes = dict[tuple[str, torch.dtype], Outcome]


def random_store(rows: str) -> Any:
    """Ten records of what a loss judges, of uneven lengths and from two sources; some have nothing to imitate."""
    rng = np.random.default_rng(3)
    sizes = {"pairs": [2] * 10, "rankings": [2, 3, 4, 2, 3, 2, 4, 3, 2, 3]}.get(rows, [1] * 10)

    def example(number: int, size: int) -> Example:
        prompt = np.array([*rng.integers(0, VOCABULARY, rng.integers(2, 8)), number])
        suffixes = tuple(rng.integers(0, VOCABULARY, n) for n in rng.integers(1, 9, size))
        pairs = np.array([*itertools.combinations(range(size), 2)], dtype=np.int64).reshape(-1, 2)
        return Example(
            prompt,
            np.zeros(len(prompt), dtype=bool),
            suffixes,
            tuple(np.ones(len(suffix), dtype=bool) for suffix in suffixes),
            pairs,
            label=int(number % 3 == 0) if rows == "labels" else -1,
            target=-1 if number % 5 == 4 else 0,
            source=number % 2,
        )

    store: Any = MemoryStore([example(number, size) for number, size in enumerate(sizes)])
    return Mismatched(store, 32) if rows == "labels" else store


def reader_of(store: Any) -> Reader:
    """A reader with a reference about as good as a random model."""
    rng, lengths = np.random.default_rng(5), store.num_tokens

    def table() -> NDArray[np.float32]:
        return (-4.1 * lengths + rng.normal(size=len(lengths))).astype(np.float32)

    return Reader(
        store, "shared", torch.device("cpu"), ref_logps=table(), ref_head_logps=table(), names={0: "even", 1: "odd"}
    )


def cut(step: Step, ranks: int, micro_batches: int) -> Step:
    """Deal the records of a step; where they are fewer than the hands, the last hands stay empty."""
    hands = ranks * micro_batches
    dealt = [step.records[at::hands] for at in range(hands)]
    return replace(step, schedule=tuple(tuple(dealt[rank::ranks]) for rank in range(ranks)))


def run(task: Task, scorer: Any, accelerator: Accelerator, micro_batches: int) -> Outcome:
    """Two steps of 7 and of 3 records, memory and all, and an evaluation."""
    store = random_store(task.terms[0].loss.rows)
    reader, plan = reader_of(store), Plan(Lengths.of(store), 7, seed=1)
    objective = Objective(accelerator, scorer, task.terms, task.report, seed=7)
    meter, eval_meter = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    gradients: list[Tensor] = []
    for step in plan:
        scorer.zero_grad()
        objective.keep_memory(objective.backward(cut(step, accelerator.num_processes, micro_batches), reader, meter))
        gradients += [p.grad.flatten().clone() for p in scorer.parameters() if p.grad is not None]
    for step in plan.one_pass(plan.lengths):
        objective.evaluate(cut(step, accelerator.num_processes, micro_batches), reader, eval_meter)
    whole = [m.read(lambda t: accelerator.reduce(t, reduction="sum")) for m in (meter, eval_meter)]  # type: ignore[arg-type, return-value]
    return Outcome(torch.cat(gradients), *whole, objective.memory)


def is_played(name: str, dtype: torch.dtype, whole: bool) -> bool:
    """Whether a task is cut in a dtype."""
    return whole or dtype == torch.float64 or name in IN_FLOAT32


def run_all(ranks: int, whole: bool) -> dict[tuple[int, int], Outcomes]:
    """Everything that so many ranks can do, on this rank."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    results: dict[tuple[int, int], Outcomes] = {}
    for dtype in DTYPES:
        # GPT-2 computes in the dtype of its weights from end to end.
        model = build_tiny(
            "gpt2",
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            **dict.fromkeys(DROPOUTS, 0.0),
        ).to(dtype)
        scorer = accelerator.prepare(Scorer(model, model, ProbeResult("shared", True, ""), confidence=True))
        for name in (name for name in TASKS if is_played(name, dtype, whole)):
            for at, micro_batches in (c for c in CUTS if c[0] == ranks):
                outcome = run(TASKS[name], scorer, accelerator, micro_batches)
                results.setdefault((at, micro_batches), {})[name, dtype] = outcome
    return results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, whole: bool) -> Mapping[tuple[int, int, int], Outcomes]:
    """What every rank got, by ranks, micro-batches and rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")

    def work(rank: int) -> None:
        torch.save(run_all(2, whole), folder / f"{rank}.pt")

    as_ranks(2, work)
    found = {(*at, 0): result for at, result in run_all(1, whole).items()}
    for rank in range(2):
        of_rank = torch.load(folder / f"{rank}.pt", weights_only=False)
        found |= {(*at, rank): result for at, result in of_rank.items()}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_the_same_however_it_is_cut(
    name: str, dtype: torch.dtype, outcomes: Mapping[tuple[int, int, int], Outcomes], whole: bool
) -> None:
    if not is_played(name, dtype, whole):
        pytest.skip("part of the whole suite")
    close, uncut = DTYPES[dtype], outcomes[1, 1, 0][name, dtype]
    assert uncut.gradient.norm() > 0
    assert uncut.metrics.keys() & {"even/loss", "even/nll_loss", "even/rewards/chosen"}
    assert len(outcomes) == 6
    for at, results in outcomes.items():
        other = results[name, dtype]
        assert float((other.gradient - uncut.gradient).norm() / uncut.gradient.norm()) < close, at
        for ours, theirs in ((uncut.metrics, other.metrics), (uncut.eval_metrics, other.eval_metrics)):
            assert theirs == pytest.approx(ours, rel=close, abs=close), at
        for memory, theirs in zip(uncut.memory, other.memory, strict=True):
            assert theirs == pytest.approx(memory, rel=close, abs=close), at
    ranks = [outcomes[2, 2, rank][name, dtype] for rank in range(2)]
    assert ranks[0].memory == ranks[1].memory
    assert torch.equal(ranks[0].gradient, ranks[1].gradient)
