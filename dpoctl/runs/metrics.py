"""The metrics of a run: one JSON object a line, readable while the run goes on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpoctl.runs.files import write_atomically


class MetricsFile:
    """`metrics.jsonl`: rows in the order of their steps.

    Log the rows of a step before its checkpoint is saved: then a run that resumes from it continues without a gap.

    Args:
        path: The file; it appears with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row so that other processes see it at once.

        Args:
            row: Flat; holds `step`. A number that is not finite, which JSON cannot say, becomes a string: `"nan"`.
        """
        strict = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        line = json.dumps(strict, allow_nan=False)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a last line that a kill cut short is not one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [row for line in lines if (row := _parse(line)) is not None]

    def truncate_after(self, step: int) -> None:
        """Forget what came after a step, so that a resumed run neither repeats nor contradicts it."""
        if self.path.exists():
            kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
            write_atomically(self.path, "".join(kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
