"""Records that also hold the answer to another prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from memory_store import MemoryStore, by_hand
from transformers import PreTrainedModel

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer, per_response
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.mismatched import Mismatched
from dpoctl.data.records import Record
from dpoctl.data.store import StoreWriter
from dpoctl.data.tokenize import Example
from dpoctl.errors import DataError
from dpoctl.model.probe import ProbeResult


def labelled(prompt: list[int], answer: list[int], label: int = 1, scored: list[bool] | None = None) -> Example:
    """A record as the tokenizer lays it out: all but the last token count as shared."""
    ids, flags = np.array([*prompt, *answer]), [False] * len(prompt) + (scored or [True] * len(answer))
    return Example(ids[:-1], np.array(flags[:-1]), (ids[-1:],), (np.array(flags[-1:]),), NO_PAIRS, label, 0)


NO_PAIRS = np.zeros((0, 2), dtype=np.int64)


def random_records(prompts: list[int], seed: int = 0) -> list[Example]:
    """A record for each number of a prompt; the same number is the same prompt."""
    rng = np.random.default_rng(seed)
    texts = {p: [*rng.integers(4, 300, 3 + p % 5).tolist(), 4 + p] for p in sorted(set(prompts))}
    return [labelled(texts[p], rng.integers(4, 300, rng.integers(1, 12)).tolist()) for p in prompts]


def view(examples: list[Example], max_length: int = 100, key: str = "memory") -> Mismatched:
    return Mismatched(MemoryStore(examples, key), max_length)  # type: ignore[arg-type]


def prompt_of(example: Example) -> tuple[int, ...]:
    scored = [*example.shared_scored, *example.suffixes_scored[0]]
    return tuple(np.concatenate([example.shared, example.suffixes[0]])[: scored.index(True)].tolist())


def answer_of(example: Example) -> tuple[int, ...]:
    return tuple(np.concatenate([example.shared, example.suffixes[0]])[len(prompt_of(example)) :].tolist())


@pytest.mark.parametrize("prompts", [[0, 1], [0, 0, 1, 1], [0, 1, 1, 2, 2, 2], [*range(30)], [5] * 10 + [*range(20)]])
def test_every_answer_is_used_once_and_beside_another_prompt(prompts: list[int]) -> None:
    examples = random_records(prompts)
    store = view(examples)
    seen = []
    for index, original in enumerate(examples):
        example = store.example(index)
        assert tuple(example.shared) == prompt_of(original)
        assert not example.shared_scored.any()
        assert tuple(example.suffixes[0]) == answer_of(original)
        other = tuple(example.suffixes[1])
        assert any(other == answer_of(e) and prompt_of(e) != prompt_of(original) for e in examples)
        seen.append(other)
    assert sorted(seen) == sorted(map(answer_of, examples))


def test_a_prompt_of_most_records_still_meets_other_prompts_answers() -> None:
    examples = random_records([0, 0, 1, 0, 2, 0, 0])
    store = view(examples)
    for index, original in enumerate(examples):
        other = tuple(store.example(index).suffixes[1])
        assert any(other == answer_of(e) and prompt_of(e) != prompt_of(original) for e in examples)


def test_one_prompt_has_no_mismatched_answer() -> None:
    for prompts in ([0], [0, 0, 0]):
        with pytest.raises(DataError, match="same prompt"):
            view(random_records(prompts))


def test_records_of_several_responses_are_refused() -> None:
    pair = Example(np.arange(3), np.zeros(3, dtype=bool), (np.arange(2),) * 2, (np.ones(2, dtype=bool),) * 2, NO_PAIRS)
    with pytest.raises(DataError, match="one response"):
        view([pair, pair])


def test_the_other_answer_is_cut_where_the_row_would_be_too_long() -> None:
    examples = [
        labelled([1, 2, 3, 4], [50, 51]),
        labelled([5], [60, 61, 62, 63, 64, 65], 0, [True] * 3 + [False, True, True]),
    ]
    store = view(examples, max_length=8)
    first, second = store.example(0), store.example(1)
    assert first.suffixes[1].tolist() == [60, 61, 62, 63]
    assert second.suffixes[1].tolist() == [50, 51]
    assert store.suffix_len.tolist() == [2, 4, 6, 2]
    assert store.num_tokens.tolist() == [2, 3, 5, 2]
    assert store.shared_len.tolist() == [4, 1]
    assert [first.label, second.label] == store.label.tolist() == [1, 0]


def test_the_index_says_what_the_examples_are() -> None:
    examples = random_records([*range(9), 3, 3], seed=2)
    store = view(examples, max_length=12)
    copied = MemoryStore([store.example(index) for index in range(len(store))])
    for column in (
        "shared_len",
        "suffix_len",
        "num_tokens",
        "response_start",
        "pair_start",
        "label",
        "target",
        "source",
    ):
        assert getattr(store, column).tolist() == getattr(copied, column).tolist(), column
    assert int((store.shared_len + store.suffix_len[1::2]).max()) <= 12


def test_who_is_matched_with_whom_depends_on_the_store_alone_and_is_part_of_the_key() -> None:
    examples = random_records([*range(20)])
    one, same = view(examples), view(examples)
    assert [e.suffixes[1].tolist() for e in map(one.example, range(20))] == [
        e.suffixes[1].tolist() for e in map(same.example, range(20))
    ]
    keys = {view(examples).key, view(examples, key="other").key, view(examples, max_length=50).key, "memory"}
    assert len(keys) == 4


def test_batches_of_the_view_score_both_answers_on_the_prompt(tiny_llama: PreTrainedModel) -> None:
    store = view(random_records([*range(6)]))
    plan = Plan(Lengths.of(store), 6, max_tokens=60, seed=0)
    reader = Reader(store, "shared", torch.device("cpu"))
    for (records,) in ([bin_] for bin_ in plan.step(0).schedule[0]):
        batch = reader.batch(records)
        with torch.no_grad():
            said = per_response(batch, Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, ""))(batch))
            truth = by_hand(tiny_llama, [store.example(record) for record in records])
        torch.testing.assert_close(said.logps, truth, rtol=1e-5, atol=1e-4)
        assert batch.outline.labels.tolist() == [1] * len(records)


def test_a_store_on_disk_is_read_through_and_not_copied(tmp_path: Path) -> None:
    examples = random_records([*range(50)])
    with StoreWriter(tmp_path / "store", "key", np.uint16) as writer:
        for number, example in enumerate(examples):
            writer.add(
                example, Record(f"prompt {number}", (f"answer {number}",), label=True), (0, "rows.jsonl", number)
            )
        disk = writer.commit({}, ["rows.jsonl"])
    store = Mismatched(disk, 100)
    assert store.texts(7).prompt == "prompt 7"
    example = store.example(7)
    assert example.suffixes[0].tolist() == view(examples).example(7).suffixes[0].tolist()
    assert collate([example], "padded").outline.num_tokens.tolist() == store.num_tokens[14:16].tolist()
    own = [value.nbytes for value in vars(store).values() if isinstance(value, np.ndarray)]
    assert sum(own) < 150 * len(store)
