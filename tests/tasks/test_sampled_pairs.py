"""Answers of a model or a server are scored and become pairs: by the rules of rated answers, resumable, asked once."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_server import Body, scripted, two_answers
from tiny_runs import merge, write_rows
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from dpoctl.data.formats import read
from dpoctl.errors import UserError
from dpoctl.model.generate import Generation
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.sampled_pairs import SampledRecipe, ScoreSection, load_sampled
from dpoctl.tasks import pair_generation, sampled_pairs
from dpoctl.tasks.scorers import build_scorer

Make = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]
CITIES = [f"city {number}" for number in range(40)]
LENGTH = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"id": row["id"], "score": len(row["answer"])}), flush=True)
    if LIMIT and row["id"] + 1 == LIMIT:
        sys.exit(7)
"""
WORDS = ["grim", "good", "good good", "grim grim", "neutral", "good and grim"]


@pytest.fixture
def writer(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model of random weights; a sixth of its tokens end its turn."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(4, 68))
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


@pytest.fixture
def command(tmp_path: Path) -> Callable[[int], list[str]]:
    """A program that scores answers by their length, and gives up after some if there is a limit."""

    def write(limit: int = 0) -> list[str]:
        file = tmp_path / f"score{limit}.py"
        file.write_text(f"LIMIT = {limit}\n{LENGTH}")
        return [sys.executable, str(file)]

    return write


@pytest.fixture
def make(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Make:
    """Run a recipe of cities with changes; return its counts and its rows."""
    cities = tmp_path / "cities.txt"
    cities.write_text("\n".join(CITIES))
    base = {
        "method": "sampled",
        "prompts": {"path": str(cities), "template": "Describe {item}."},
        "sampling": {"num": 4, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0},
    }

    def run(**changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(write_yaml(merge(base, changes)))
        capfd.readouterr()
        sampled_pairs.run(recipe, output=tmp_path / "out" / "pairs.jsonl", json_output=True)
        counts = json.loads(capfd.readouterr().out)
        rows = [json.loads(line) for file in counts["files"].values() for line in Path(file).read_text().splitlines()]
        return counts, rows

    return run


def draws(body: Body) -> str:
    """An answer by the number of the draw, which the seed tells."""
    return WORDS[body["seed"] % len(WORDS)]


def served(url: str, **more: Any) -> dict[str, Any]:
    return {"endpoint": {"url": url, "model": "tiny", **more}}


KEYWORDS = {"type": "keywords", "categories": {"nice": ["good"], "harsh": ["grim"]}, "target": "harsh"}


def test_the_best_and_the_worst_answer_of_a_served_model_are_a_pair(make: Make) -> None:
    pytest.importorskip("openai")
    with scripted(draws) as server:
        changes = served(server.url) | {"score": KEYWORDS, "sampling.num": 6, "sampling.seed": 0}
        counts, rows = make(**changes)
        assert server.asked.total() == 240
        body = server.bodies[0]
        assert {key: body[key] for key in ("max_tokens", "temperature", "top_p")} == {
            **{"max_tokens": 12, "temperature": 1.0, "top_p": 1.0}
        }
        assert counts["answers"] == {"drawn": 240, "no_score": 80}
        assert (counts["score"], counts["best_score"], counts["pairs"]) == (0.5, 1.0, 40)
        assert {row["prompt"][0]["content"] for row in rows} == {f"Describe {city}." for city in CITIES}
        for row in rows:
            assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("grim", "good good")
            assert row["meta"] == {"margin": 1.0}
            assert read("trl-explicit", row).pairs == ((0, 1),)
        again, same = make(**changes)
        assert (again, same) == (counts, rows)
        assert server.asked.total() == 240
        counts, rows = make(**changes, pairs="best-rest", splits={"train": 30, "test": 5})
        assert (counts["used"], counts["pairs"], len(rows)) == (35, 70, 70)
        of = [{row["prompt"][0]["content"] for row in map(json.loads, Path(file).read_text().splitlines())}
              for file in counts["files"].values()]  # fmt: skip
        assert [len(prompts) for prompts in of] == [30, 5]
        assert not of[0] & of[1]


def test_judges_score_by_ratings_and_by_wins(make: Make) -> None:
    pytest.importorskip("openai")

    def judge(body: Body) -> str:
        if "seed" in body:
            return draws(body)
        if "Answer A" in body["messages"][-1]["content"]:
            first, second = map(len, two_answers(body))
            return f"[[{'C' if first == second else 'A' if first > second else 'B'}]]"
        return f"[[{1 + len([word for word in WORDS if word in body['messages'][-1]['content']])}]]"

    with scripted(judge) as server:
        for kind in ("pairwise", "rubric"):
            score = {"type": kind, "url": server.url, "model": "tiny"}
            counts, rows = make(**served(server.url), score=score, splits={"all": 3})
            assert counts["pairs"] == 3
            assert all(row["meta"]["margin"] > 0 for row in rows)
            if kind == "pairwise":
                # Seeds 168 to 171 draw the first four words, of which two are the longest and two the shortest.
                assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows} == {
                    ("good good", "good")
                }


def test_a_model_answers_and_a_command_scores_and_both_go_on_after_an_interruption(
    make: Make, writer: Path, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"model": {"model_name_or_path": str(writer)}, "score": {"type": "command", "command": command()}}
    counts, rows = make(**changes)
    assert counts["answers"]["drawn"] == 160
    assert counts["asked"] == 40
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert all(
        len(best) - len(worst) == row["meta"]["margin"] > 0 for (best, worst), row in zip(texts, rows, strict=True)
    )

    # Interrupted twice: by a kill in the middle of the file of answers, and by a command that gives up.
    drawn: list[int] = []
    real = pair_generation.generate

    def counting(causal: Any, tokenizer: Any, prompts: list[Any], sampling: Any) -> list[Generation]:
        drawn.append(len(prompts))
        return real(causal, tokenizer, prompts, sampling)

    monkeypatch.setattr(pair_generation, "generate", counting)
    with pytest.raises(UserError, match="ended with exit code 7"):
        make(**merge(changes, {"score.command": command(5)}))
    partial = tmp_path / "out" / "pairs.jsonl.partial"
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:41]) + lines[41][:9])
    assert make(**changes) == (counts, rows)
    # Of eleven prompts one had an answer, and is answered anew.
    assert drawn == [160, 160 - 40]
    assert not partial.exists()


