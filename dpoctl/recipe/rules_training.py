"""The rules of advice about the optimisation: its learning rate, its length, its reference.

To add a rule: a generator of remarks here, in `rules_loss.py` or in `rules_data.py`, its name in `RULES`, and a recipe
that makes it in its test. A warning is for what most people would want to change; what is merely worth knowing is a
note.
"""

import math
from collections.abc import Callable, Iterator

from dpoctl.recipe.expect import Path
from dpoctl.recipe.facts import Grade, Remark, Situation

Rule = Callable[[Situation], Iterator[Remark]]

LEARNING_RATE: Path = ("training", "learning_rate")
# Peak learning rates above which models are known to lose their fluency; of full fine-tuning, for 1e9 parameters.
HIGH_RATE = {("dpo", "lora"): 1e-4, ("dpo", "full"): 5e-6, ("sft", "lora"): 1e-3, ("sft", "full"): 1e-4}
HIGH_RATE_FROM_SCRATCH = 1e-2
LOW_RATE = {("dpo", "lora"): 2e-6, ("sft", "lora"): 1e-5}
USUAL_RATE = {
    ("dpo", "lora"): "5e-6 to 5e-5",
    ("dpo", "full"): "3e-7 to 1e-6",
    ("sft", "lora"): "5e-5 to 2e-4",
    ("sft", "full"): "5e-6 to 2e-5",
}
# Losses that bear another rate when all weights are trained: the highest, and what is usual.
RATE_OF_LOSS = {"simpo": (2e-6, "3e-7 to 1e-6"), "orpo": (2e-5, "5e-6 to 8e-6")}
BILLION = 1e9
# How much higher a rate may be while nobody knows how small the model is.
UNKNOWN_SIZE = 20
MANY_EPOCHS = {"dpo": 3, "sft": 5}
LONG_WARMUP = 0.2
FEW_STEPS = 10
# Steps that somebody would be sorry to lose, of a model large enough to be slow.
LONG_RUN, SLOW_MODEL = 200, 1e8


def learning_rate(now: Situation) -> Iterator[Remark]:
    """A rate that ruins the model, or one that does not move it."""
    recipe, rate, own = now.recipe, now.recipe.training.learning_rate, _loss_of_its_own(now)
    of = (recipe.method, now.kind)
    task = own or ("preferences" if recipe.method == "dpo" else "SFT")
    what = f"{task} with {'LoRA' if now.kind == 'lora' else 'all weights'}"
    usual = RATE_OF_LOSS[own][1] if own else USUAL_RATE[of]
    if rate == 0:
        yield Remark("warning", "lr-zero", LEARNING_RATE, "learning_rate is 0: nothing is learned")
    elif rate < LOW_RATE.get(of, 0):
        yield Remark(
            "warning",
            "lr-low",
            LEARNING_RATE,
            f"learning_rate {short(rate)} is low for {what}: adapters hardly move; {usual} is usual",
        )
    bound, known = _highest_rate(now)
    if rate <= bound:
        return
    grade: Grade = "warning" if known or rate > UNKNOWN_SIZE * bound else "note"
    size = "" if now.kind == "lora" else f" of {_size(now.parameters)}"
    yield Remark(
        grade,
        f"lr-high-{now.kind}",
        LEARNING_RATE,
        f"learning_rate {short(rate)} is high for {what}{size}: above {short(bound)} answers tend to fall apart"
        + ("" if now.is_from_scratch else f"; {usual} is usual for large models"),
    )


def _loss_of_its_own(now: Situation) -> str | None:
    """The loss of all weights that bears another rate; None where there is none."""
    if now.recipe.method != "dpo" or now.kind == "lora":
        return None
    return next((spec["type"] for _, spec in now.recipe.dpo.losses if spec["type"] in RATE_OF_LOSS), None)


def _highest_rate(now: Situation) -> tuple[float, bool]:
    """The bound, and whether the size that it depends on is known."""
    own = _loss_of_its_own(now)
    bound = RATE_OF_LOSS[own][0] if own else HIGH_RATE[now.recipe.method, now.kind]
    if now.is_from_scratch:
        return HIGH_RATE_FROM_SCRATCH, True
    if now.kind == "lora":
        return bound, True
    if now.parameters is None:
        return bound, False
    # The rate that a model bears falls with its width, and its size grows with the square of that.
    return float(f"{bound * max(1.0, math.sqrt(BILLION / max(1.0, now.parameters))):.1g}"), True


def _size(parameters: float | None) -> str:
    if parameters is None:
        return "a large model"
    return f"{parameters / 1e9:.3g} B parameters" if parameters >= BILLION else f"{parameters / 1e6:.3g} M parameters"


