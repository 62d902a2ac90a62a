"""What was measured to go wrong elsewhere (B1 to B25), and where each is shown to go right here."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
from fault_runs import KINDS, Scene, at_step, die, outcome, rows_of
from tiny_world import save_adapter

HERE = Path(__file__).parents[1]
SHOWN = {
    "B1": ("faults/test_kill_storm.py", "killed_at_random_instants"),
    "B2": ("faults/test_kill_storm.py", "killed_at_any_call_inside_a_save"),
    "B3": ("faults/test_kill_storm.py", "killed_at_random_instants"),
    "B4": ("faults/test_signals.py", "stops_all_at_the_same_step"),
    "B5": ("faults/test_signals.py", "stops_all_at_the_same_step"),
    "B6": ("faults/test_numbers.py", "stops_the_run_before_the_update"),
    "B7": ("faults/test_measured_failures.py", "an_evaluation_is_the_same"),
    "B8": ("faults/test_measured_failures.py", "an_evaluation_is_the_same"),
    "B9": ("tasks/test_invariance.py", "token_budgets_give_the_same_curve"),
    "B10": ("tasks/test_invariance.py", "two_processes_give_the_curve_of_one"),
    "B11": ("data/test_hostile_rows.py", "a_hostile_row_is_counted"),
    "B12": ("data/test_prepare.py", "every_row_is_used_or_rejected_with_its_place"),
    "B13": ("data/test_hostile_rows.py", "a_hostile_row_is_counted"),
    "B14": ("data/test_tokenize.py", "control_strings_in_contents_never_become_control_tokens"),
    "B15": ("data/test_hostile_rows.py", "a_hostile_row_is_counted"),
    "B16": ("faults/test_measured_failures.py", "a_tracker_that_fails_or_hangs"),
    "B17": ("faults/test_damage.py", "a_full_disk_keeps_the_old_checkpoint"),
    "B18": ("faults/test_damage.py", "damaged_in_any_file_is_never_used"),
    "B19": ("faults/test_damage.py", "damaged_in_any_file_is_never_used"),
    "B20": ("faults/test_measured_failures.py", "a_planted_secret_is_in_no_file"),
    "B21": ("faults/test_measured_failures.py", "code_that_comes_with_a_model_never_runs_unasked"),
    "B22": ("data/test_chat_template.py", "a_template_that_does_not_end_is_stopped"),
    "B23": ("data/test_chat_template.py", "ten_megabytes_is_refused"),
    "B24": ("faults/test_measured_failures.py", "the_reference_over_an_sft_adapter"),
    "B25": ("faults/test_signals.py", "stops_all_at_the_same_step"),
}


def test_every_measured_failure_has_its_test() -> None:
    assert list(SHOWN) == [f"B{number}" for number in range(1, 26)]
    missing = [name for name, (file, words) in SHOWN.items() if words not in names_of_tests(file)]
    assert missing == []


def names_of_tests(file: str) -> str:
    return "\n".join(re.findall(r"^def (test_\w+)", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.long("sft")
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_an_evaluation_is_the_same_for_any_budget_and_number_of_ranks(method: str, scene: Scene, tally: Any) -> None:
    scene = scene.changed({"method": method, "training.max_steps": 1})
    found = []
    for number, (budget, options) in enumerate([(40, ()), (200, ()), (10**6, ()), (100, ("--num-processes", "2"))]):
        out = scene.folder / f"run-{number}"
        scene.changed({"training.max_tokens_per_device": budget}).finish(out, *options)
        found.append(next(row for row in rows_of(out) if any(key.startswith("eval_") for key in row)))
    survived = all(row == pytest.approx(found[0], rel=1e-6, abs=1e-6) for row in found)
    tally("evaluation of five rows, cut up differently", survived)
    assert survived


WORDS = "anaries of many a kind/=&"
PLANTED = {
    "HF_TOKEN": "hf_CanaryCanary0123456789",
    "WANDB_API_KEY": "planted-in-the-environment",
    "DB_PASS": f"c{WORDS}1",
    "OPENAI_KEY": f"c{WORDS}2",
    "GITHUB_PAT": f"c{WORDS}3'\"",
    "DATABASE_URL": "postgres://me:canary-in-a-url@host/db",
    "MY_THING": "canarycanary",
    "NUMBER": "8817778899",
    "JSON": '{"user": "me", "password": "canary in json"}',
    "LINES": "canary one\ncanary two",
    "SSH": "-----BEGIN RSA PRIVATE KEY-----\ncanary0123456789canary\n-----END RSA PRIVATE KEY-----\n",
}
TRACES = ("anary", "planted-in", WORDS, "8817778899", "anaries")


def test_a_planted_secret_is_in_no_file(scene: Scene, tally: Any) -> None:
    def fail() -> None:
        raise ValueError(f"cannot log in: {PLANTED} {[*PLANTED.values()]} at {PLANTED['DB_PASS'][:20]}...")

    # Folders whose names begin or end like a secret, and one that is a word of the environment.
    home = scene.folder / "hf_checkpoints" / "token-data" / "secret-santa"
    shutil.copytree(Path(scene.recipe["model"]["model_name_or_path"]), home / "hf_datasets")
    shutil.copy(scene.recipe["data"]["train"][0], home / "hf_tokens.jsonl")
    places = {"model.model_name_or_path": str(home / "hf_datasets"), "data.train": [str(home / "hf_tokens.jsonl")]}
    scene = scene.changed(KINDS["dpo"] | {"eval": {"samples": {"num": 1, "max_new_tokens": 4}}} | places)
    out, env = home / "run", PLANTED | {"MY_SECRET": "secret-santa", "DPOCTL_CACHE": str(scene.folder / "cache")}
    failed = scene.run(out, faults=[at_step(3, fail)], **env)
    assert failed.code == 1
    assert (out / "error.log").exists()
    resumed = scene.finish(out, **env)
    files = scene.folder / "said"
    said = [failed, resumed, scene.run(out, "--dry-run", "--verbose", **env)]
    for arguments in (["eval", out], ["chat", out, "--reference", "--prompt", "hello"], ["report", out]):
        said.append(forked.run(*arguments, files=files, env=env))
    assert [one.code for one in said] == [1, 0, 0, 0, 0, 0], said
    assert str(home) in (out / "recipe.resolved.yaml").read_text()
    written = [path for folder in (out, scene.folder / "cache") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    texts = {path.name: path.read_bytes() for path in written}
    texts |= {f"console {number}": f"{one.out}{one.err}".encode() for number, one in enumerate(said)}
    leaks = [name for name, text in texts.items() if any(trace.encode() in text for trace in TRACES)]
    tally("a planted secret", *[name not in leaks for name in texts])
    assert leaks == []


class Failing:
    """Accelerate's tracker, of a service that is down or hangs."""

    def __init__(self, action: str, hang: bool) -> None:
        self._action, self._hang = action, hang

    def __getattr__(self, action: str) -> Any:
        def act(*args: Any, **options: Any) -> None:
            if action == self._action:
                if self._hang:
                    import time

                    time.sleep(600)
                raise ConnectionError("the service is down")

        return act


