"""The hub at the end of a run: whatever it does, the run is finished and its model is where it was."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, at_step, outcome, rows_of, wait_until

NAME = "somebody/model"
TOKEN = {"HF_TOKEN": "hf_" + "CanaryCanary0123456789"}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def hub(calls: Path, failing: Callable[[str], object] = lambda call: None) -> Callable[[], None]:
    """Stand in for the hub: note what it is asked, and which files it gets by the client's own choice."""

    def note(call: str, **what: Any) -> None:
        with calls.open("a") as file:
            file.write(json.dumps({"call": call} | what) + "\n")
        failing(call)

    def install() -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects

        def create_repo(self: Any, repo_id: str, **options: Any) -> None:
            note("create", name=repo_id, **options)

        def upload_folder(self: Any, repo_id: str, folder_path: Path, commit_message: str, **options: Any) -> str:
            files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            note("upload", name=repo_id, files=sorted(filter_repo_objects(files, **options)))
            return f"https://huggingface.co/{repo_id}"

        HfApi.create_repo, HfApi.upload_folder = create_repo, upload_folder  # type: ignore[method-assign,assignment]

    return install


def asked(calls: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture
def pushing(scene: Scene) -> Scene:
    return scene.changed(KINDS["sft"] | {"training.hub_model_id": NAME, "training.report_to": ["tensorboard"]})


def test_the_model_and_its_tokenizer_are_uploaded_and_nothing_else(pushing: Scene) -> None:
    out, calls = pushing.folder / "run", pushing.folder / "calls"
    assert pushing.run(out, faults=[at_step(2, lambda: 1 / 0)], **TOKEN).code == 1  # which leaves an error.log
    (out / "README.md").write_text("# A model\n")
    ended = pushing.run(out, "--resume", faults=[hub(calls)], **TOKEN)
    assert ended.code == 0, ended.err
    assert "uploaded: https://huggingface.co/somebody/model" in ended.err
    create, upload = asked(calls)
    assert create == {"call": "create", "name": NAME, "private": True, "exist_ok": True}
    assert set(upload["files"]) == MODEL | TOKENIZER | {"README.md", "model_manifest.json"}
    assert {"error.log", "metrics.jsonl", "recipe.yaml", "env.json"} < {path.name for path in out.iterdir()}


def test_a_run_that_names_no_repository_asks_nothing_of_the_hub(scene: Scene) -> None:
    calls = scene.folder / "calls"
    assert scene.run(scene.folder / "run", faults=[hub(calls)], **TOKEN).code == 0
    assert asked(calls) == []


def test_without_a_login_nothing_is_begun(pushing: Scene) -> None:
    ended = pushing.run(pushing.folder / "run", HF_TOKEN="", HF_TOKEN_PATH=str(pushing.folder / "none"))
    assert ended.code == 5
    assert ended.last.endswith(f"uploading to {NAME} needs a login; run `hf auth login`, or set HF_TOKEN")
    assert not (pushing.folder / "run").exists()


@pytest.mark.parametrize("step", ["create", "upload"])
def test_a_hub_that_fails_costs_a_warning_and_the_same_command_uploads_again(
    step: str, pushing: Scene, tally: Any
) -> None:
    out, calls = pushing.folder / "run", pushing.folder / "calls"

    def fail(call: str) -> None:
        if call == step:
            raise ConnectionError(f"no answer from https://me:{TOKEN['HF_TOKEN']}@hub\nand more")

    ended = pushing.run(out, faults=[hub(calls, fail)], **TOKEN)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert TOKEN["HF_TOKEN"] not in ended.err
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: the model was not uploaded")]
    assert warning.endswith("run the same command with --resume to upload it without more training")
    assert json.loads((out / "run_status.json").read_text())["state"] == "finished"
    before = outcome(out)
    again = pushing.run(out, "--resume", faults=[hub(calls)], **TOKEN)
    assert again.code == 0
    assert asked(calls)[-1]["call"] == "upload"
    survived = outcome(out) == before
    tally("a hub that fails", survived)
    assert survived


@pytest.mark.long("2-130")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_hub_that_hangs_is_ended_by_a_signal_and_the_model_stays(
    signum: signal.Signals, code: int, pushing: Scene, tally: Any
) -> None:
    out, calls = pushing.folder / "run", pushing.folder / "calls"
    child = pushing.start(out, faults=[hub(calls, lambda call: time.sleep(60))], **TOKEN)
    wait_until(lambda: asked(calls), child)
    child.send_signal(signum)
    ended = child.wait(10)
    assert ended.code == code
    assert "Traceback" not in ended.err
    before = outcome(out)
    assert pushing.run(out, "--resume", faults=[hub(calls)], **TOKEN).code == 0
    survived = outcome(out) == before and asked(calls)[-1]["call"] == "upload"
    tally("a hub that hangs", survived)
    assert survived


def test_a_finished_run_can_be_uploaded_later_and_elsewhere(scene: Scene) -> None:
    scene, out, calls = scene.changed(KINDS["sft"]), scene.folder / "run", scene.folder / "calls"
    scene.finish(out)
    before, steps = outcome(out), len(rows_of(out))
    ended = scene.run(out, "--resume", "--set", f"hub_model_id={NAME}", faults=[hub(calls)], **TOKEN)
    assert ended.code == 0, ended.err
    assert [call["name"] for call in asked(calls)] == [NAME, NAME]
    assert (outcome(out), len(rows_of(out))) == (before, steps)
