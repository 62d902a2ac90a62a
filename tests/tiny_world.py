"""Models, adapters and data on disk: whatever the changed value of a recipe key may need to find."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import pair_rows, write_rows
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HUB_ID = "someone/tiny"
GREETING = "{{ greeting | default('') }}"
DEMONSTRATION = [
    {"role": "user", "content": "hello?"},
    {"role": "assistant", "content": "no, maybe"},
    {"role": "user", "content": "yes?"},
    {"role": "assistant", "content": "world of method"},
]


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> Path:
    """Two layers of 64, with weights large enough to make differences show."""
    config = LlamaConfig(
        **{
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 3,
            "initializer_range": 0.1,
        }
        | changes
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path) -> Path:
    """An SFT adapter that does something."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def fill_hub_cache(cache: Path, revisions: dict[str, Path]) -> None:
    """Lay models out as the hub's client keeps them: revisions of one repository."""
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)


def two_turns(row: dict[str, Any]) -> dict[str, Any]:
    """A pair of answers of two turns each."""
    more = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "world of method"}]
    return row | {side: row[side] + more for side in ("chosen", "rejected")}


def rated(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Three answers with ratings; of the first row all are equal, of the last ones they differ a lot."""
    answers = [*(row[side] for side in ("chosen", "rejected")), [{"role": "assistant", "content": "maybe"}]]
    return {"prompt": row["prompt"], "responses": answers, "scores": [2 * number, number, 0]}


def safety(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Two answers, of which the better one is not always the safer one."""
    answers = {f"response_{k}": row[side][0]["content"] for k, side in enumerate(("chosen", "rejected"))}
    ids = {"better_response_id": 0, "safer_response_id": number % 2}
    return {"prompt": row["prompt"][0]["content"]} | answers | ids


def build_world(root: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Write everything, and return where it is by name."""
    greeting = PreTrainedTokenizerFast.from_pretrained(save_llama(root / "tiny", tokenizer))
    greeting.chat_template = GREETING + str(tokenizer.chat_template)
    save_llama(root / "other", tokenizer, seed=1)
    save_llama(root / "dropout", tokenizer, attention_dropout=0.5)
    save_llama(root / "greeting", greeting)
    save_adapter(root / "adapter", root / "tiny")
    fill_hub_cache(root / "hub", {"main": root / "tiny", "v2": root / "other"})
    rows = pair_rows(6)
    write_rows(root / "pairs.jsonl", rows)
    write_rows(root / "heldout.jsonl", pair_rows(3, seed=1))
    write_rows(root / "others.jsonl", pair_rows(6, seed=2))
    write_rows(root / "twice.jsonl", rows + rows[:2])
    ranked = [{**row, "responses": [row["rejected"], row["chosen"], "maybe"], "pairs": [[0, 2]]} for row in rows]
    write_rows(root / "ambiguous.jsonl", ranked)
    write_rows(root / "renamed.jsonl", [{**row, "best": row["rejected"]} for row in rows])
    ranked = [{"prompt": row["prompt"], "responses": [row["chosen"], "maybe", row["rejected"]]} for row in rows]
    write_rows(root / "rankings.jsonl", [{**row, "pairs": [[0, 1], [0, 2], [1, 2]]} for row in ranked])
    answers = [row["rejected" if number % 2 else "chosen"] for number, row in enumerate(rows)]
    labelled = zip(rows, answers, strict=True)
    write_rows(
        root / "labels.jsonl",
        [{"prompt": row["prompt"], "completion": answer, "label": answer == row["chosen"]} for row, answer in labelled],
    )
    write_rows(root / "turns.jsonl", [{"messages": DEMONSTRATION}] * 4)
    thought = [{"role": "assistant", "content": "<think>hello?</think>maybe"}]
    write_rows(root / "thinking.jsonl", [row | {"chosen": thought} for row in rows])
    write_rows(root / "sides.jsonl", [two_turns(row) for row in rows])
    write_rows(root / "rated.jsonl", [rated(row, number) for number, row in enumerate(rows)])
    write_rows(root / "safety.jsonl", [safety(row, number) for number, row in enumerate(rows)])
    (root / "again").mkdir()
    (root / "folder").mkdir()
    write_rows(root / "folder" / "one.jsonl", rows[:2])
    write_rows(root / "folder" / "two.jsonl", rows[2:])
    return {path.name: str(path) for path in root.iterdir()}
