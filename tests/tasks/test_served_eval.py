"""`dpoctl eval --model-url` without a run: what a server's texts allow to say, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Body, Reply, Scripted, length_biased, scripted
from tiny_runs import pair_rows, write_rows

pytest.importorskip("openai")
Ask = Callable[..., tuple[int, dict[str, Any]]]


def says(body: Body) -> Reply:
    """`mine` writes longer texts than `other`, and `judge` prefers longer ones."""
    if body["model"] == "judge":
        return length_biased(body)
    return {"mine": "no no never", "other": "yes"}[body["model"]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", pair_rows(5))


@pytest.fixture
def ask(main: Callable[..., int], rows: Path, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Evaluate the model `mine` of a server on five prompts, and read what is printed."""

    def call(server: Scripted, *options: str | Path, data: Path | None = rows) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        source = () if data is None else ("--data", data)
        code = main("eval", "--model-url", server.url, "--model", "mine", *source, *options, "--json")
        return code, json.loads(capfd.readouterr().out)

    return call


def test_two_served_models_are_judged_and_the_result_is_kept_in_the_folder(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with scripted(says) as server:
        judge = json.dumps({"type": "pairwise", "url": server.url, "model": "judge"})
        gates = json.dumps([{"metric": "judge.win_rate", "min": 0.9}, {"metric": "samples.finished_policy", "min": 1}])
        code, found = ask(
            server,
            *("--against", server.url, "--against-model", "other", "--repeats", "2", "--output-dir", tmp_path / "kept"),
            *("--set", f"eval.judge={judge}", "--set", f"eval.gates={gates}", "--set", "eval.samples.temperature=0.5"),
        )
        assert code == 0
        # Two draws of each model for each prompt, and two orders of each pair once: equal requests are sent once.
        asked = [body["model"] for body in server.bodies]
        assert (asked.count("mine"), asked.count("other")) == (10, 10)
        assert {header["authorization"] for header in server.headers} == {"Bearer sk-secret"}
    assert found["judge"]["win_rate"] == 1
    assert (found["judge"]["num_prompts"], found["judge"]["repeats"]) == (5, 2)
    samples = found["samples"]
    assert (samples["num"], samples["length_policy"], samples["length_reference"]) == (10, 3, 1)
    assert (samples["length_difference"], samples["finished_difference"], samples["refusals_policy"]) == (2, 0, 0)
    assert (found["run"], found["baseline"]) == (f"mine at {server.url}", f"other at {server.url}")
    assert found["data"]["eval"]["records"] == 5
    assert not found["official"]
    assert {"loss", "rewards/accuracies", "kl"} <= set(found["not_measured"])
    assert not {"loss", "rewards/accuracies", "kl"} & found.keys()
    kept = sorted((tmp_path / "kept" / "evals").iterdir())
    assert [file.name.split(".", 2)[2] for file in kept] == ["json", "samples.jsonl"]
    assert json.loads(kept[0].read_text()) == found
    assert len(kept[1].read_text().splitlines()) == 10
    assert not any("sk-secret" in file.read_text() for file in kept)


def test_a_model_folder_writes_the_texts_to_compare_with(ask: Ask, tiny_llama_folder: Path, rows: Path) -> None:
    with scripted(says) as server:
        sampled = ("--set", "eval.samples={num: 2, max_new_tokens: 6, temperature: 0}")
        _, found = ask(server, "--against", tiny_llama_folder, *sampled, "--limit", "4")
        assert len(server.bodies) == 2
        assert [body["max_tokens"] for body in server.bodies] == [6, 6]
    assert found["baseline"] == str(tiny_llama_folder)
    assert (found["samples"]["num"], found["limit"], found["data"]["eval"]["records"]) == (2, 2, 2)
    # It writes no end within six tokens.
    assert (found["samples"]["finished_policy"], found["samples"]["finished_reference"]) == (1, 0)
    assert "kl" not in found


def test_what_a_server_leaves_out_is_not_counted(ask: Ask) -> None:
    def terse(body: Body) -> Reply:
        if body["messages"][-1]["content"].startswith("0:"):
            return 400
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": "I cannot help"}}]}).encode()

    with scripted(terse) as server:
        _, found = ask(server)
    samples = found["samples"]
    assert (samples["num"], samples["unanswered"]) == (4, 1)
    assert (samples["length_policy"], samples["refusals_policy"]) == (3, 1)
    # It does not say why a text ends.
    assert not [name for name in samples if name.startswith("finished")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--set", "eval.gates=[{metric: rewards/accuracies, min: 0.5}]"),
            "rewards/accuracies needs log-probabilities",
        ),
        (("--set", "eval.gates=[{metric: kl, max: 1}]"), "eval.gates: kl needs log-probabilities"),
        (("--set", "eval.benchmarks=[arc_easy]"), "eval.benchmarks needs log-probabilities"),
        (("--set", 'eval.judge={type: command, command: ["true"]}'), "needs a baseline; pass one with --against"),
        (("--set", "model.dtype=bfloat16"), "only change keys of the section eval"),
        (("--set", "eval.samples.num=0"), "nothing to evaluate"),
        (("--against", "reference"), "a served model has no reference"),
        (("--num-processes", "2"), "evaluated by one process"),
        (("--output-dir", "prompts.jsonl"), "prompts.jsonl is not a folder"),
        (("--output-dir", "run"), "run is a run, and keeps its own results only"),
    ],
)
def test_what_a_served_model_cannot_give_is_refused_before_a_request_is_sent(
    options: tuple[str, ...], words: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("method: dpo\n")
    with scripted(says) as server:
        code, found = ask(server, *options)
        assert not server.bodies
    assert code == 2
    error = found["error"]
    assert words in f"{error['message']}; {error['hint']}"


def test_prompts_come_from_the_data_or_from_the_command_line(ask: Ask, main: Callable[..., int]) -> None:
    with scripted(says) as server:
        code, found = ask(server, data=None)
        assert (code, found["error"]["hint"]) == (2, "pass some with --data SOURCE")
        _, found = ask(server, "--set", 'eval.samples.prompts=["Who are you?"]', data=None)
        assert server.asked == {"Who are you?": 1}
    assert found["data"]["eval"]["sources"] == ["eval.samples.prompts"]
    assert main("eval", "--data", "prompts.jsonl") == 2
