"""Files that change or vanish under a run: it goes on with what it has read, or ends in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Outcome, Scene, at_step, die, outcome
from tiny_runs import pair_rows, write_rows

Fault = Callable[[Path], object]
DURING: dict[str, Fault] = {
    "the data are edited": lambda own: write_rows(own / "pairs.jsonl", pair_rows(23, seed=9)),
    "the data are cut short": lambda own: (own / "pairs.jsonl").write_text('{"prompt": "cu'),
    "the data are deleted": lambda own: (own / "pairs.jsonl").unlink(),
    "the held-out data are deleted": lambda own: (own / "heldout.jsonl").unlink(),
    "the token stores are deleted": lambda own: shutil.rmtree(own / "cache" / "tokens"),
    "the tables of the reference are deleted": lambda own: shutil.rmtree(own / "cache" / "reference"),
    "the cache is deleted": lambda own: shutil.rmtree(own / "cache"),
    "the model is deleted": lambda own: shutil.rmtree(own / "tiny"),
    "the recipe is deleted": lambda own: (own / "run.yaml").unlink(),
    "the recipe is edited": lambda own: (own / "run.yaml").write_text("method: sft"),
    "the recipe of the run is deleted": lambda own: (own / "run" / "recipe.resolved.yaml").unlink(),
    "the status of the run is deleted": lambda own: (own / "run" / "run_status.json").unlink(),
}


@pytest.fixture
def own(scene: Scene, warm: Path) -> Scene:
    """A run whose files are all in the folder of the test."""
    for name in ("pairs.jsonl", "heldout.jsonl"):
        shutil.copy(warm / name, scene.folder)
    shutil.copytree(warm / "tiny", scene.folder / "tiny")
    here = str(scene.folder)
    return scene.changed(
        KINDS["dpo"]
        | {"model.model_name_or_path": f"{here}/tiny"}
        | {"data.train": [f"{here}/pairs.jsonl"], "data.eval": [f"{here}/heldout.jsonl"]}
    )


@pytest.fixture
def undisturbed(scene: Scene) -> Outcome:
    """The same run with files that nobody touches."""
    return scene.changed(KINDS["dpo"]).undisturbed().outcome


@pytest.mark.long(
    "the held-out data are deleted",
    "the model is deleted",
    "the recipe is deleted",
    "the recipe of the run is deleted",
    "the status of the run is deleted",
    "the tables of the reference are deleted",
    "the data are deleted",
    "the recipe is edited",
)
@pytest.mark.parametrize("what", DURING)
def test_a_run_goes_on_with_what_it_has_read(what: str, own: Scene, undisturbed: Outcome, tally: Any) -> None:
    fault = at_step(3, lambda: DURING[what](own.folder))
    ended = own.run(own.folder / "run", faults=[fault], DPOCTL_CACHE=str(own.folder / "cache"))
    assert ended.code == 0, ended.err[-2000:]
    survived = outcome(own.folder / "run") == undisturbed
    tally("a file that changes or vanishes during a run", survived)
    assert survived


GONE: dict[str, Fault] = {
    name: DURING[f"the {name} are deleted"] for name in ("token stores", "tables of the reference")
} | {"cache": DURING["the cache is deleted"]}


@pytest.mark.long("token stores")
@pytest.mark.parametrize("what", GONE)
def test_what_is_derived_is_made_anew_when_a_run_goes_on(
    what: str, own: Scene, undisturbed: Outcome, tally: Any
) -> None:
    out, cache = own.folder / "run", str(own.folder / "cache")
    assert own.run(out, faults=[at_step(5, die)], DPOCTL_CACHE=cache).code == -9
    GONE[what](own.folder)
    own.finish(out, DPOCTL_CACHE=cache)
    survived = outcome(out) == undisturbed
    tally("a cache that is gone when a run goes on", survived)
    assert survived


BETWEEN: dict[str, tuple[Fault, str]] = {
    "edited": (DURING["the data are edited"], "pairs.jsonl changed while it was read; start again"),
    "grown": (
        lambda own: (own / "pairs.jsonl").open("a").write((own / "heldout.jsonl").read_text()),
        "pairs.jsonl changed while it was read; start again",
    ),
    "cut short": (DURING["the data are cut short"], "pairs.jsonl"),
    "deleted": (DURING["the data are deleted"], "pairs.jsonl: cannot be read: No such file or directory"),
}


@pytest.mark.long("cut short", "deleted")
@pytest.mark.parametrize("what", BETWEEN)
def test_data_that_change_while_they_are_read_are_refused_and_never_cached(
    what: str, own: Scene, undisturbed: Outcome, tally: Any
) -> None:
    fault, said = BETWEEN[what]
    data, before = own.folder / "pairs.jsonl", (own.folder / "pairs.jsonl").read_bytes()

    def install() -> None:
        from dpoctl.data import prepare

        fingerprint, done = prepare.fingerprint, []

        def then(source: Any, **options: Any) -> str:
            found = fingerprint(source, **options)
            if source.path == str(data) and not done:
                done.append(fault(own.folder))
            return found

        prepare.fingerprint = then

    out, cache = own.folder / "run", str(own.folder / "cache")
    ended = own.run(out, faults=[install], DPOCTL_CACHE=cache)
    assert ended.code == 3, ended.err[-2000:]
    assert ended.last.startswith("error: ")
    assert said in ended.last
    assert "Traceback" not in ended.err
    data.write_bytes(before)
    own.finish(out, DPOCTL_CACHE=cache)
    survived = outcome(out) == undisturbed
    tally("data that change while they are read", survived)
    assert survived
