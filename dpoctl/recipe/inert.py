"""Which keys have no effect in a given recipe: they may not be set, and the resolved recipe leaves them out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpoctl.recipe.expect import Path

if TYPE_CHECKING:
    from dpoctl.recipe.schema import Recipe

# TensorBoard calls a run by its folder.
NAMING_TRACKERS = {"wandb", "trackio"}
PAIRING = ("pairs", "min_margin", "max_pairs_per_prompt", "ties")
"""Keys of a source that say how answers are paired."""


@dataclass(frozen=True, slots=True)
class Inert:
    """Why a key has no effect.

    Args:
        reason: In a user's words.
        causes: The keys that make it so.
    """

    reason: str
    causes: tuple[Path, ...]


def inert_keys(recipe: "Recipe") -> dict[Path, Inert]:
    """Find the keys that nothing would read."""
    other = "sft" if recipe.method == "dpo" else "dpo"
    parts = (_of_the_data, _of_the_reference, _of_the_model, _of_the_adapter, _of_the_training, _of_the_samples)
    inert: dict[Path, Inert] = {(other,): Inert(f"the method is {recipe.method}", (("method",),))}
    for part in parts:
        inert |= part(recipe)
    return inert


def _of_the_reference(recipe: "Recipe") -> dict[Path, Inert]:
    if recipe.method != "dpo" or recipe.dpo.reference.sync_steps is not None:
        return {}
    why = Inert("sync_steps is not set, the reference stays where it is", (("dpo", "reference", "sync_steps"),))
    return {("dpo", "reference", "sync_alpha"): why}


def _of_the_data(recipe: "Recipe") -> dict[Path, Inert]:
    inert: dict[Path, Inert] = {}
    common: Path = ("data", "overlong")
    places = recipe.data.sources
    if not any((source.overlong or recipe.data.overlong) == "truncate" for _, source in places):
        inert[("data", "prompt_truncation")] = Inert("overlong: drop cuts no prompt", (common,))
    for at, source in places:
        if (source.overlong or recipe.data.overlong) == "drop":
            why = Inert("overlong: drop cuts no prompt", ((*at, "overlong"), common))
            inert[(*at, "prompt_truncation")] = why
        if recipe.method == "sft":
            why = Inert("the best answer alone is learned from", (("method",),))
            inert |= {(*at, key): why for key in PAIRING}
    return inert


def _of_the_model(recipe: "Recipe") -> dict[Path, Inert]:
    inert: dict[Path, Inert] = {}
    if recipe.model.from_scratch:
        why = Inert("model.from_scratch loads nothing from the hub", (("model", "from_scratch"),))
        inert |= {("model", key): why for key in ("revision", "trust_remote_code")}
    if recipe.quantization and not recipe.quantization.load_in_4bit:
        why = Inert("load_in_4bit is not true", (("quantization", "load_in_4bit"),))
        keys = (key for key in type(recipe.quantization).model_fields if key.startswith("bnb_4bit_"))
        inert |= {("quantization", key): why for key in keys}
    return inert


def _of_the_adapter(recipe: "Recipe") -> dict[Path, Inert]:
    if recipe.lora is None or recipe.lora.start == "new":
        return {}
    why = Inert("start: continue keeps the settings of the adapter it continues", (("lora", "start"),))
    return {("lora", key): why for key in type(recipe.lora).model_fields if key != "start"}


def _of_the_training(recipe: "Recipe") -> dict[Path, Inert]:
    inert: dict[Path, Inert] = {}
    if not recipe.data.eval and recipe.data.eval_size is None:
        why = Inert(
            "there is no eval data; give data.eval or data.eval_size", (("data", "eval"), ("data", "eval_size"))
        )
        inert |= {("training", key): why for key in ("eval_steps", "eval_on_start")}
    if recipe.training.max_steps is not None:
        why = Inert("max_steps says when the run ends", (("training", "max_steps"),))
        inert[("training", "num_train_epochs")] = why
    if recipe.training.optim == "rmsprop":
        why = Inert("optim: rmsprop has no such parameter", (("training", "optim"),))
        inert |= {("training", key): why for key in ("adam_beta1", "adam_beta2")}
    if not NAMING_TRACKERS & set(recipe.training.report_to):
        why = Inert(f"report_to has none of {', '.join(sorted(NAMING_TRACKERS))}", (("training", "report_to"),))
        inert[("training", "run_name")] = why
    if recipe.training.hub_model_id is None:
        why = Inert("hub_model_id is not set, nothing is uploaded", (("training", "hub_model_id"),))
        inert[("training", "hub_private_repo")] = why
    return inert


def _of_the_samples(recipe: "Recipe") -> dict[Path, Inert]:
    at: Path = ("eval", "samples")
    samples = recipe.eval.samples
    if not recipe.data.eval and recipe.data.eval_size is None:
        why = Inert(
            "there is no eval data; give data.eval or data.eval_size", (("data", "eval"), ("data", "eval_size"))
        )
        return {at: why, ("eval", "judge"): why}
    if samples is None or samples.num == 0:
        why = Inert("there are no samples; give eval.samples.num", (at, (*at, "num")))
        unused = [key for key in type(samples).model_fields if key != "num"] if samples else []
        return {("eval", "judge"): why, **{(*at, key): why for key in unused}}
    inert: dict[Path, Inert] = {}
    if samples.prompts is not None:
        inert[(*at, "num")] = Inert("prompts says how many there are", ((*at, "prompts"),))
    if samples.temperature == 0:
        why = Inert("temperature: 0 draws nothing, each text is the same again", ((*at, "temperature"),))
        inert |= {(*at, key): why for key in ("top_p", "seed", "per_prompt")}
    return inert