@pytest.mark.long("log-True", "start-False", "finish-False")
@pytest.mark.parametrize("hang", [False, True])
@pytest.mark.parametrize("action", ["start", "log", "finish"])
def test_a_tracker_that_fails_or_hangs_changes_nothing(action: str, hang: bool, scene: Scene, tally: Any) -> None:
    def install() -> None:
        from dpoctl.runs import trackers

        trackers.TRACKERS["tensorboard"] = lambda run: Failing(action, hang)  # type: ignore[assignment,return-value]
        trackers.START_SECONDS = trackers.FINISH_SECONDS = 1.0

    tracked = scene.changed({"training.report_to": ["tensorboard"]})
    ended = tracked.run(scene.folder / "run", faults=[install])
    assert ended.code == 0, ended.err[-2000:]
    assert ended.err.count("warning: tensorboard") == 1
    survived = outcome(scene.folder / "run") == scene.undisturbed().outcome
    tally("a tracker that fails or hangs", survived)
    assert survived


def test_the_status_of_a_finished_run_says_so(scene: Scene) -> None:
    scene.finish(scene.folder / "run")
    status = json.loads((scene.folder / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["checkpoint"]) == ("finished", 0, "step-000005")


AUTO_MAP = {
    "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.T", "evil.T"]},
}