def length_of_run(now: Situation) -> Iterator[Remark]:
    """Too many passes over the data, or too few steps to learn anything."""
    training, epochs, steps = now.recipe.training, now.epochs_at_least, now.steps
    many = MANY_EPOCHS[now.recipe.method]
    if epochs is not None and epochs > many and not now.is_from_scratch:
        by_steps = training.max_steps is not None
        told = f"num_train_epochs {epochs:g}"
        if by_steps:
            least = "at most " if now.facts.rows is None else ""
            told = (
                f"max_steps {training.max_steps:,} x global_batch_size {training.global_batch_size:,} over "
                f"{least}{now.rows_at_most:,} rows is {epochs:.3g} epochs{' or more' if least else ''}"
            )
        yield Remark(
            "warning",
            "epochs",
            ("training", "max_steps" if by_steps else "num_train_epochs"),
            f"{told}: beyond {many} the rows are learned by heart; 1 to {many} is usual",
        )
    if steps is not None and steps < FEW_STEPS and training.max_steps is None:
        yield Remark(
            "warning",
            "few-steps",
            ("training", "global_batch_size"),
            f"{steps} optimizer steps in all: {now.facts.rows:,} rows in steps of {training.global_batch_size:,}; "
            "the model will hardly change",
        )


def warmup(now: Situation) -> Iterator[Remark]:
    """A learning rate that rises for much of the run."""
    training, share = now.recipe.training, now.warmup_share
    if share is None or share <= LONG_WARMUP:
        return
    key = "warmup_ratio" if training.warmup_steps is None else "warmup_steps"
    value = training.warmup_ratio if training.warmup_steps is None else training.warmup_steps
    of = f" of {now.steps:,} steps" if training.warmup_steps is not None else ""
    told = "the full learning rate is never reached" if share >= 1 else f"{share:.0%} of the run is warm-up"
    yield Remark("warning", "warmup", ("training", key), f"{key} {value}{of}: {told}; 3 to 10 % is usual")


def checkpoints(now: Situation) -> Iterator[Remark]:
    """Nothing to go on from if a long run dies."""
    training, steps = now.recipe.training, now.steps
    quick = now.is_from_scratch or (now.parameters is not None and now.parameters < SLOW_MODEL)
    if steps is None or steps < LONG_RUN or quick:
        return
    if training.save_steps is None or training.save_steps >= steps:
        key = "output_dir" if training.save_steps is None else "save_steps"
        yield Remark(
            "warning",
            "no-checkpoint",
            ("training", key),
            f"nothing is saved before the end of {steps:,} steps: a run that is killed starts anew; "
            "set training.save_steps, e.g. 100",
        )


def adapter(now: Situation) -> Iterator[Remark]:
    """Adapter settings that do nothing here."""
    lora = now.recipe.lora
    if lora is None:
        return
    if lora.lora_dropout > 0 and now.recipe.model.disable_dropout:
        yield Remark(
            "warning",
            "lora-dropout",
            ("lora", "lora_dropout"),
            f"lora_dropout {lora.lora_dropout:g} does nothing while model.disable_dropout is true: "
            "the effective value is 0",
        )
    if now.facts.unmatched_targets:
        yield Remark(
            "warning",
            "targets",
            ("lora", "target_modules"),
            f"{', '.join(now.facts.unmatched_targets)} in lora.target_modules match nothing in this model; "
            f"its linear layers are {', '.join(now.facts.linear_layers)}",
        )


def reference(now: Situation) -> Iterator[Remark]:
    """A reference that costs a second model for nothing, or that is another model."""
    recipe = now.recipe
    if recipe.method != "dpo":
        return
    if now.is_from_scratch:
        yield Remark(
            "warning",
            "dpo-from-scratch",
            ("model", "from_scratch"),
            "preferences teach which answer is better, not how to answer: start from a model of `dpoctl sft`",
        )
    path = recipe.dpo.reference.path
    if path is not None and path == recipe.model.model_name_or_path:
        yield Remark(
            "warning",
            "reference-twice",
            ("dpo", "reference", "path"),
            "the reference is the model that training starts from anyway; without this key it needs no second copy",
        )
    elif path is not None:
        yield Remark(
            "note",
            "reference-other",
            ("dpo", "reference", "path"),
            "the reference is another model, so the first loss has no known value and is not checked",
        )


def short(number: float) -> str:
    """Write a learning rate as people do: `5e-4`."""
    mantissa, _, exponent = f"{number:.3g}".partition("e")
    if not exponent and 0 < number < 0.01:
        mantissa, _, exponent = f"{number:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


RULES: tuple[Rule, ...] = (learning_rate, length_of_run, warmup, checkpoints, adapter, reference)
