import sys
import time
import types

import pytest
from accelerate import PartialState

from dpoctl.errors import SetupError
from dpoctl.runs import trackers as module
from dpoctl.runs.trackers import TRACKERS, TrackedRun, Trackers, check_installed

CONFIG = {"model": {"model_name_or_path": "x", "dtype": None}, "lora": {}, "targets": ["q", "v"]}


@pytest.fixture(autouse=True)
def _state():
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


class Fake:
    """Stands in for accelerate's tracker; raises at one action if told so."""

    def __init__(self, failing=None):
        self.failing = failing
        self.config = None
        self.rows = []
        self.finished = False

    def _do(self, action):
        if action == self.failing:
            raise ConnectionError("tracker down")

    def start(self):
        self._do("start")

    def store_init_configuration(self, config):
        self._do("config")
        self.config = config

    def log(self, values, step=None):
        self._do("log")
        self.rows.append((step, values))

    def finish(self):
        self._do("finish")
        self.finished = True


def use(monkeypatch, **fakes):
    for name, fake in fakes.items():
        monkeypatch.setitem(TRACKERS, name, lambda run, fake=fake: fake)


def test_a_tracker_gets_the_flat_recipe_and_prefixed_numbers(monkeypatch, tmp_path):
    fake = Fake()
    use(monkeypatch, wandb=fake)
    trackers = Trackers(["wandb"], tmp_path, config=CONFIG)
    trackers.log({"step": 3, "loss": 0.5, "note": "text", "rewards/accuracies": 1.0}, 3)
    trackers.log({"step": 3, "loss": 0.4}, 3, prefix="eval")
    trackers.finish()
    assert fake.config == {
        "model.model_name_or_path": "x",
        "model.dtype": None,
        "lora": "{}",
        "targets": "['q', 'v']",
    }
    assert fake.rows == [(3, {"train/loss": 0.5, "train/rewards/accuracies": 1.0}), (3, {"eval/loss": 0.4})]
    assert fake.finished


@pytest.mark.parametrize("failing", ["start", "config", "log", "finish"])
def test_a_tracker_that_raises_is_dropped_with_one_warning_and_the_others_go_on(monkeypatch, tmp_path, capsys, failing):
    bad, good = Fake(failing), Fake()
    use(monkeypatch, wandb=bad, trackio=good)
    trackers = Trackers(["wandb", "trackio"], tmp_path, config=CONFIG)
    for step in (1, 2, 3):
        trackers.log({"loss": 0.5}, step)
    trackers.finish()
    message = capsys.readouterr().err
    assert message.count("warning") == 1
    assert "wandb failed to" in message
    assert "tracker down" in message
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert good.finished
    assert not bad.finished


def test_a_text_is_sent_indented_so_that_markdown_shows_it_as_it_is(monkeypatch, tmp_path):
    fake = Fake()
    use(monkeypatch, wandb=fake)
    trackers = Trackers(["wandb"], tmp_path, config={})
    trackers.log_texts({"samples/1": "# one\n<b>two"}, 3)
    trackers.finish()
    assert fake.rows == [(3, {"samples/1": "    # one\n    <b>two"})]


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(module, "installed_version", lambda name: "1.0" if name == "tensorboard" else None)
    check_installed([])
    check_installed(["tensorboard"])
    with pytest.raises(SetupError, match="wandb is not installed") as refusal:
        check_installed(["tensorboard", "wandb"])
    assert refusal.value.hint == "pip install 'dpoctl[wandb]'"
    with pytest.raises(SetupError) as refusal:
        check_installed(["trackio", "wandb"])
    assert refusal.value.hint == "pip install 'dpoctl[trackio,wandb]'"


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_its_own(monkeypatch, tmp_path):
    seen = []

    def remember(run):
        seen.append(run)
        return Fake()

    monkeypatch.setitem(TRACKERS, "wandb", remember)
    Trackers(["wandb"], tmp_path, config={}, run_name="mine")
    Trackers(["wandb"], tmp_path, config={}, run_name="mine", resumed_at=10)
    Trackers(["wandb"], tmp_path, config={})
    assert seen[0].run_id == seen[1].run_id != seen[2].run_id
    assert (seen[0].run_name, seen[2].run_name) == ("mine", tmp_path.name)
    assert seen[1].resumed_at == 10


def test_nothing_is_written_when_nothing_is_tracked(tmp_path):
    Trackers([], tmp_path, config=CONFIG).log({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def fake_client(calls):
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",))
    )
    config = types.SimpleNamespace(update=lambda values, allow_val_change: calls.append(("config", values)))
    return types.SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run, config=config)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_accelerates_trackers_reach_the_client(monkeypatch, tmp_path, name):
    calls = []
    monkeypatch.setitem(sys.modules, name, fake_client(calls))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    trackers = Trackers([name], tmp_path, config={"a": 1}, run_name="mine", resumed_at=5)
    trackers.log({"loss": 0.5}, 6)
    trackers.finish()
    assert [call[0] for call in calls] == ["init", "config", "log", "finish"]
    assert calls[0][1]["project"] == "dpoctl"
    assert calls[0][1]["name"] == "mine"
    assert calls[0][1]["resume"] == "allow"
    assert calls[2] == ("log", {"train/loss": 0.5}, 6)


def test_tensorboard_writes_its_events_into_the_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(["tensorboard"], tmp_path, config=CONFIG)
    for step in (1, 2, 3):
        trackers.log({"loss": 1 / step}, step)
    trackers.finish()
    resumed = Trackers(["tensorboard"], tmp_path, config=CONFIG, resumed_at=2)
    resumed.log({"loss": 0.25}, 3)
    resumed.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_every_tracker_of_accelerate_that_we_offer_can_be_built(tmp_path):
    for name, build in TRACKERS.items():
        assert build(TrackedRun(tmp_path, "run", "id", None)).name == name


@pytest.mark.parametrize("action", ["start", "log", "finish"])
def test_a_tracker_that_hangs_costs_bounded_time_and_one_warning(monkeypatch, tmp_path, capsys, action):
    class Hanging(Fake):
        def _do(self, what):
            if what == action:
                time.sleep(60)

    for name in ("START_SECONDS", "FINISH_SECONDS"):
        monkeypatch.setattr(module, name, 0.2)
    monkeypatch.setattr(module, "MOST_WAITING", 5)
    use(monkeypatch, wandb=Hanging(), trackio=(good := Fake()))
    began = time.monotonic()
    trackers = Trackers(["wandb", "trackio"], tmp_path, config=CONFIG)
    for step in range(20):
        trackers.log({"loss": 0.5}, step)
        time.sleep(0.01)  # a step of training, in which a tracker that works can keep up
    trackers.finish()
    assert time.monotonic() - began < 30  # one call of the tracker that hangs takes 60
    assert capsys.readouterr().err.count("warning") == 1
    assert [step for step, _ in good.rows] == list(range(20))
