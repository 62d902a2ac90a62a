"""Two machines that train one sharded model: agents of torchrun on the loopback device, with a cache folder each."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, at_step, children_of, outcome, wait_until
from forked import Child, Fault, _redirect, fork, only_on

from dpoctl.cli.launch import _free_port

ROOT = Path(__file__).parents[2]
SHARDED = KINDS["dpo"] | {"training.sharding": "full", "training.ddp_timeout": 6, "training.max_tokens_per_device": 100}


def documented_line() -> list[str]:
    """The words of the line for several machines in the guide."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = re.findall(r"^torchrun --nnodes .*$", page, re.MULTILINE)
    return shlex.split(line)


def rank(*arguments: str) -> None:
    """Be a rank: what an agent starts."""
    from dpoctl.cli.app import main

    sys.argv = ["dpoctl", *arguments]
    main()


class Machines:
    """Machines with some ranks each, which run a recipe together.

    Args:
        scene: The recipe.
        out: The run directory, which they share.
        ranks: The number of ranks on each machine.
        faults: What is done in every rank.
    """

    def __init__(self, scene: Scene, out: Path, *options: str, ranks: int = 1, faults: Sequence[Fault] = ()) -> None:
        port = _free_port()
        self.agents = []
        for number in range(2):
            words = documented_line()
            words[words.index("--nproc-per-node") + 1] = str(ranks)
            words[words.index("--rdzv-endpoint") + 1] = f"127.0.0.1:{port}"
            line = [*words[1 : words.index("dpoctl") + 1], *map(str, scene.arguments(out, *options))]
            files = scene.folder / f"machine-{number}-{port}"
            cache = {"DPOCTL_CACHE": str(scene.folder / f"cache-{number}")}
            self.agents.append(_agent(line, files, faults, cache))

    def ended(self) -> list[str]:
        """Wait for all, and return what each said."""
        return [agent.wait(60).err for agent in self.agents]

    def lose(self, number: int) -> None:
        """End all processes of a machine at once."""
        agent = self.agents[number]
        for pid in (*children_of(agent.pid), agent.pid):
            os.kill(pid, signal.SIGKILL)

    @property
    def codes(self) -> list[int | None]:
        return [agent.poll() for agent in self.agents]


def _agent(line: list[str], files: Path, faults: Sequence[Fault], environment: dict[str, str]) -> Child:
    """Be torchrun, which forks its ranks here, to save the seconds of importing."""

    def work() -> None:
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        _redirect(files)
        os.environ.update(environment)
        for fault in faults:
            fault()
        config, _, arguments = config_from_args(parse_args(line))
        config.start_method = "fork"
        elastic_launch(config, rank)(*arguments[arguments.index("dpoctl") + 1 :])

    return Child(fork(work), files)


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_machines_give_the_bits_of_one(ranks: int, scene: Scene, tally: Any, whole: bool) -> None:
    if not whole:
        pytest.skip("the next test ends with these bits too: with --all-faults")
    scene, out, one = scene.changed(SHARDED), scene.folder / "two", scene.folder / "one"
    machines = Machines(scene, out, ranks=ranks)
    said = machines.ended()
    assert machines.codes == [0, 0], said
    scene.finish(one, "--num-processes", str(2 * ranks))
    survived = outcome(out) == outcome(one)
    tally("two machines, sharded", survived)
    assert survived


