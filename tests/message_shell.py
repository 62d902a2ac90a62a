"""Commands in this process, what they print without what differs between machines, and the text of a page."""

import contextlib
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_runs import merge

from dpoctl.cli import failure
from dpoctl.cli.app import main

RECIPE: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "./model"},
    "data": {"train": ["pairs.jsonl"], "eval": ["heldout.jsonl"], "max_length": 128},
    "training": {
        "output_dir": "runs/dpo",
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_steps": 3,
        "max_tokens_per_device": 2048,
        "seed": 1,
    },
}
# Whatever differs between machines and runs.
UNSTABLE = (
    (r"\b[\d.]+[kM]? tok/s", "# tok/s"),
    (r"\beta (\d+[hms] ?)+", "eta #"),
    (r", in (\d+[hms] ?)+;", ", in #;"),
    (r"process \d+ on \S+ is", "process # on # is"),
    (r"\b[0-9a-f]{64}\b", "#"),
    (r"\b[0-9a-f]{32}(\.[0-9a-f]{16}\.npy)?", "#"),
    (r"\brecipe [0-9a-f]{12}\b", "recipe #"),
    (r"(sha256|model) `[0-9a-f]+`", r"\1 `#`"),
    (r"has \d+ bytes instead of \d+", "has # bytes instead of #"),
    (r"[\d.]+ GB free", "# GB free"),
    (r"process \d+ (started|has ended)", r"process # \1"),
    (r"-?\b\d+\.\d+(e[+-]?\d+)?|-?\b\d+e-\d+", "#"),
    (r"\b(acc|loss|eval_[\w/]+) -?\d\S*", r"\1 #"),
    (r"(?m)^( *(policy|reference): ).*", r"\1TEXT"),
    (r"(?m)^( (finished|distinct|median_length)) .*", r"\1  #  #"),
    (r'("[a-z]+_(reference|policy)"): [\d.]+', r"\1: #"),
    (r"\b(20\d\d-\d\d-\d\d)[T\d:+]*", "DATE"),
    (r'"(model|key)": "[0-9a-f]+"', r'"\1": "#"'),
    (r"(evals/[\w.-]+)-[0-9a-f]{8}\b", r"\1-#"),
)
# The lines that tell how a run ends.
ENDS = r".*(error: |warning: step|note: runs|resumed)"


class Shell:
    """Runs commands in this process, in the folder of the tiny world, and keeps what they print."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.text = ""

    def run(self, *arguments: str, title: str = "", only: str = "") -> None:
        """Call `dpoctl` with some arguments, and keep the lines of stderr that match a pattern."""
        out, err = io.StringIO(), io.StringIO()
        code = call(arguments, out, err)
        words = (word if " " not in word else repr(word if len(word) < 40 else f"{word[:20]}...") for word in arguments)
        lines = [line for line in err.getvalue().splitlines() if re.match(only, line)]
        title = f"    # {title}" if title else ""
        self.add(f"$ {' '.join(['dpoctl', *words])}{title}", out.getvalue(), "\n".join(lines))
        self.text += f"[exit code {code}]\n\n"

    def error(self, error: Exception, title: str = "") -> None:
        """Report an error as a command does when it fails."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            failure.report(error, as_json=False, debug=False)
        self.add(f"# {title or type(error).__name__}", "", err.getvalue())
        self.text += "\n"

    def add(self, title: str, out: str, err: str = "") -> None:
        out, err = (text.replace(str(Path.cwd()), "/FOLDER") for text in (out, err))
        for pattern, stable in UNSTABLE:
            out, err = re.sub(pattern, stable, out), re.sub(pattern, stable, err)
        lines = [title, *out.splitlines()]
        lines += [f"! {line}" for line in err.splitlines()] if out or title.startswith("$") else err.splitlines()
        self.text += "".join(f"{line.rstrip()}\n" for line in lines)

    def recipe(self, changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> str:
        """Write the recipe with some changes, by dotted keys."""
        Path(name).write_text(yaml.safe_dump(merge(RECIPE, changes or {}), sort_keys=False))
        return name


def call(arguments: tuple[str, ...], out: io.StringIO, err: io.StringIO) -> int | str | None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    argv, sys.argv = sys.argv, ["dpoctl", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    return ended.value.code


HIDDEN = ("style", "pre", "svg")


class PageText(HTMLParser):
    """The text of a page, a line an element."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in HIDDEN or ("class", "text") in attrs

    def handle_endtag(self, tag: str) -> None:
        # The class of an end tag is not known, but nothing is inside of a text.
        self._hidden -= tag in HIDDEN or (tag == "p" and self._hidden > 0)

    def handle_data(self, data: str) -> None:
        data = re.sub(r" to [^·]*UTC \(.*\)", " to # UTC (#)", data)
        text = " ".join(re.sub(r"\d[\d.,]*(e-?\d+|[kMB]\b)?", "#", data).split())
        if not self._hidden and re.search(r"\w", text):
            self.lines.append(text)