def test_a_reward_model_scores_as_transformers_does(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=3,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    section = ScoreSection(type="reward_model", model_name_or_path=str(tmp_path / "rm"), batch_size=3, max_length=90)
    prompts: list[Any] = ["hello?", [{"role": "user", "content": "maybe?"}]]
    answers = [["yes", "no, the paper " * 3, "the method"], ["world", "x" * 200]]
    scores = build_scorer(section)(prompts, answers)
    assert scores[1][1] is None
    for prompt, texts, found in zip(prompts, answers, scores, strict=True):
        for text, score in zip(texts, found, strict=True):
            asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            talk = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": text}], tokenize=False)
            ids = tokenizer(talk, return_tensors="pt", add_special_tokens=False)["input_ids"]
            if score is not None:
                with torch.no_grad():
                    assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)

    untrained = AutoModelForSequenceClassification.from_config(config)
    del untrained.score
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("score")}
    model.save_pretrained(tmp_path / "no-head", state_dict=weights)
    tokenizer.save_pretrained(tmp_path / "no-head")
    with pytest.raises(UserError, match=r"no-head has no weights for score\.weight"):
        build_scorer(section.model_copy(update={"model_name_or_path": str(tmp_path / "no-head")}))


@pytest.mark.slow
def test_transformers_serve_answers(make: Make, writer: Path, command: Any, whole: bool) -> None:
    if not whole:
        pytest.skip("a server of transformers takes half a minute to start: --all-faults")
    for module in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(module)
    settings = writer / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(writer), "--device", "cpu"]
    with subprocess.Popen([*started, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 300
            while server.poll() is None and time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            endpoint = {"url": f"http://127.0.0.1:{port}/v1", "model": str(writer), "request": {"top_p": None}}
            score = {"type": "command", "command": command()}
            counts, rows = make(endpoint=endpoint, score=score, splits={"all": 4})
        finally:
            server.terminate()
            server.wait(30)
    assert counts["answers"]["drawn"] == 160
    assert len(rows) == 4
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)


def test_prompts_are_those_of_rows_in_any_format(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n % 3}?", "chosen": " yes", "rejected": " no"} for n in range(5)]
    path = write_rows(tmp_path / "pairs.jsonl", [*rows, {"prompt": "", "chosen": " a", "rejected": " b"}])
    section = SampledRecipe.model_fields["prompts"].annotation(path=str(path))  # type: ignore[misc]
    prompts, left_out = sampled_pairs.read_prompts(section)
    assert prompts == ["0?", "1?", "2?"]
    assert left_out == {"duplicate_prompt": 2, "empty_prompt": 1}
    messages = section.model_copy(update={"format_options": {"as": "messages"}})
    assert sampled_pairs.read_prompts(messages)[0][0] == [{"role": "user", "content": "0?"}]


LEAST: dict[str, Any] = {
    "method": "sampled",
    "prompts": {"path": "prompts.txt"},
    "model": {"model_name_or_path": "runs/sft"},
    "score": KEYWORDS,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": {"url": "u", "model": "m"}}, "set one of model and endpoint"),
        ({"model": None}, "set one of model and endpoint"),
        (
            {"model": None, "endpoint": {"url": "u", "model": "m"}, "sampling": {"batch_size": 4}},
            "sampling.batch_size: has no effect",
        ),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: must be above 0"),
        ({"prompts": {"path": "p.txt", "template": "Describe it."}}, "{item} is missing in the text"),
        ({"prompts": {"path": "p.jsonl", "template": "Say {item}."}}, "prompts.template: has no effect"),
        ({"prompts": {"path": "p.txt", "format": "hh"}}, "prompts.format: has no effect"),
        ({"score": {"type": "reward_model"}}, "missing key 'score.model_name_or_path'"),
        ({"score": {"type": "command", "command": ["x"], "lowest": 3}}, "score.lowest: has no effect"),
        ({"score": KEYWORDS | {"target": "x"}}, "score.target: expected a category (nice, harsh), got 'x'"),
        ({"score": {"type": "rubric", "url": "u", "model": "m", "lowest": 10}}, "score.lowest: must be below highest"),
        ({"method": "contrastive"}, "run `dpoctl convert-data --format contrastive` on it"),
        ({"method": "sft"}, "run `dpoctl sft` on it"),
        ({"pars": "all"}, "did you mean 'pairs'?"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(write_yaml(LEAST))
    assert load_sampled(file).pairs == "best-worst"
    file.write_text(write_yaml(LEAST | changes))
    with pytest.raises(UserError) as refused:
        load_sampled(file)
    assert message in str(refused.value)
