"""Results of `dpoctl eval`: one file for each model, data, limit and baseline, under `evals/` in a run directory."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.files import to_json, write_atomically
from dpoctl.redact import redact_text
from dpoctl.runs.names import own_folder
from dpoctl.runs.record_values import SUFFIX, RecordValues, write_record_values

FOLDER = "evals"
SAMPLES = ".samples.jsonl"
PROVENANCE = ("run", "model", "step", "data", "limit", "baseline", "official", "date")
"""The keys of a result that say what was measured; all others are numbers."""
OWN, NOT_OWN = "the run's own eval data", "not the run's own result"
_PIECES, _PIECE = 64, 4096


@dataclass(frozen=True)
class Provenance:
    """The origin of the numbers of an evaluation.

    Attributes:
        run: the folder of the model, as it was given.
        model: the fingerprint of the weights.
        step: the last training step of the run; None if it is not known.
        data: for each set its sources, the key of its tokens, and the number of its records that were used.
        limit: the number of records that each set was limited to.
        baseline: the model that the policy was compared with; None if there is none.
        official: whether these are all records of the run's own eval sets, with the settings of its recipe.
        settings: the settings that differ from the recipe's, as they were given.
    """

    run: str
    model: str
    step: int | None
    data: Mapping[str, Mapping[str, Any]]
    limit: int | None
    baseline: str | None
    official: bool
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file name that differs for every other model, data, limit or baseline."""
        keys = {name: about["key"] for name, about in self.data.items()}
        parts = [self.model, keys, self.limit, self.baseline, self.official, *self.settings]
        key = json.dumps(parts, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        source = next((path for about in self.data.values() for path in about["sources"]), "data")
        label = "official" if self.official else re.sub(r"[^\w.-]+", "-", Path(source).name).strip(".-")[:40]
        return f"{label or 'data'}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of `PROVENANCE`."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        values = {name: getattr(self, name) for name in PROVENANCE if name != "date"}
        settings = {"settings": list(self.settings)} if self.settings else {}
        return {**values, "data": {name: dict(about) for name, about in self.data.items()}, **settings, "date": date}


def write_result(
    run: Path, origin: Provenance, report: Mapping[str, Any], samples: str, values: Mapping[str, RecordValues]
) -> Path:
    """Write a result, beside those of other models, data, limits and baselines.

    Args:
        run: the run directory.
        origin: what was measured.
        report: the result.
        samples: the lines of its samples; empty if there are none.
        values: the metrics of the records of each eval set.
    """
    target = own_folder(run / FOLDER) / f"{origin.name}.json"
    if samples:
        write_atomically(target.with_suffix(SAMPLES), samples)
    if values:
        write_record_values(target.with_suffix(SUFFIX), values)
    write_atomically(target, to_json(report))
    return target


def read_results(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the results of a run, the newest first.

    Raises:
        UsageError: A file is not one that `dpoctl eval` wrote.
    """
    found = []
    for path in (run / FOLDER).glob("*.json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            report = None
        if not isinstance(report, dict) or not set(PROVENANCE) <= report.keys():
            raise UsageError(
                f"{path} is not a result of `dpoctl eval`", hint="delete it; the report then leaves it out"
            )
        found.append((path, report))
    return sorted(found, key=lambda one: (str(one[1]["date"]), one[0].name), reverse=True)


def fingerprint(folder: Path) -> str:
    """Hash names, sizes and evenly spaced pieces of the weights in a folder: other weights have another hash."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def in_words(report: Mapping[str, Any]) -> str:
    """Say in one line what the numbers of a result were measured on, and against what."""
    sets = []
    for name, about in report["data"].items():
        what = ", ".join(dict.fromkeys(map(str, about["sources"])))
        unit = "prompts" if "endpoint" in report else "records"
        first = "" if report["limit"] is None else "the first "
        label = "" if name == "eval" else f"{name}: "
        sets.append(f"{label}{first}{about['records']:,} {unit} of {what}")
    settings = f": {redact_text(', '.join(report['settings']))}" if report.get("settings") else ""
    # A served model has no run.
    kind = "" if "endpoint" in report else f" ({OWN if report['official'] else NOT_OWN + settings})"
    against = f"; against {report['baseline']}" if report["baseline"] else ""
    step = "" if report["step"] is None else f" at step {report['step']:,}"
    return f"{report['run']}{step}, on {'; '.join(sets)}{kind}{against}"
