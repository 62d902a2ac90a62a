"""Print the lowest version of every package that pyproject.toml allows, as constraints for pip."""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def main() -> None:
    """Print a line for each requirement, those of the extras included."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = {*project["dependencies"], *(line for extra in extras for line in extra)}
    print("\n".join(sorted(line.replace(">=", "==", 1) for line in requirements)))  # noqa: T201 - for a pipe


if __name__ == "__main__":
    main()
