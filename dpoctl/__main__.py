"""The entry point of `python -m dpoctl`, `accelerate launch -m dpoctl` and `torchrun -m dpoctl`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    if sys.platform not in ("linux", "darwin"):
        # Before anything is imported that other systems do not have.
        sys.stderr.write(f"error: dpoctl runs on Linux, not on {sys.platform}; on Windows, use WSL\n")
        sys.exit(5)
    from dpoctl.cli import app  # noqa: PLC0415 - see above

    app.main()


if __name__ == "__main__":
    main()
