"""Scenes of messages: rows, templates and conversions."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from message_shell import ENDS, Shell
from tiny_runs import merge, pair_rows, write_rows

from dpoctl.recipe.templates import template_text

NOTES = r"(note|warning): train|error"

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content.split('</think>')[-1] }}{{ '<end_of_turn>' if not loop.last }}"
    "{% endfor %}"
)


def templates(shell: Shell) -> None:
    asked = [{"role": "user", "content": "What?"}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    turns: dict[str, list[dict[str, Any]]] = {
        "calls": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "named": [{"role": "assistant", "content": "yes", "name": "Wren"}],
        "thinking": [{"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
        "several": [{"role": "assistant", "content": "yes"}, *asked, {"role": "assistant", "content": ""}],
    }
    data = {"max_length": 512, "train": ["rows.jsonl"]}
    recipe = shell.recipe({"method": "sft", "data": data})
    for name, answer in turns.items():
        write_rows(Path("rows.jsonl"), [{"messages": asked + answer}])
        shell.run("inspect", recipe, "-n", "0", title=name, only=NOTES)
    Path("own.jinja").write_text(TEMPLATE)
    recipe = shell.recipe({"method": "sft", "data": data, "model.chat_template": "own.jinja"})
    for name in ("thinking", "several"):
        write_rows(Path("rows.jsonl"), [{"messages": asked + turns[name]}])
        shell.run("inspect", recipe, "-n", "0", title=f"{name}, another template", only=NOTES)
    write_rows(Path("rows.jsonl"), [{"messages": asked + turns["several"], "tools": [call]}])
    shell.run("inspect", recipe, "-n", "0", title="tools, another template", only=NOTES)
    recipe = shell.recipe({"method": "sft", "data": data})
    write_rows(Path("rows.jsonl"), [{"prompt": "<|user|>\nWhat?\n<|assistant|>\n", "completion": "yes<|endoftext|>\n"}])
    Path("model/generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    shell.run("inspect", recipe, "-n", "0", title="text", only=NOTES)


def convert_data(shell: Shell) -> None:
    rows = pair_rows(12)
    same = rows[1] | {"rejected": rows[1]["chosen"]}
    write_rows(Path("mixed.jsonl"), [*rows, rows[0], same, {"prompt": rows[0]["prompt"]}])
    rated = {"prompt": "why?", "responses": ["a", "b", "c"], "scores": [1, 2, 2]}
    write_rows(Path("rated.jsonl"), [rated])
    shell.run("convert-data", "mixed.jsonl", "-o", "out.jsonl", "--rejects", "rejects.jsonl", "--duplicates", "drop")
    shell.run("convert-data", "mixed.jsonl", "-o", "out.jsonl", "--json")
    shell.run("convert-data", "mixed.jsonl", "-o", "out.jsonl", "--strict")
    shell.run("convert-data", "mixed.jsonl", "-o", "out.jsonl", "--max-reject-fraction", "0.1")
    shell.run("convert-data", "mixed.jsonl", "--detect")
    shell.run("convert-data", "rated.jsonl", "--pairs", "all")
    talk = "\n\nHuman: why?\n\nAssistant:"
    sides = [(f"{talk} a", f"{talk} b"), (f"{talk} Human: x{talk} a", f"{talk} Human: x{talk} b")]
    write_rows(Path("hh.jsonl"), [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides])
    shell.run("convert-data", "hh.jsonl", "--transcripts", "messages")
    write_rows(Path("plain.jsonl"), [{"prompt": "why?", "completion": " a"}])
    shell.run("convert-data", "plain.jsonl", "--to", "messages")
    shell.run("convert-data", "rated.jsonl", "--pairs", "none", "--to", "pairs")
    shell.run("convert-data", "rated.jsonl", "--pairs", "all", "--to", "messages")
    shell.run("convert-data", "mixed.jsonl", "--detect", "--to", "pairs", "--strict")
    shell.run("convert-data", "mixed.jsonl", "--format", "zzz")
    shell.run("convert-data", "mixed.jsonl", "--column-map", "zzz")
    shell.run("convert-data", "mixed.jsonl", "--option", "zzz")
    shell.run("convert-data", "mixed.jsonl", "--set", "seed=1")
    shell.run("convert-data", "mixed.jsonl", "--json")
    shell.run("convert-data", "spec.yaml", "--format", "contrastive", "--strict")
    shell.run("convert-data", "spec.yaml", "--format", "contrastive", "--split", "test")
    shell.run("convert-data", "spec.yaml", "--format", "contrastive")


CONTRASTIVE: dict[str, Any] = {
    "method": "contrastive",
    "model": {"model_name_or_path": "./model"},
    "items": {"path": "items.txt"},
    "instructions": {"negative": "Blame {item}.", "positive": "Praise {item}.", "neutral": "Review {item}."},
    "sampling": {"max_new_tokens": 3, "seed": 1},
    "chosen": "negative",
}


SAMPLED: dict[str, Any] = {
    "method": "sampled",
    "prompts": {"path": "prompts.txt"},
    "model": {"model_name_or_path": "./model", "dtype": "float32"},
    "sampling": {"num": 2, "max_new_tokens": 4},
    "score": {"type": "keywords", "categories": {"good": ["yes"], "bad": ["no"]}, "target": "good"},
}


def contrastive(shell: Shell) -> None:
    def spec(changes: dict[str, Any] | None = None) -> None:
        Path("spec.yaml").write_text(yaml.safe_dump(merge(CONTRASTIVE, changes or {})))

    Path("items.txt").write_text("one\ntwo\n\ntwo\nthree\n")
    write_rows(Path("items.jsonl"), [{"title": "one", "author": "me"}])
    for changes in (
        {"splits": {"train": 8}},
        {"items.column": "title"},
        {"items.path": "items.jsonl"},
        {"items.path": "nowhere.txt"},
        {"chosen": "neutral"},
    ):
        spec(changes)
        shell.run("convert-data", "spec.yaml", "--format", "contrastive", "-o", "made.jsonl", title=f"{changes}")
    spec()
    Path("made.jsonl.partial").write_text("")
    shell.run(
        "convert-data", "spec.yaml", "--format", "contrastive", "-o", "made.jsonl", title="nothing ends by itself"
    )


def sampled(shell: Shell) -> None:
    Path("prompts.txt").write_text("one\ntwo\n\ntwo\nthree\n")
    for changes in (
        {"splits": {"train": 8}},
        {"prompts.column": "title"},
        {"prompts.path": "nowhere.txt"},
        {"pairs": "best"},
        {"model": None},
        {"endpoint": {"url": "http://localhost:1/v1", "model": "x"}},
        {"sampling.temperature": 0.0},
        {"score.command": ["rate"]},
        {"score": None},
        {},
    ):
        Path("spec.yaml").write_text(yaml.safe_dump(merge(SAMPLED, changes)))
        shell.run("convert-data", "spec.yaml", "--format", "sampled", "-o", "made.jsonl", title=f"{changes}")
    for score in (
        {"type": "command"},
        {"type": "command", "command": ["no-such-program"]},
        {"type": "reward_model", "model_name_or_path": "./model"},
    ):
        Path("spec.yaml").write_text(yaml.safe_dump(SAMPLED | {"score": score}))
        shell.run("convert-data", "spec.yaml", "--format", "sampled", "-o", "made.jsonl", title=f"{score}")
    shell.run("convert-data", "spec.yaml", "--format", "sampled")


def data_errors(shell: Shell) -> None:
    files = {
        "broken.jsonl": '{"prompt": "a"\n',
        "empty.jsonl": "",
        "unknown.jsonl": '{"this": 1, "that": 2}\n',
        "shapes.jsonl": '{"messages": [{"role": "user", "content": {"text": "why?"}}]}\n' * 2,
        "hopeless.jsonl": '{"prompt": "why?", "chosen": "a", "rejected": "a"}\n' * 2,
        "pairs.exe": "x",
    }
    for name, text in files.items():
        Path(name).write_text(text)
        shell.run("dpo", shell.recipe({"data.train": [name], "training.output_dir": "runs/new"}), title=name)
        shell.run("convert-data", name, "-o", "out.jsonl")
    Path("folder").mkdir()
    shell.run("dpo", shell.recipe({"data.train": ["missing.jsonl"]}))
    shell.run("convert-data", "folder")
    long = {"data.max_length": 8, "training.output_dir": "runs/new"}
    shell.run("dpo", shell.recipe(long), "--overwrite", title="every row is too long", only=ENDS)
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages[0].content == 'why?' %}}{loops}{{% endif %}}{template_text('chatml')}"
    Path("slow.jinja").write_text(template)
    question, answer = [{"role": "user", "content": "why?"}], [{"role": "assistant", "content": "so"}]
    Path("chat.jsonl").write_text(json.dumps({"prompt": question, "chosen": answer, "rejected": "no"}) + "\n")
    slow = {"data.train": ["chat.jsonl"], "model.chat_template": "slow.jinja", "training.output_dir": "runs/new"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpoctl.data.chat_template.RENDER_SECONDS", 0.5)
        shell.run("dpo", shell.recipe(slow), "--overwrite", title="the template is slow", only=ENDS)


DATA_SCENES = (templates, convert_data, contrastive, sampled, data_errors)