@pytest.mark.long
@pytest.mark.parametrize("victim", [1, 0])
def test_a_signal_to_one_machine_and_the_loss_of_one_cost_no_bit(
    victim: int, scene: Scene, tally: Any, whole: bool
) -> None:
    if victim == 0 and not whole:
        pytest.skip("the machine of rank 0: with --all-faults")
    scene, out = scene.changed(SHARDED), scene.folder / "run"
    ranks = 2 if whole else 1

    there = scene.folder / "there"
    machines = Machines(scene, out, ranks=ranks, faults=[only_on(0, at_step(3, lambda: meet(there)))])
    wait_until(there.exists, machines.agents[0])
    os.kill(machines.agents[victim].pid, signal.SIGTERM)
    there.unlink()
    said = machines.ended()
    status = json.loads((out / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143), said
    stopped = [int(step) for text in said for step in re.findall(r"stopped by signal 15 after step (\d+)", text)]
    assert len(stopped) == 2 * ranks
    assert set(stopped) == {int(status["checkpoint"].partition("-")[2])}

    at_seven = only_on(2 * ranks - 1 if victim else 0, at_step(7, lambda: meet(there)))
    machines = Machines(scene, out, "--resume", ranks=ranks, faults=[at_seven])
    wait_until(there.exists, machines.agents[victim])
    began = time.monotonic()
    machines.lose(victim)
    there.unlink()
    survivor = machines.agents[1 - victim].wait(60)
    assert time.monotonic() - began < 30
    first, *others = (line for line in survivor.err.splitlines() if "error: " in line)
    assert "got no answer from the other ranks" in first
    # Its agent ends the second rank of this machine with the first.
    assert all(re.search("got no answer from the other ranks|stopped by signal 15", line) for line in others), others
    assert len(others) < ranks

    machines = Machines(scene, out, "--resume", ranks=ranks)
    said = machines.ended()
    assert machines.codes == [0, 0], said
    scene.finish(scene.folder / "one", "--num-processes", str(2 * ranks))
    survived = outcome(out) == outcome(scene.folder / "one")
    tally("a machine that is told to stop, then lost", survived)
    assert survived
    assert all(any((scene.folder / f"cache-{number}").rglob("*.npy")) for number in range(2))


def meet(place: Path) -> None:
    """Say that this rank is there, and wait until it is sent on."""
    place.touch()
    while place.exists():
        time.sleep(0.01)


SRUN = """\
#!/usr/bin/env bash
# Start the command once for each machine, hand SIGTERM on, and end as the worst of them.
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    export SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES SLURM_PROCID=$node SLURM_NODEID=$node
    PMI_SIZE=$SLURM_JOB_NUM_NODES PMI_RANK=$node DPOCTL_CACHE=$PLACE/cache-$node "$@" &
    tasks[node]=$!
done
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [ "$1" = show ]; then printf '127.0.0.1\\n%s\\n' "$3"; else echo "$@" >> "$PLACE/requeued"; fi
"""
SCRIPTS = {script.stem: script for script in sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """SLURM as far as the scripts see it: starts one of them, with other programs in the place of some."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def install(name: str, text: str) -> None:
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)

    def start(script: str, machines: int, *arguments: object, **others: str) -> subprocess.Popen[str]:
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **others}.items():
            install(name, text)
        # The scripts take a port below 40000, by the number of the job.
        job = next(port for port in iter(_free_port, None) if port < 40000) - 20000
        variables = {"SLURM_JOB_NUM_NODES": machines, "SLURM_JOB_ID": job, "SLURM_GPUS_ON_NODE": 1}
        variables |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": 1, "PLACE": tmp_path}
        env = os.environ | {name: str(value) for name, value in variables.items()}
        env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
        line = ["bash", str(SCRIPTS[script]), *map(str, arguments)]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_a_job_of_slurm_on_two_machines_stops_in_time_and_is_put_back_into_the_queue(
    scene: Scene, tally: Any, whole: bool, cluster: Callable[..., subprocess.Popen[str]]
) -> None:
    if not whole:
        pytest.skip("in the whole suite only")
    scene, out = scene.changed(SHARDED | {"training.num_train_epochs": 12}), scene.folder / "run"
    torchrun = f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    with cluster("several-machines", 2, *scene.arguments(out), torchrun=torchrun) as job:
        deadline, metrics = time.monotonic() + 120, out / "metrics.jsonl"
        # Beyond the evaluation before the first step, which a signal breaks off.
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert (scene.folder / "requeued").read_text().startswith("requeue "), said
    status = json.loads((out / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143), said
    assert said.count("a checkpoint was written") == 2
    tally("a time limit of SLURM", True)


@pytest.mark.parametrize(
    ("script", "program", "code", "requeues"),
    [
        ("several-machines", "torchrun", 0, False),
        ("several-machines", "torchrun", 3, False),
        ("one-machine", "dpoctl", 0, False),
        ("one-machine", "dpoctl", 3, False),
        ("one-machine", "dpoctl", 138, True),
    ],
)
def test_a_job_of_slurm_that_ends_by_itself_keeps_its_exit_code(
    script: str, program: str, code: int, requeues: bool, tmp_path: Path, cluster: Callable[..., subprocess.Popen[str]]
) -> None:
    text = f'#!/usr/bin/env bash\necho "$@" > "$PLACE/line"\nexit {code}\n'
    with cluster(script, 1, "dpo", "mine.yaml", "--set", "beta=0.2", **{program: text}) as job:
        job.communicate(timeout=30)
    assert job.returncode == code
    assert (tmp_path / "requeued").exists() == requeues
    line = (tmp_path / "line").read_text()
    assert "dpo mine.yaml --set beta=0.2" in line
    assert "--set training.resume=auto" in line


def test_both_scripts_of_slurm_are_tried_and_say_how_they_are_submitted() -> None:
    assert set(SCRIPTS) == {"several-machines", "one-machine"}
    for script in SCRIPTS.values():
        assert f"sbatch {script.relative_to(ROOT)} dpo recipes/" in script.read_text(encoding="utf-8")
