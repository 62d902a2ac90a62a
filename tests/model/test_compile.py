"""Compiled layers give the numbers of uncompiled ones, and generation runs uncompiled."""

from collections.abc import Iterator

import pytest
import torch
from memory_store import random_pairs
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.attention import SHARED_PREFIX, shared_prefix_attention
from dpoctl.model.compile import compile_layers, uncompiled
from dpoctl.model.probe import ProbeResult


@pytest.fixture(autouse=True)
def _attention() -> Iterator[None]:
    yield
    AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


def run(scorer: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    scorer.zero_grad()
    logps = scorer(batch)
    logps.sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch reads .grad of its own tensors
def test_compiled_layers_give_the_same_numbers_for_batches_of_any_size(tiny_llama: PreTrainedModel) -> None:
    scorer = Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, "")).train()
    batches = [collate(random_pairs(count), "shared", pad_token_id=0) for count in (2, 5, 3)]
    before = [run(scorer, batch) for batch in batches]
    compile_layers(tiny_llama)
    assert scorer.state_dict().keys() == {f"model.{name}" for name in tiny_llama.state_dict()}
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch, (logps, gradients) in zip(batches, before, strict=True):
        compiled = run(scorer, batch)
        torch.testing.assert_close(compiled[0], logps, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-4, atol=1e-5)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - seen
    assert 0 < made <= 4, "compiled once for all layers and sizes"

    with uncompiled(tiny_llama), torch.no_grad():
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.testing.assert_close(scorer(batches[0]), before[0][0])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    assert all(layer._compiled_call_impl is not None for layer in tiny_llama.model.layers)


def test_a_model_without_marked_layers_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        compile_layers(nn.Linear(2, 2))
    assert str(refusal.value) == (
        "training.torch_compile: Linear does not mark its decoder layers; set training.torch_compile: false"
    )


def test_a_machine_without_a_compiler_is_refused(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(SetupError, match=r"^training.torch_compile: no C\+\+ compiler was found; "):
        compile_layers(tiny_llama)
    assert all(layer._compiled_call_impl is None for layer in tiny_llama.model.layers)
