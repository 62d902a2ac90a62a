"""SmolLM2-135M from SFT to a merged DPO model, beside loops over plain transformers that share no code with dpoctl."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import plain
from peft import PeftModel
from real.conftest import LEARNING_RATE, LORA, SEED, STEPS, Row, Trained
from tiny_runs import metrics_of
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoctl.model.lora import add_adapter
from dpoctl.recipe.schema import LoraSection

BETA = 0.1
QUESTION = "Name the largest planet of the solar system."
SAME: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}


def logp(model: Any, tokenizer: Any, row: Row, side: str) -> tuple[Tensor, int]:
    """The summed log-probability of an answer with its end of turn, and its tokens: one row, no padding."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    answer = row[side][0]["content"] + "<|im_end|>"
    start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
    assert ids[: len(start)] == start
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(start) - 1 : -1]
    labels = torch.tensor(ids[len(start) :])
    return logits.log_softmax(-1).gather(1, labels[:, None]).sum(), len(labels)


def steps(model: Any, loss: Any, rows: list[Row]) -> list[tuple[float, float]]:
    """Train on all rows in each step; return its losses, which are sums over rows, and norms of the gradient."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, eps=1e-6, weight_decay=0.0)
    seen = []
    for _ in range(STEPS):
        total = 0.0
        for row in rows:
            one = loss(row)
            one.backward()
            total += one.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((total, norm.item()))
    return seen


def logged(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in metrics_of(run) if "grad_norm" in row]


def assert_same(mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], **SAME)
    assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-4)


def test_sft_is_the_loop_over_plain_transformers(trained: Trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    with torch.no_grad():
        count = sum(logp(model, tokenizer, row, "chosen")[1] for row in trained.rows)
    theirs = steps(model, lambda row: -logp(model, tokenizer, row, "chosen")[0] / count, trained.rows)
    assert_same(logged(trained.sft), theirs)
    assert theirs[-1][0] < theirs[0][0] - 0.05

    exported = plain(trained.sft)
    with torch.no_grad():
        for row in trained.heldout:
            mine, expected = (logp(one, tokenizer, row, "chosen")[0].item() for one in (exported, model))
            assert mine == pytest.approx(expected, **SAME)


def test_dpo_eval_and_merge_are_the_loop_over_plain_transformers(trained: Trained, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.sft)
    before = plain(trained.sft)
    answers = [*trained.rows, *trained.heldout]
    with torch.no_grad():
        reference = [
            {side: logp(before, tokenizer, row, side)[0] for side in ("chosen", "rejected")} for row in answers
        ]

    def margin(model: Any, number: int) -> Tensor:
        ratios = (
            logp(model, tokenizer, answers[number], side)[0] - reference[number][side]
            for side in ("chosen", "rejected")
        )
        return BETA * (next(ratios) - next(ratios))

    policy = add_adapter(before.requires_grad_(False), LoraSection(**LORA), seed=SEED)
    count = len(trained.rows)
    numbers = {id(row): number for number, row in enumerate(answers)}
    theirs = steps(policy, lambda row: -logsigmoid(margin(policy, numbers[id(row)])) / count, trained.rows)
    assert_same(logged(trained.dpo), theirs)
    assert theirs[-1][0] < theirs[0][0] - 1e-3

    told = json.loads(trained.call("eval", trained.dpo, "--json"))
    with torch.no_grad():
        margins = torch.stack([margin(policy, number) for number in range(count, len(answers))])
    assert told["loss"] == pytest.approx(-logsigmoid(margins).mean().item(), **SAME)
    assert told["rewards/margins"] == pytest.approx(margins.mean().item(), **SAME)
    assert told["rewards/accuracies"] == pytest.approx((margins > 0).double().mean().item())

    trained.call("merge", trained.dpo, "-o", tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(plain(trained.sft), trained.dpo)
    row = trained.heldout[0]
    with torch.no_grad():
        expected, _ = logp(loaded, tokenizer, row, "chosen")
        assert logp(merged, tokenizer, row, "chosen")[0].item() == pytest.approx(expected.item(), rel=1e-5)
        assert logp(policy, tokenizer, row, "chosen")[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_chat_says_what_plain_transformers_generates(trained: Trained) -> None:
    arguments = ("--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "24", "--reference", "--json")
    told = json.loads(trained.call("chat", trained.dpo, *arguments))
    tokenizer = AutoTokenizer.from_pretrained(trained.sft)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    base = plain(trained.sft)
    for name, model in (("reference", base), ("policy", PeftModel.from_pretrained(base, trained.dpo))):
        made = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert told[name] == tokenizer.decode(made, skip_special_tokens=True).strip()
    # It is a small model, which takes another planet for the largest.
    assert told["policy"]
