"""Talking with a finished run: what it answers, what the reference answers, and on which stream."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import plain

from dpoctl.cli.app import main
from dpoctl.data.tokenize import render_prompt
from dpoctl.errors import UsageError
from dpoctl.model.generate import SamplingParams, generate
from dpoctl.model.source import ModelSource
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.tasks import chat
from dpoctl.tasks.finished_run import FinishedRun

Run = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
LORA = {"lora": {"r": 4, "lora_alpha": 8}, "training.learning_rate": 3e-2}
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
QUESTION = "is the paper maybe a method?"


def answer(model: Any, run: Path, *turns: str) -> str:
    """What a model of plain transformers says, greedily, after the turns of user and assistant."""
    tokenizer = read_tokenizer(ModelSource(name=str(run)))
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    (said,) = generate(model, tokenizer, [render_prompt(tokenizer, messages, {})], GREEDY)
    return said.text


def ask(run: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    capsys.readouterr()
    chat.run(run, sampling=GREEDY, **options)
    return capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_reference_stands_beside_the_policy(
    changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dpo_recipe, changes)["training"]["output_dir"])
    base = Path(dpo_recipe["model"]["model_name_or_path"])
    trained = plain(base, run) if changes else plain(run)
    expected = {"prompt": QUESTION, "reference": answer(plain(base), run, QUESTION)}
    expected["policy"] = answer(trained, run, QUESTION)
    assert expected["policy"] != expected["reference"]
    said = json.loads(ask(run, capsys, prompt=QUESTION, reference=True, json_output=True))
    assert {name: said[name] for name in expected} == expected
    assert {type(said[f"{name}_finished"]) for name in ("reference", "policy")} == {bool}
    text = ask(run, capsys, prompt=QUESTION, reference=True)
    assert text == f"reference: {expected['reference']}\npolicy: {expected['policy']}\n"
    assert ask(run, capsys, prompt=QUESTION) == f"{expected['policy']}\n"


@pytest.mark.long("None-continue", "saved1-new")
@pytest.mark.parametrize("start", ["new", "continue"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_over_an_sft_adapter_the_reference_is_that_adapter(
    start: str,
    saved: list[str] | None,
    sft_recipe: dict[str, Any],
    dpo_recipe: dict[str, Any],
    train: Run,
    tmp_path: Path,
) -> None:
    sft = train(sft_recipe, LORA | {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    lora = {"start": start} if start == "continue" else {"start": start, "r": 3, "modules_to_save": saved}
    changes = {"model.model_name_or_path": sft, "lora": lora, "training.learning_rate": 3e-2}
    finished = FinishedRun.load(Path(train(dpo_recipe, changes)["training"]["output_dir"]), CPU)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = Path(dpo_recipe["model"]["model_name_or_path"])
    with torch.no_grad():
        before = finished.policy.causal(ids).logits
        with finished.reference() as causal:
            torch.testing.assert_close(causal(ids).logits, plain(base, Path(sft))(ids).logits, rtol=0, atol=1e-4)
        assert torch.equal(finished.policy.causal(ids).logits, before)
        expected = plain(base, Path(finished.recipe.training.output_dir))(ids).logits
        torch.testing.assert_close(before, expected, rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in finished.policy.model.parameters())


def test_another_model_of_the_recipe_is_the_reference(
    dpo_recipe: dict[str, Any], sft_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    sft = train(sft_recipe, {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    recipe = train(dpo_recipe, LORA | {"dpo.reference.path": sft})
    finished = FinishedRun.load(Path(recipe["training"]["output_dir"]), CPU)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), finished.reference() as causal:
        assert torch.equal(causal(ids).logits, plain(Path(sft))(ids).logits)


def test_a_model_from_scratch_is_compared_with_its_first_weights(sft_recipe: dict[str, Any], train: Run) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = {"from_scratch": {"config": config | {"num_attention_heads": 2}, "tokenizer": {"vocab_size": 300}}}
    recipe = train(sft_recipe | {"model": model}, {"training.learning_rate": 0.0, "training.max_steps": 1})
    finished = FinishedRun.load(Path(recipe["training"]["output_dir"]), CPU)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), finished.reference() as causal:
        assert causal is not finished.policy.causal
        assert torch.equal(causal(ids).logits, finished.policy.causal(ids).logits)


def test_a_conversation_goes_on_until_it_is_reset(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    trained = plain(Path(dpo_recipe["model"]["model_name_or_path"]), run)
    first = answer(trained, run, "hello")
    second = answer(trained, run, "hello", first, "maybe?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nmaybe?\n/reset\nhello\n"))
    assert ask(run, capsys) == f"{first}\n{second}\n{first}\n"
    assert second != answer(trained, run, "maybe?")


def test_help_is_no_turn(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\nhello\n"))
    capsys.readouterr()
    chat.run(run, sampling=GREEDY)
    out, err = capsys.readouterr()
    trained = plain(Path(dpo_recipe["model"]["model_name_or_path"]), run)
    assert out == f"{answer(trained, run, 'hello')}\n"
    assert "/reset starts a new conversation, /help shows this line, Ctrl-D exits" in err


def test_a_turn_that_does_not_fit_leaves_the_conversation_open(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    trained = plain(Path(dpo_recipe["model"]["model_name_or_path"]), run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("no " * 600 + "\nhello\n"))
    capsys.readouterr()
    chat.run(run, sampling=GREEDY)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == answer(trained, run, "hello")
    assert "leaves no room" in err


def test_a_system_message_stands_first_and_needs_a_template(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    said = ask(run, capsys, prompt=QUESTION, system="you are a reviewer who sighs")
    assert said != ask(run, capsys, prompt=QUESTION)
    (run / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        ask(run, capsys, prompt=QUESTION, system="you are a reviewer")
    assert ask(run, capsys, prompt=QUESTION)


def test_a_model_cannot_steer_the_terminal(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    monkeypatch.setattr(chat, "stream", lambda *arguments: (piece for piece in ["ok\x1b[2J", "\a\tdone\n"]))
    assert ask(run, capsys, prompt=QUESTION) == "ok\x1b[2J\a\tdone\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ask(run, capsys, prompt=QUESTION) == "ok\\x1b[2J\\x07\tdone\n\n"


def test_the_commands_work_as_a_user_calls_them(
    dpo_recipe: dict[str, Any],
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(dpo_recipe, LORA)["training"]["output_dir"]

    def call(*arguments: str) -> tuple[Any, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    options = ("--max-new-tokens", "9", "--temperature", "1", "--top-p", "0.8", "--seed", "3")
    code, out, _ = call("chat", run, "--prompt", QUESTION, *options, "--json")
    assert (code, list(json.loads(out))) == (0, ["prompt", "policy", "policy_finished"])
    code, out, _ = call("merge", run, "-o", str(tmp_path / "merged"), "--json")
    assert (code, json.loads(out)["output"]) == (0, str(tmp_path / "merged"))
    code, out, err = call("chat", str(tmp_path / "nowhere"), "--prompt", "hello")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, _, err = call("merge", run, "--dtype", "int8")
    assert (code, len(err.splitlines())) == (2, 2)


def test_a_model_folder_answers_and_has_no_reference(
    dpo_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(dpo_recipe["model"]["model_name_or_path"])
    assert ask(folder, capsys, prompt=QUESTION) == f"{answer(plain(folder), folder, QUESTION)}\n"
    with pytest.raises(UsageError, match="it has no reference; pass a run"):
        ask(folder, capsys, prompt=QUESTION, reference=True)
