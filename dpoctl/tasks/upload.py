"""Upload of the exported model to the Hugging Face hub, the last step of a run."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from dpoctl import __version__, console
from dpoctl.errors import SetupError
from dpoctl.recipe.schema import TrainingSection
from dpoctl.redact import redact_text
from dpoctl.runs.directory import MODEL_FILES

BELOW = "*/*"
"""Everything in folders: checkpoints, samples, logs."""


def require_login(training: TrainingSection) -> None:
    """Check before training that an upload can work; the token comes from the environment or a login.

    Raises:
        SetupError: The recipe names a repository, and there is no token.
    """
    if training.hub_model_id is not None and get_token() is None:
        raise SetupError(
            f"training.hub_model_id: uploading to {training.hub_model_id} needs a login",
            hint="run `hf auth login`, or set HF_TOKEN",
        )


def upload(folder: Path, training: TrainingSection) -> None:
    """Upload a model and its tokenizer if the recipe names a repository; an error is only a warning.

    Args:
        folder: The run directory; only `MODEL_FILES` at its root are uploaded.
        training: The section that names the repository.
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
    except Exception as error:  # the network, the hub and its client may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        console.warn(
            f"the model was not uploaded to {name}: {redact_text(reason)}; "
            "run the same command with --resume to upload it without more training"
        )
        return
    console.say(f"uploaded: {done}")
