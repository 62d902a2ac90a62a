"""A token store that holds its examples in memory."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from dpoctl.data.tokenize import Example
from dpoctl.model.attention import use_attention


class MemoryStore:
    """What the core reads of a `TokenStore`."""

    def __init__(self, examples: Sequence[Example], key: str = "memory") -> None:
        self.examples, self.key = list(examples), key
        self.shared_len = np.array([len(e.shared) for e in examples], dtype=np.int64)
        self.suffix_len = np.array([len(s) for e in examples for s in e.suffixes], dtype=np.int64)
        self.num_tokens = np.array(
            [int(e.shared_scored.sum() + f.sum()) for e in examples for f in e.suffixes_scored], dtype=np.int64
        )
        self.response_start = np.cumsum([0, *(len(e.suffixes) for e in examples)])
        self.pair_start = np.cumsum([0, *(len(e.pairs) for e in examples)])
        self.pairs = np.concatenate([e.pairs.reshape(-1, 2) for e in examples])
        self.label = np.array([e.label for e in examples], dtype=np.int64)
        self.target = np.array([e.target for e in examples], dtype=np.int64)
        self.source = np.array([e.source for e in examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, record: int) -> Example:
        return self.examples[record]


def random_pair(rng: np.random.Generator, vocab: int = 320, longest: int = 24) -> Example:
    """A preference pair of random tokens; sometimes the answers share their first tokens."""
    prompt, common, *lengths = rng.integers(2, longest, 4)
    common = int(rng.choice([0, 0, common]))
    return Example(
        shared=rng.integers(4, vocab, prompt + common),
        shared_scored=np.arange(prompt + common) >= prompt,
        suffixes=tuple(rng.integers(4, vocab, n) for n in lengths),
        suffixes_scored=tuple(np.ones(n, dtype=bool) for n in lengths),
        pairs=np.array([[0, 1]]),
    )


def random_dialogue(rng: np.random.Generator, vocab: int = 320) -> Example:
    """A conversation of random tokens in which two stretches are scored."""
    length = int(rng.integers(12, 40))
    ids, scored = rng.integers(4, vocab, length), np.zeros(length, dtype=bool)
    scored[4:8] = scored[length - 3 :] = True
    return Example(ids[:-1], scored[:-1], (ids[-1:],), (scored[-1:],), np.zeros((0, 2), dtype=np.int64))


def random_pairs(count: int, seed: int = 0) -> list[Example]:
    """Pairs of uneven lengths."""
    rng = np.random.default_rng(seed)
    return [random_pair(rng) for _ in range(count)]


def by_hand(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Log-probabilities of every response from the untouched model, one unpadded row at a time."""
    logps = []
    for example in examples:
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
            ids = torch.tensor([*example.shared, *suffix])
            scored = torch.tensor([*example.shared_scored, *flags])[1:]
            with use_attention(model, "sdpa"):
                rows = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            logps.append((rows.gather(1, ids[1:, None])[:, 0] * scored).sum())
    return torch.stack(logps)
