"""What can go wrong by the user's hand, and the exit code that says which kind it was."""


class UserError(Exception):
    """An error that a user can mend: one line that says where, what and what to do.

    Args:
        message: Where and what, in the user's words; lower case, no trailing full stop.
        hint: What to do about it, when the message alone does not say so.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


class RunError(UserError):
    """The run started and failed: out of memory, a number that is not finite, a failed self-check."""

    exit_code = 1


class LostRanksError(RunError):
    """The other processes of the run do not answer: what they say themselves tells more."""


class UsageError(UserError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class DataError(UserError):
    """The data cannot be read, or nothing usable is in it."""

    exit_code = 3


class SetupError(UserError):
    """The machine lacks something: an extra, a device, a model that cannot be reached."""

    exit_code = 5


class StoppedError(UserError):
    """A signal ended the run.

    Args:
        signum: the signal.
        step: the step whose checkpoint was written; None where no step was being taken.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        when = "while no step was taken" if step is None else f"after step {step}; a checkpoint was written"
        super().__init__(
            f"stopped by signal {signum} {when}",
            hint="the same command with --resume goes on from there",
        )
        self.step = step
        # A process is said to exit with 128 plus the signal that ended it.
        self.exit_code = 128 + signum
