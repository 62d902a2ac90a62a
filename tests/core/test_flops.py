"""What it saves that the responses of a prompt share it."""

import numpy as np
import pytest
import torch
from flops import FORMULAS
from memory_store import MemoryStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.core.planner import Lengths
from dpoctl.data.tokenize import Example
from dpoctl.model.probe import ProbeResult

ANSWER, PROMPT, K = 32, 64, 4
LIMIT = 0.55


def record(responses: int) -> Example:
    """A prompt twice as long as each answer, and so many answers."""
    rng = np.random.default_rng(0)
    return Example(
        shared=rng.integers(4, 300, PROMPT),
        shared_scored=np.zeros(PROMPT, dtype=bool),
        suffixes=tuple(rng.integers(4, 300, ANSWER) for _ in range(responses)),
        suffixes_scored=(np.ones(ANSWER, dtype=bool),) * responses,
        pairs=np.zeros((0, 2), dtype=np.int64),
    )


def count(model: PreTrainedModel, examples: list[Example]) -> tuple[int, int]:
    """FLOPs of a forward and a backward: of products with weights, and of attention."""
    batch = collate(examples, "shared")
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        Scorer(model, model, ProbeResult("shared", True, ""))(batch).sum().backward()
    by_kind = counter.get_flop_counts()["Global"]
    found = {True: 0, False: 0}
    for operator, flops in by_kind.items():
        found["attention" in str(operator)] += flops
    return found[False], found[True]


def causal_area(examples: list[Example]) -> int:
    """Pairs of a query and a key that it sees."""
    area = 0
    for example in examples:
        prompt, lengths = len(example.shared), [len(suffix) for suffix in example.suffixes]
        area += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    return area


def test_four_answers_cost_at_most_55_percent_of_four_rows(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """The head runs over scored tokens only in either layout, so it saves nothing: it must be small, as in a 7B."""
    model = tiny_model("llama", num_hidden_layers=8, intermediate_size=172)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    together, apart = [record(K)], [record(1)] * K
    (shared, shared_attention), (rows, rows_attention) = count(model, together), count(model, apart)
    # Scores and weighted values: two products forward; five backward, where the scores are computed again.
    for examples, attention in ((together, shared_attention), (apart, rows_attention)):
        assert attention == 14 * layers * width * causal_area(examples)
    assert (shared + shared_attention) / (rows + rows_attention) <= LIMIT
    # Of the backbone alone half is left: 6 lengths of an answer instead of 12. A trainable head takes three products.
    head = 6 * K * ANSWER * width * model.config.vocab_size
    assert (shared - head) / (rows - head) == pytest.approx(0.5, abs=1e-3)


def test_the_plan_reckons_with_what_sharing_saves() -> None:
    together, apart = (Lengths.of(MemoryStore(examples)) for examples in ([record(K)], [record(1)] * K))  # type: ignore[arg-type]
    assert float(together.cost.sum() / apart.cost.sum()) <= LIMIT
    assert int(together.tokens.sum()) * 2 == int(apart.tokens.sum())


def test_sharing_costs_no_more_where_there_is_nothing_to_share(tiny_llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    one, four = count(tiny_llama, [record(1)]), count(tiny_llama, [record(1)] * 4)
    assert [4 * flops for flops in one] == [*four]
