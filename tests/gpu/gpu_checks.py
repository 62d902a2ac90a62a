"""Everything that wants a GPU, in one command: checks of kernels, models, runs and memory, then speed beside TRL.

    make gpu-checks                      at most eight minutes on one H100; the table goes to gpu-checks.md
    make gpu-checks REHEARSE=1           the same on a CPU at toy shape

Each check prints a line; one that is skipped counts as failed. The python that runs this must have torch, the
packages of pyproject.toml, bitsandbytes, pytest and, for the comparison, TRL. With pytest-xdist, checks run side by
side.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIDE_BY_SIDE = 6


@dataclass(frozen=True)
class Outcome:
    """A part of the checks.

    Attributes:
        name: for the table.
        passed: how many checks.
        failed: names of those that failed or were skipped.
        figures: what checks recorded.
        seconds: that it took.
    """

    name: str
    passed: int
    failed: tuple[str, ...]
    figures: tuple[str, ...]
    seconds: float


def main() -> None:
    """Run the checks and the comparison, and write the table; the exit status says whether all checks passed."""
    arguments = parse()
    outcomes = []
    if "checks" in arguments.parts:
        outcomes.append(check("kernels, models, runs", ["test_varlen.py", "test_models.py", "test_runs.py"], arguments))
    if "memory" in arguments.parts:
        outcomes.append(check("memory", ["test_memory.py"], arguments, alone=True))
    text = "\n".join(table(outcomes))
    if "speed" in arguments.parts:
        text += "\n\n" + speed(arguments)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"\n{text}\n\nwritten to {arguments.out}\n")
    raise SystemExit(any(outcome.failed for outcome in outcomes))


def parse() -> argparse.Namespace:
    """Read the command line; what is not known goes to the comparison of speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="toy shapes on a CPU")
    parser.add_argument(
        "--parts", nargs="*", default=["checks", "memory", "speed"], choices=["checks", "memory", "speed"]
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-checks.md"), help="where the table goes")
    arguments, arguments.speed = parser.parse_known_args()
    return arguments


def check(name: str, files: list[str], arguments: argparse.Namespace, *, alone: bool = False) -> Outcome:
    """Run some of the checks, a line for each."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--tb=short"]
        command += [f"--junitxml={report}", "-o", "filterwarnings=ignore", "-o", "addopts=--import-mode=importlib"]
        command += ["--rehearse"] if arguments.rehearse else []
        if not alone and not arguments.rehearse and find_spec("xdist") is not None:
            command += ["-n", str(SIDE_BY_SIDE)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run(
            [*command, *(str(HERE / file) for file in files)], cwd=ROOT, env=environment, stdout=sys.stderr, check=False
        )
        cases = list(ET.parse(report).getroot().iter("testcase")) if report.exists() else []
    bad = [
        case.get("name", "")
        for case in cases
        if any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
    ]
    figures = [
        f"{case.get('name')}: {entry.get('name')} {entry.get('value')}"
        for case in cases
        for entry in case.iter("property")
    ]
    failed = bad if cases else ["pytest ended without a report"]
    return Outcome(name, len(cases) - len(bad), tuple(failed), tuple(figures), time.monotonic() - began)


def table(outcomes: list[Outcome]) -> list[str]:
    """Lines of markdown."""
    rows = ["| checks | passed | failed or skipped | seconds |", "|---|---|---|---|"]
    rows += [f"| {o.name} | {o.passed} | {', '.join(o.failed) or 0} | {o.seconds:.0f} |" for o in outcomes]
    return [*rows, "", *(f"- {figure}" for o in outcomes for figure in o.figures)]


def speed(arguments: argparse.Namespace) -> str:
    """The table of steps beside TRL's."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "gpu_speed.py"), *arguments.speed]
    command += ["--rehearse"] if arguments.rehearse else []
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout


if __name__ == "__main__":
    main()