@pytest.mark.parametrize("file", AUTO_MAP)
def test_code_that_comes_with_a_model_never_runs_unasked(file: str, scene: Scene, tally: Any) -> None:
    """Somebody at the keyboard would say yes to everything; nobody asks."""
    folder, ran, asked = (scene.folder / name for name in ("evil", "ran", "asked"))
    shutil.copytree(scene.recipe["model"]["model_name_or_path"], folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    told = json.loads((folder / file).read_text())
    if file == "config.json":
        told["model_type"] = "evil"
    else:
        told["tokenizer_class"] = "EvilTokenizer"
    (folder / file).write_text(json.dumps(told | {"auto_map": AUTO_MAP[file]}))

    def agree() -> None:
        import builtins

        builtins.input = lambda *_: (asked.write_text("") and "") or "y"  # type: ignore[assignment]

    ended = scene.changed({"model.model_name_or_path": str(folder)}).run(scene.folder / "run", faults=[agree])
    assert ended.code == 2
    assert "comes with its own code" in ended.last
    survived = not ran.exists() and not asked.exists() and "Traceback" not in ended.err
    tally("a model that brings its own code", survived)
    assert survived


@pytest.mark.long("continue-live", "new-cached", "continue-cached")
@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize("start", [{"start": "new", "r": 3}, {"start": "continue"}], ids=["new", "continue"])
def test_the_reference_over_an_sft_adapter_is_the_same_after_a_kill(
    start: dict[str, Any], reference: str, scene: Scene, tally: Any
) -> None:
    adapter = save_adapter(scene.folder / "adapter", Path(scene.recipe["model"]["model_name_or_path"]))
    changes = {"model.model_name_or_path": str(adapter), "lora": start, "dpo.reference.mode": reference}
    scene = scene.changed(KINDS["dpo"] | changes)
    whole, out = scene.folder / "whole", scene.folder / "killed"
    scene.finish(whole, DPOCTL_CACHE=f"{whole}-cache")
    assert scene.run(out, faults=[at_step(5, die)], DPOCTL_CACHE=f"{out}-cache").code == -9
    shutil.rmtree(f"{out}-cache")  # what is known by then is computed anew, beside weights that have moved
    scene.finish(out, DPOCTL_CACHE=f"{out}-cache")
    survived = outcome(out) == outcome(whole) and tables_of(f"{out}-cache") == tables_of(f"{whole}-cache")
    assert len(tables_of(f"{out}-cache")) == (2 if reference == "cached" else 0)
    tally("the reference over an SFT adapter, after a kill", survived)
    assert survived


def tables_of(cache: str) -> list[bytes]:
    return [table.read_bytes() for table in sorted(Path(cache).glob("reference/*.npy"))]


def test_the_learning_rate_of_every_step_is_the_same_after_any_kill(scene: Scene, whole: bool, tally: Any) -> None:
    """In hexadecimal: with warm-up, decay, and several micro-batches a step."""
    scene = scene.changed(KINDS["sft"] | {"training.warmup_steps": 3, "training.max_tokens_per_device": 60})
    scene.finish(scene.folder / "whole")
    rates = rates_of(scene.folder / "whole")
    assert len(set(rates)) > 8
    survived = []
    for step in (1, 3, 4, 7, 9) if whole else (1, 4, 9):
        out = scene.folder / f"killed-{step}"
        assert scene.run(out, faults=[at_step(step, die)]).code == -9
        scene.finish(out)
        survived.append(rates_of(out) == rates)
    tally("the learning rate of every step, after a kill", *survived)
    assert all(survived)


def rates_of(run: Path) -> list[str]:
    return [row["learning_rate"].hex() for row in rows_of(run) if "learning_rate" in row]
