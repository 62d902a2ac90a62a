"""The models that an evaluation compares: a run, a model of a folder or the hub, or a model that a server has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpoctl import console
from dpoctl.errors import UsageError
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe import Recipe
from dpoctl.tasks.earlier_step import with_model
from dpoctl.tasks.eval_samples import same_tokens
from dpoctl.tasks.finished_run import is_model_only, require_model
from dpoctl.tasks.served import Client, Endpoint
from dpoctl.tasks.task import build_task

REFERENCE = "reference"


@dataclass(frozen=True)
class Baseline:
    """What a policy is compared with, if it is not its reference.

    Attributes:
        name: the model, for the result.
        client: the served model; None if it is a folder or of the hub.
        folder: the folder or hub id; None if it is served.
    """

    name: str
    client: Client | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, against: str | None, model: str | None) -> "Baseline | None":
        """Read `--against` and `--against-model`; None stands for the reference.

        Raises:
            UsageError: they do not fit together, or there is no such model.
        """
        if against is not None and is_url(against):
            client = served(against, model, "--against", "--against-model")
            return cls(client.endpoint.name, client=client)
        if model is not None:
            raise UsageError("--against-model is for a served model", hint="pass its address with --against URL")
        if against is None or against == REFERENCE:
            return None
        folder = with_model(Path(against))
        if not is_model_only(folder):
            require_model(folder)
        return cls(against, folder=folder)


def is_url(text: str) -> bool:
    """Whether a text is the address of a server."""
    return text.startswith(("http://", "https://"))


def served(url: str, model: str | None, url_option: str, model_option: str) -> Client:
    """Return the client of a served model.

    Raises:
        UsageError: the address or the name is wrong or missing.
        SetupError: the client is not installed.
    """
    if not is_url(url):
        raise UsageError(f"{url_option} must be an address", hint=f"for example {url_option} http://localhost:8000/v1")
    if model is None:
        raise UsageError(f"{url_option} needs the name of the model there", hint=f"pass it with {model_option} NAME")
    return Client(Endpoint(url, model))


def reference_overrides(run: Path, recipe: Recipe, baseline: Baseline | None) -> Sequence[str]:
    """Return what makes a baseline the reference of the rewards; nothing if there are none, or other tokens."""
    if baseline is None or baseline.folder is None or recipe.method != "dpo":
        return ()
    if not (build_task(recipe).needs_reference or is_model_only(run)):
        return ()
    trust = recipe.model.trust_remote_code
    one, other = (read_tokenizer(find_source(str(at), trust_remote_code=trust)) for at in (run, baseline.folder))
    if not same_tokens(one, other):
        console.note(
            f"{baseline.name} has other tokens than {run}: their texts are compared, and rewards are not against it"
        )
        return ()
    free = ["dpo.loss.reference_free=false"] if is_model_only(run) else []
    moving = [] if recipe.dpo.reference.sync_steps is None else ["dpo.reference.sync_steps=null"]
    return [f"dpo.reference.path={baseline.folder}", *moving, *free]
