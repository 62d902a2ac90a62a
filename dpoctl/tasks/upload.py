"""The exported model on the Hugging Face hub, where a recipe names a repository: the last thing that a run does."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from dpoctl import __version__, console
from dpoctl.errors import SetupError
from dpoctl.recipe.schema import TrainingSection
from dpoctl.runs.directory import MODEL_FILES
from dpoctl.runs.redact import redact_text

BELOW = "*/*"
"""Whatever stands in a folder: checkpoints, samples, logs."""


def require_login(training: TrainingSection) -> None:
    """Refuse early what could not be uploaded; a token comes from the environment or a login, never from a recipe.

    Raises:
        SetupError: A repository is named, and there is no token.
    """
    if training.hub_model_id is not None and get_token() is None:
        raise SetupError(
            f"training.hub_model_id: {training.hub_model_id} cannot be written without a login",
            hint="run `hf auth login`, or set HF_TOKEN",
        )


def upload(folder: Path, training: TrainingSection) -> None:
    """Upload a model and its tokenizer, if the recipe says where; what goes wrong with it is a warning.

    Args:
        folder: The run directory; of it, only `MODEL_FILES` at its root.
        training: Names the repository.
    """
    name = training.hub_model_id
    if name is None:
        return
    console.say(f"uploading the model to {name}")
    try:
        client = HfApi()
        client.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        done = client.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*MODEL_FILES],
            ignore_patterns=[BELOW],
            commit_message=f"Upload a model trained with dpoctl {__version__}",
        )
    except Exception as error:  # whatever the network, the hub and its client give rise to
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        console.warn(
            f"the model was not uploaded to {name}: {redact_text(told)}; "
            "the same command with --resume uploads it, and trains nothing more"
        )
        return
    console.say(f"uploaded: {done}")
