"""Schedules change no gradient and no metric, and a step that is coupled has the gradient of one graph."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from loss_samples import outline
from memory_store import MemoryStore, by_hand, random_dialogue, random_pairs
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.core.logps import Scorer
from dpoctl.core.loop import evaluate
from dpoctl.core.meters import Meter, Total
from dpoctl.core.objective import Objective, TermValues
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.losses import Loss, PreferenceLoss, Scores, TargetNLL, Term, TokenNLL
from dpoctl.losses.base import log_sigmoid
from dpoctl.losses.pairwise import Sigmoid
from dpoctl.model.attention import Layout
from dpoctl.model.linear_head import _Rows
from dpoctl.model.probe import ProbeResult
from dpoctl.tasks.task import PreferenceMetrics, sft_metrics

BUDGETS = [60, 200, 1 << 62]


@dataclass(frozen=True, kw_only=True)
class BatchCentred(PreferenceLoss):
    """A loss of the whole step: each margin is compared with the step's mean and spread, which carry gradient."""

    couples_batch: ClassVar[bool] = True

    def __call__(self, scores: Scores) -> Tensor:
        margins = scores.margins
        centred = (margins - margins.mean()) / (margins.std() + 1)
        # Position matters too: a schedule that reorders the step would show.
        weights = torch.linspace(0.5, 1.5, len(margins))
        return -weights * log_sigmoid(self.beta * margins + centred)


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def report(scores: Scores, values: Sequence[TermValues], names: Mapping[int, str]) -> Mapping[str, Total]:
    return {}


def gradient(
    model: PreTrainedModel,
    store: MemoryStore,
    loss: Loss,
    max_tokens: int,
    layout: Layout = "shared",
    batch_size: int = 9,
) -> tuple[Tensor, dict[str, float]]:
    """Gradient and metrics of the first step."""
    import numpy as np

    model.zero_grad()
    ref = np.linspace(-90, -30, int(store.response_start[-1]), dtype=np.float32)
    reader = Reader(store, layout, torch.device("cpu"), 3, ref if loss.needs_reference else None)  # type: ignore[arg-type]
    scorer = Scorer(model, model, ProbeResult(layout, True, ""))
    full = PreferenceMetrics(loss) if isinstance(loss, PreferenceLoss) else sft_metrics
    objective = Objective(accelerator(), scorer, (Term(1.0, loss),), full)
    meter = Meter(torch.device("cpu"))
    plan = Plan(Lengths.of(store), batch_size, 1, max_tokens, layout, seed=0)  # type: ignore[arg-type]
    objective.backward(plan.step(0), reader, meter)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return flat, meter.read(lambda t: t)


@pytest.mark.parametrize("loss", [Sigmoid(), TokenNLL(), BatchCentred()], ids=["dpo", "sft", "coupled"])
@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_token_budgets_change_neither_gradients_nor_metrics(
    loss: Loss, layout: Layout, tiny_llama: PreTrainedModel
) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    examples = [random_dialogue(rng) for _ in range(11)] if loss.item == "tokens" else random_pairs(11)
    store = MemoryStore(examples)
    results = [gradient(tiny_llama, store, loss, budget, layout) for budget in BUDGETS]
    for flat, metrics in results[1:]:
        assert float((flat - results[0][0]).norm() / results[0][0].norm()) < 1e-5
        assert metrics == pytest.approx(results[0][1], rel=1e-5)


