"""What the benchmark of the step works on: models of real proportions, and rows of known lengths."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from dpoctl.data.convert import Conversion, run
from dpoctl.recipe.data_section import Source

VOCABULARY = 32_000
SEED = 0
SHAPES: dict[str, dict[str, int]] = {
    "58m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "toy": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8},
}
"""Llamas; the two large ones have a key for eight, and four, queries."""
WORDS = {"8b": 128_256}
"""Rows of the embedding and the head, where they are more than the tokenizer has tokens."""
KEY_HEADS = {"58m": 8, "1b": 4, "8b": 8, "toy": 4}
LENGTHS = {"long-prompt": (1024, 128), "long-answer": (128, 512)}
"""Tokens of a prompt and of each of its two answers; `hh-harmless` are real ones."""
LORA_RANK = 16


@dataclass(frozen=True)
class Workload:
    """A model and rows on disk.

    Attributes:
        model: folder of the model and its tokenizer.
        rows: prompt, chosen and rejected as text, in the order that dpoctl's seed gives them.
        own_rows: the same in their own order.
    """

    model: Path
    rows: Path
    own_rows: Path


def build(root: Path, shape: str, profile: str, count: int, shared: Path, *, sft: bool, dtype: str) -> Workload:
    """Write a workload.

    Args:
        root: of everything that is written.
        shape: a key of `SHAPES`.
        profile: `hh-harmless`, or a key of `LENGTHS`.
        count: rows.
        shared: where the real rows and their tokenizer are.
        sft: rows of a prompt and the chosen answer.
        dtype: of the weights.
    """
    real = profile == "hh-harmless"
    tokenizer = AutoTokenizer.from_pretrained(shared / "llama-tokenizer") if real else words()
    model = save_model(root / f"{shape}-{'real' if real else 'words'}-{dtype}", shape, tokenizer, dtype)
    rows = harmless(root, shared)[:count] if real else synthetic(*LENGTHS[profile], count)
    if sft:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    name = f"{profile}-{count}{'-sft' if sft else ''}"
    # The order of the first epoch, so that both programs see the same rows in the same steps.
    order = np.random.default_rng([SEED, 0]).permutation(len(rows))
    return Workload(
        model,
        write(root / f"{name}-ordered.jsonl", [rows[at] for at in order]),
        write(root / f"{name}.jsonl", rows),
    )


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of which every word is a token, so that lengths are what they are said to be."""
    special = ["<unk>", "<s>", "</s>"]
    names = special + [f"w{number}" for number in range(VOCABULARY - len(special))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def synthetic(prompt: int, answer: int, count: int) -> list[dict[str, str]]:
    """Pairs of random words."""
    draw = random.Random(SEED)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 3)}" for _ in range(length))

    return [
        {"prompt": text(prompt), "chosen": f" {text(answer)}", "rejected": f" {text(answer)}"} for _ in range(count)
    ]


def harmless(root: Path, shared: Path) -> list[dict[str, str]]:
    """The real pairs, their prompts split off."""
    explicit = root / "explicit.jsonl"
    if not explicit.is_file():
        run(Conversion(Source(path=str(shared / "hh-harmless.jsonl.gz")), str(explicit)))
    return [as_text(json.loads(line)) for line in explicit.read_text(encoding="utf-8").splitlines()]


def as_text(row: dict[str, Any]) -> dict[str, str]:
    """Spell messages as the transcripts that they came from."""
    roles = {"user": "Human", "assistant": "Assistant"}

    def spell(messages: Any) -> str:
        if isinstance(messages, str):
            return messages
        return "".join(f"\n\n{roles[m['role']]}: {m['content']}" for m in messages)

    if isinstance(row["prompt"], str):
        return {side: row[side] for side in ("prompt", "chosen", "rejected")}
    answers = {side: " " + row[side][0]["content"] for side in ("chosen", "rejected")}
    return {"prompt": spell(row["prompt"]) + "\n\nAssistant:", **answers}


def save_model(folder: Path, shape: str, tokenizer: Any, dtype: str) -> Path:
    """Write a model of random weights, and its tokenizer."""
    if not (folder / "config.json").is_file():
        import torch

        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=WORDS.get(shape, VOCABULARY), num_key_value_heads=KEY_HEADS[shape], max_position_embeddings=8192,
            pad_token_id=tokenizer.pad_token_id or 0, bos_token_id=1, eos_token_id=2, **SHAPES[shape],
        )  # fmt: skip
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        tokenizer.save_pretrained(folder)
        # Billions of random numbers are drawn in a moment there.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows to a file, unless it is there: programs keep what they made of a file by its age."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def minimum_flops(shape: str, prompts: Any, answers: Any, scored: Any, *, lora: bool) -> float:
    """Return the FLOPs that a step on some pairs cannot do without, the reference not counted.

    Args:
        shape: a key of `SHAPES`.
        prompts: `[n]`, tokens that the answers of a prompt share.
        answers: `[n, k]`, tokens of each answer's own.
        scored: `[n]`, tokens that are predicted.
        lora: whether an adapter on every linear layer is trained, or everything.
    """
    s = SHAPES[shape]
    hidden, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    width = hidden // s["num_attention_heads"] * KEY_HEADS[shape]
    prompts, answers = np.asarray(prompts, dtype=np.float64), np.asarray(answers, dtype=np.float64)
    tokens = float(prompts.sum() + answers.sum())
    area = float((prompts * (prompts + 1) / 2).sum() + (answers * prompts[:, None] + answers * (answers + 1) / 2).sum())
    linear = 2 * layers * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * inner) * tokens
    attention = 4 * layers * hidden * area
    head = 2.0 * hidden * WORDS.get(shape, VOCABULARY) * float(np.sum(scored))
    if not lora:
        return 3 * (linear + attention + head)
    sides = 2 * 2 * hidden + 2 * (hidden + width) + 3 * (hidden + inner)
    return 2 * linear + 3 * attention + 2 * head + 6 * LORA_RANK * layers * sides * tokens