@pytest.mark.parametrize("loss", [Sigmoid(), BatchCentred()], ids=["dpo", "coupled"])
def test_no_micro_batch_lies_beside_the_graph_of_the_one_before(
    loss: Loss, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head keeps of its probabilities is the largest part of a graph."""
    alive: list[int] = []
    score = Objective._score_policy

    def watched(self: Objective, batch: Any) -> Any:
        alive.append(sum(type(held) is _Rows and bool(held.exponentials) for held in gc.get_objects()))
        return score(self, batch)

    monkeypatch.setattr(Objective, "_score_policy", watched)
    gc.disable()
    try:
        gradient(tiny_llama, MemoryStore(random_pairs(9)), loss, 200)
    finally:
        gc.enable()
    assert len(alive) >= 3
    assert set(alive) == {0}


def test_sft_is_the_mean_over_tokens_and_dpo_the_mean_over_pairs(tiny_llama: PreTrainedModel) -> None:

    pairs = random_pairs(4)
    with torch.no_grad():
        logps = by_hand(tiny_llama, pairs)
    store = MemoryStore(pairs)
    _, sft_metrics = gradient(tiny_llama, store, TokenNLL(), 1 << 62, batch_size=4)
    assert sft_metrics["loss"] == pytest.approx(-float(logps.sum()) / int(store.num_tokens.sum()), rel=1e-5)
    _, dpo_metrics = gradient(tiny_llama, store, Sigmoid(reference_free=True), 1 << 62, batch_size=4)
    margins = logps[0::2] - logps[1::2]
    assert dpo_metrics["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(0.1 * margins).mean()), rel=1e-5)
    assert dpo_metrics["rewards/margins"] == pytest.approx(0.1 * float(margins.mean()), rel=1e-4)
    assert dpo_metrics["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert dpo_metrics["logps/chosen"] == pytest.approx(float(logps[0::2].mean()), rel=1e-5)


def test_two_passes_give_the_gradient_of_the_whole_step_s_loss(tiny_llama: PreTrainedModel) -> None:
    """Against one graph over everything, built by hand."""
    import numpy as np

    pairs = random_pairs(7)
    store = MemoryStore(pairs)
    several, metrics = gradient(tiny_llama, store, BatchCentred(), 80, batch_size=7)

    tiny_llama.zero_grad()
    order = Plan(Lengths.of(store), 7, seed=0).step(0).records  # type: ignore[arg-type]
    ref = torch.tensor(np.linspace(-90, -30, 14, dtype=np.float32)).reshape(7, 2)[list(order)].flatten()
    logps = by_hand(tiny_llama, [pairs[r] for r in order])
    whole = Scores(logps, outline([1] * 14, torch.arange(14)), ref)
    loss = BatchCentred()(whole).mean()
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in tiny_llama.parameters() if p.grad is not None])
    assert float((several - flat).norm() / flat.norm()) < 1e-5
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_the_second_pass_replays_the_dropout_of_the_first(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """With dropout on, the gradient must be that of the log-probabilities which the loss saw."""
    model = tiny_model("llama", attention_dropout=0.3).train()
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Spy(BatchCentred):
        def __call__(self, scores: Scores) -> Tensor:
            seen.append(scores.logps.detach().clone())
            return super().__call__(scores)

    store = MemoryStore(random_pairs(6))
    second: list[Tensor] = []
    forward = Scorer.forward

    def recording(self: Scorer, batch):  # type: ignore[no-untyped-def]
        out = forward(self, batch)
        if torch.is_grad_enabled():
            second.append(batch.sum_per_response(out.detach()))
        return out

    Scorer.forward = recording  # type: ignore[method-assign]
    try:
        gradient(model, store, Spy(), 80, batch_size=6)
    finally:
        Scorer.forward = forward  # type: ignore[method-assign]
    assert len(second) > 1
    assert torch.equal(torch.cat(second).sort().values, seen[0].sort().values)


def test_fillers_count_for_nothing(tiny_llama: PreTrainedModel) -> None:
    store = MemoryStore(random_pairs(3))
    reader = Reader(store, "shared", torch.device("cpu"))  # type: ignore[arg-type]
    filler = reader.batch(())
    assert filler.is_filler
    terms = (Term(1.0, Sigmoid(reference_free=True)),)
    objective = Objective(accelerator(), Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, "")), terms, report)
    step = Plan(Lengths.of(store), 1, seed=0).step(0)  # type: ignore[arg-type]
    meter = Meter(torch.device("cpu"))
    object.__setattr__(step, "schedule", ((step.records, ()),))
    objective.backward(step, reader, meter)
    with_filler = torch.cat([p.grad.flatten() for p in tiny_llama.parameters() if p.grad is not None])
    assert meter.read(lambda t: t)["loss"] > 0
    plain, _ = gradient(tiny_llama, store, Sigmoid(reference_free=True), 1 << 62, batch_size=1)
    assert torch.equal(with_filler, plain)


def test_evaluation_is_exact_for_any_budget(tiny_llama: PreTrainedModel) -> None:
    store = MemoryStore(random_pairs(7))
    terms = (Term(1.0, Sigmoid(reference_free=True)),)
    objective = Objective(accelerator(), Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, "")), terms, report)
    reader, lengths = Reader(store, "shared", torch.device("cpu")), Lengths.of(store)  # type: ignore[arg-type]
    found = [evaluate(objective, reader, Plan(lengths, size, 1, b)) for size in (2, 7) for b in BUDGETS]
    for name in ("loss", "loss_se"):
        assert [one[name] for one in found] == pytest.approx([found[0][name]] * len(found), rel=1e-5)


@pytest.mark.parametrize(
    "losses", [[Sigmoid(reference_free=True)], [Sigmoid(reference_free=True), TargetNLL()]], ids=len
)
def test_the_standard_error_of_an_evaluation_is_that_of_its_records(
    tiny_llama: PreTrainedModel, losses: list[Loss]
) -> None:
    examples = random_pairs(6)
    store, objective = MemoryStore(examples), objective_of(tiny_llama, *losses)
    reader, lengths = Reader(store, "shared", torch.device("cpu")), Lengths.of(store)  # type: ignore[arg-type]
    found = evaluate(objective, reader, Plan(lengths, 6, 1, 1 << 30))
    # The loss without each record in turn: the jackknife, which for a mean is the usual formula.
    left_out = []
    for index in range(6):
        rest = MemoryStore(examples[:index] + examples[index + 1 :])
        reader, lengths = Reader(rest, "shared", torch.device("cpu")), Lengths.of(rest)  # type: ignore[arg-type]
        left_out.append(evaluate(objective, reader, Plan(lengths, 5, 1, 1 << 30))["loss"])
    jackknife = (5 * torch.tensor(left_out).var(correction=0)).sqrt()
    assert found["loss_se"] == pytest.approx(float(jackknife), rel=1e-4 if len(losses) == 1 else 0.1)


def objective_of(model: PreTrainedModel, *losses: Loss) -> Objective:
    terms = tuple(Term(1.0, loss) for loss in losses)
    return Objective(accelerator(), Scorer(model, model, ProbeResult("shared", True, "")), terms, report)


def test_a_step_without_items_of_a_term_adds_nothing_of_it(tiny_llama: PreTrainedModel) -> None:
    store = MemoryStore([replace(example, target=-1) for example in random_pairs(3)])
    reader: Any = Reader(store, "shared", torch.device("cpu"))  # type: ignore[arg-type]
    step = Plan(Lengths.of(store), 3).step(0)  # type: ignore[arg-type]
    gradients = []
    for losses in ((Sigmoid(reference_free=True),), (Sigmoid(reference_free=True), TargetNLL())):
        tiny_llama.zero_grad()
        meter = Meter(torch.device("cpu"))
        objective_of(tiny_llama, *losses).backward(step, reader, meter)
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_llama.parameters() if p.grad is not None]))
        assert meter.read(lambda t: t)["loss"] > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_the_plan_knows_of_records_what_their_batch_says(layout: Layout) -> None:
    examples = random_pairs(6)
    examples = [replace(e, label=n % 2, target=n % 3 - 1, source=n) for n, e in enumerate(examples)]
    reader = Reader(MemoryStore(examples), layout, torch.device("cpu"))  # type: ignore[arg-type]
    batch = reader.batch((5, 3, 1))
    assert batch.outline.starts.tolist() == [0, 2, 4, 6]
    assert batch.outline.targets.tolist() == [1, -1, 4]
    assert batch.outline.labels.tolist() == [1, 1, 1]
    assert batch.outline.sources.tolist() == [5, 3, 1]
    for name, value in vars(reader.outline((5, 3, 1))).items():
        assert torch.equal(getattr(batch.outline, name), value), name
