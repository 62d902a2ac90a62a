"""Advice on a recipe before it runs: rules on the optimisation, on preference losses, and on the data.

To add a rule: write a generator of diagnostics, add it to `RULES`, and add a recipe that triggers it to its test. A
warning is something that most users would change; what is only worth knowing is a note.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dpoctl import console
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, Severity, in_order
from dpoctl.recipe.document import Document
from dpoctl.recipe.facts import Facts, PlannedRun
from dpoctl.recipe.schema import Recipe
from dpoctl.redact import redact_text

Rule = Callable[[PlannedRun], Iterator[Diagnostic]]
Advice = Iterator[Diagnostic]
warning, note = partial(Diagnostic, "warning"), partial(Diagnostic, "note")
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
LEARNING_RATE: KeyPath = ("training", "learning_rate")
BATCH_SIZE: KeyPath = ("training", "global_batch_size")
MAX_LENGTH: KeyPath = ("data", "max_length")
TRAIN: KeyPath = ("data", "train")
# Learning rates above which models are known to break; for full fine-tuning, of a model with 1e9 parameters.
HIGH_RATE = {("dpo", "lora"): 1e-4, ("dpo", "full"): 5e-6, ("sft", "lora"): 1e-3, ("sft", "full"): 1e-4}
HIGH_RATE_FROM_SCRATCH = 1e-2
LOW_RATE = {("dpo", "lora"): 2e-6, ("sft", "lora"): 1e-5}
USUAL_RATE = {
    ("dpo", "lora"): "5e-6 to 5e-5",
    ("dpo", "full"): "3e-7 to 1e-6",
    ("sft", "lora"): "5e-5 to 2e-4",
    ("sft", "full"): "5e-6 to 2e-5",
}
# Losses with other rates in full fine-tuning: the highest, and the usual ones.
RATE_OF_LOSS = {"simpo": (2e-6, "3e-7 to 1e-6"), "orpo": (2e-5, "5e-6 to 8e-6")}
BILLION = 1e9
# The factor by which the highest rate may be wrong while the size of the model is unknown.
UNKNOWN_SIZE = 20
MANY_EPOCHS = {"dpo": 3, "sft": 5}
LONG_WARMUP = 0.2
FEW_STEPS = 10
# The number of steps that would be a loss without a checkpoint, for a model large enough to be slow.
LONG_RUN, SLOW_MODEL = 200, 1e8
FEW_EVAL_PAIRS, ENOUGH_EVAL_PAIRS = 30, 1000
MANY_DROPPED, MANY_UNFINISHED, MANY_RENDERED = 0.2, 0.05, 0.2
TEST_SPLIT = re.compile(r"(test|validation|valid|val|dev|eval|heldout)(_.*|\[.*)?", re.IGNORECASE)
BENCHMARKS = {
    *("allenai/reward-bench", "allenai/reward-bench-2", "allenai/preference-test-sets", "tatsu-lab/alpaca_eval"),
    *("huggingfaceh4/mt_bench_prompts", "lmarena-ai/arena-hard-auto", "lmarena-ai/arena-hard-auto-v0.1"),
    *("thu-keg/rm-bench", "scalerlab/judgebench", "google/ifeval"),
}


class BetaRange(NamedTuple):
    """The usual values of beta for a loss, and the reason for their scale."""

    low: float
    high: float
    why: str


SUM = "rewards are sums over the tokens of an answer, not means"
SUMS = BetaRange(0.01, 0.5, f"{SUM}, and a higher beta keeps the policy closer to the reference")
MEANS = BetaRange(1.0, 10.0, "rewards are means over the tokens of an answer, not sums")
BETA_RANGES = {
    "cpo": BetaRange(0.01, 0.5, SUM),
    "simpo": MEANS,
    "sigmoid_norm": MEANS,
    "orpo": BetaRange(0.05, 1.0, "it is the weight of the odds ratio beside the likelihood"),
    "sppo_hard": BetaRange(5e-4, 5e-3, "the target of the log-ratio is 1 / (2 beta)"),
    "ipo": BetaRange(0.01, 0.5, "the target of the margin is 1 / (2 beta)"),
}
"""The ranges of losses whose rewards differ from those of DPO."""
BETA_TOLERANCE = 2
"""The factor by which beta may be outside of its range."""
SMALL_STATISTICS, SMALL_QUANTILES = 16, 32
QUANTILE_LOSSES = ("aot", "aot_unpaired")
"""Losses that compare two distributions, which needs more rows than a mean."""
LENGTH_LOSSES = {"sigmoid_norm", "simpo", "r_dpo", "ld_dpo"}
"""Losses that correct for the length of answers."""
LONG_ANSWERS, CLEAR = 1.5, 2.6
"""The ratio of lengths that is worth a warning, and the standard errors from which a difference is no chance."""
KTO_BALANCE = (1.0, 4 / 3)
KTO_TOLERANCE = 0.01


def advise(
    recipe: Recipe | None,
    document: Document | None = None,
    facts: Facts | None = None,
    problems: Sequence[Diagnostic] = (),
) -> list[Diagnostic]:
    """Collect the errors of a recipe, and the advice on it.

    Args:
        recipe: The complete recipe; None if it could not be read.
        document: The recipe as written, for the places of its keys.
        facts: The facts about its data, tokenizer and model.
        problems: The errors of the recipe.

    Returns:
        The diagnostics in the order of the file.
    """
    found = list(problems)
    if recipe is not None:
        run = PlannedRun(recipe, facts or Facts())
        advice = [*run.facts.diagnostics, *(one for rule in RULES for one in rule(run))]
        # A wrong value was replaced by an example or a default, which needs no advice.
        kept = [one for one in advice if not any(problem.concerns(one.path) for problem in problems)]
        found += [document.locate(one) for one in kept] if document else kept
    return in_order(found)


def show_warnings(found: Iterable[Diagnostic]) -> None:
    """Print the diagnostics that a user must see when a run starts: all but the notes; on rank 0 only."""
    from rich.text import Text  # noqa: PLC0415 - start-up time

    for one in found:
        if one.severity != "note":
            severity = (f"{one.severity}: ", STYLES[one.severity])
            console.say(Text.assemble(f"{one.where}: ", severity, redact_text(one.message)))


def count_severities(found: Iterable[Diagnostic]) -> Mapping[Severity, int]:
    """Count diagnostics by severity."""
    counts = Counter(one.severity for one in found)
    return {severity: counts[severity] for severity in STYLES}


def learning_rate(run: PlannedRun) -> Advice:
    """Find a learning rate that breaks the model, or one that hardly changes it."""
    method, rate, loss = run.recipe.method, run.recipe.training.learning_rate, _loss_with_own_rate(run)
    task = loss or ("preferences" if method == "dpo" else "SFT")
    what = f"{task} with {'LoRA' if run.kind == 'lora' else 'full fine-tuning'}"
    usual = RATE_OF_LOSS[loss][1] if loss else USUAL_RATE[method, run.kind]
    if rate == 0:
        yield warning("lr-zero", LEARNING_RATE, "learning_rate is 0: the model learns nothing")
    elif rate < LOW_RATE.get((method, run.kind), 0):
        message = (
            f"learning_rate {_short(rate)} is low for {what}: the adapter hardly changes; the usual range is {usual}"
        )
        yield warning("lr-low", LEARNING_RATE, message)
    bound, is_known = _highest_rate(run)
    if rate > bound:
        size = "" if run.kind == "lora" else f" of {_size(run.parameters)}"
        remedy = "" if run.is_from_scratch else f"; the usual range for large models is {usual}"
        effect = f"above {_short(bound)} answers often degrade"
        message = f"learning_rate {_short(rate)} is high for {what}{size}: {effect}{remedy}"
        is_certain = is_known or rate > UNKNOWN_SIZE * bound
        yield Diagnostic("warning" if is_certain else "note", f"lr-high-{run.kind}", LEARNING_RATE, message)


def length_of_run(run: PlannedRun) -> Advice:
    """Find too many passes over the data, or too few steps to learn anything."""
    training, epochs, steps = run.recipe.training, run.min_epochs, run.steps
    many = MANY_EPOCHS[run.recipe.method]
    if epochs is not None and epochs > many and not run.is_from_scratch:
        key, what = "num_train_epochs", f"num_train_epochs {epochs:g}"
        if training.max_steps is not None:
            at_most, or_more = ("at most ", " or more") if run.facts.rows is None else ("", "")
            work = f"max_steps {training.max_steps:,} x global_batch_size {training.global_batch_size:,}"
            key, what = "max_steps", f"{work} over {at_most}{run.max_rows:,} rows is {epochs:.3g} epochs{or_more}"
        message = f"{what}: after {many} epochs models often overfit; 1 to {many} is usual"
        yield warning("epochs", ("training", key), message)
    if steps is not None and steps < FEW_STEPS and training.max_steps is None:
        counts = f"{run.facts.rows:,} rows, global_batch_size {training.global_batch_size:,}"
        message = f"the run has only {steps} optimizer steps ({counts}), so the model will hardly change"
        yield warning("few-steps", BATCH_SIZE, message)


def warmup(run: PlannedRun) -> Advice:
    """Find a warm-up that takes a large part of the run."""
    training, fraction = run.recipe.training, run.warmup_fraction
    if fraction is None or fraction <= LONG_WARMUP:
        return
    if training.warmup_steps is None:
        key, what = "warmup_ratio", f"warmup_ratio {training.warmup_ratio}"
    else:
        key, what = "warmup_steps", f"warmup_steps {training.warmup_steps} of {run.steps:,} steps"
    effect = "the full learning rate is never reached" if fraction >= 1 else f"{fraction:.0%} of the run is warm-up"
    yield warning("warmup", ("training", key), f"{what}: {effect}; 3 to 10 % is usual")


def checkpoints(run: PlannedRun) -> Advice:
    """Find a long run without checkpoints."""
    training, steps = run.recipe.training, run.steps
    is_quick = run.is_from_scratch or (run.parameters is not None and run.parameters < SLOW_MODEL)
    if steps is None or steps < LONG_RUN or is_quick:
        return
    if training.save_steps is None or training.save_steps >= steps:
        key = "output_dir" if training.save_steps is None else "save_steps"
        message = (
            f"there is no checkpoint before the end of {steps:,} steps, so an interrupted run is lost; "
            "set training.save_steps, e.g. 100"
        )
        yield warning("no-checkpoint", ("training", key), message)


def adapter(run: PlannedRun) -> Advice:
    """Find adapter settings that have no effect here."""
    lora = run.recipe.lora
    if lora is None:
        return
    if lora.lora_dropout > 0 and run.recipe.model.disable_dropout:
        message = (
            f"lora_dropout {lora.lora_dropout:g} has no effect, because model.disable_dropout is true; "
            "set that to false, or remove lora_dropout"
        )
        yield warning("lora-dropout", ("lora", "lora_dropout"), message)
    if run.facts.unmatched_targets:
        message = (
            f"lora.target_modules {', '.join(run.facts.unmatched_targets)} match no layer of the model; "
            f"its linear layers are {', '.join(run.facts.linear_layers)}"
        )
        yield warning("targets", ("lora", "target_modules"), message)


def reference(run: PlannedRun) -> Advice:
    """Find a reference that needs a second model for nothing, or that is another model."""
    recipe, at = run.recipe, ("dpo", "reference", "path")
    if recipe.method != "dpo":
        return
    if run.is_from_scratch:
        message = "preferences teach which answer is better, not how to answer; train a model with `dpoctl sft` first"
        yield warning("dpo-from-scratch", ("model", "from_scratch"), message)
    path = recipe.dpo.reference.path
    if path is not None and path == recipe.model.model_name_or_path:
        message = "this is the model to train, which is the reference by default; remove the key to avoid a second copy"
        yield warning("reference-twice", at, message)
    elif path is not None:
        message = "the reference is another model, so the loss of the first step has no known value and is not checked"
        yield note("reference-other", at, message)


def beta(run: PlannedRun) -> Advice:
    """Find a beta that is usual for another loss."""
    for path, spec in _losses(run):
        kind, value = _loss_of_beta(spec), spec.get("beta")
        if not isinstance(value, float):
            continue
        low, high, why = BETA_RANGES.get(kind, SUMS)
        is_high = value > BETA_TOLERANCE * high
        if is_high or value < low / BETA_TOLERANCE:
            size = "high" if is_high else "low"
            message = f"beta {value:g} is {size} for the loss {kind!r}: {why}; the usual range is {low:g} to {high:g}"
            yield warning(f"beta-{size}", (*path, "beta"), message)


def statistics(run: PlannedRun) -> Advice:
    """Find losses whose statistics are over few rows."""
    size = run.recipe.training.global_batch_size
    for kind in run.facts.coupling:
        is_small = size < (SMALL_QUANTILES if kind in QUANTILE_LOSSES else SMALL_STATISTICS)
        message = (
            f"the loss {kind!r} compares the rows of a step with each other: "
            f"its statistics are over the {size:,} rows of a step, on any number of devices"
        )
        yield Diagnostic("warning" if is_small else "note", "statistics-batch", BATCH_SIZE, message)


def balance(run: PlannedRun) -> Advice:
    """Find labels of one kind that outweigh the others."""
    if run.facts.labels is None:
        return
    desirable, undesirable = run.facts.labels
    for path, spec in _losses(run):
        if spec["type"] != "kto":
            continue
        if not (desirable and undesirable):
            only = "desirable" if desirable else "undesirable"
            yield warning("one-label", TRAIN, f"every training row is {only}; the loss 'kto' needs rows of both labels")
            continue
        good, bad = spec["desirable_weight"] * desirable, spec["undesirable_weight"] * undesirable
        low, high = KTO_BALANCE
        if low * bad * (1 - KTO_TOLERANCE) <= good <= high * bad * (1 + KTO_TOLERANCE):
            continue
        key = "desirable_weight" if good < low * bad else "undesirable_weight"
        needed = low * bad / desirable if good < low * bad else good / high / undesirable
        message = (
            f"{desirable:,} desirable and {undesirable:,} undesirable rows have a total weight of {good:,.4g} and "
            f"{bad:,.4g}; the KTO paper advises a ratio of 1 to 4/3, e.g. with {key}: {needed:.3g}"
        )
        yield note("kto-balance", (*path, key), message)


def evaluation(run: PlannedRun) -> Advice:
    """Find a missing evaluation, a rare one, and an eval set that is too small."""
    data, training, steps = run.recipe.data, run.recipe.training, run.steps
    if not data.eval and data.eval_size is None:
        message = (
            "there is no eval data, so nothing shows whether training helps; "
            "set data.eval, or hold out training rows with data.eval_size: 0.05"
        )
        yield warning("no-eval", ("data", "eval"), message)
        return
    if steps is not None and training.eval_steps is not None and training.eval_steps > steps:
        when = "before and after" if training.eval_on_start else "after"
        message = (
            f"eval_steps {training.eval_steps:,} is more than the {steps:,} steps of the run: "
            f"the model is evaluated {when} training, but never during it"
        )
        yield warning("eval-rare", ("training", "eval_steps"), message)
    for name, path, count in _eval_sizes(run):
        # The standard error of a share near one half; of one near 1 it is smaller.
        points = 50 / math.sqrt(count)
        if run.recipe.method == "dpo" and count < ENOUGH_EVAL_PAIRS:
            message = (
                f"eval set {name!r} has {count:,} {'pair' if count == 1 else 'pairs'}, so accuracy differences below "
                f"{2 * points:.0f} points may be chance (standard error up to {points:.1f} points)"
            )
            yield Diagnostic("warning" if count < FEW_EVAL_PAIRS else "note", "eval-small", path, message)


def sources(run: PlannedRun) -> Advice:
    """Find rows for evaluation among the training data."""
    data = run.recipe.data
    held_out = {_identity(source) for sources in data.eval.values() for source in sources}
    for index, source in enumerate(data.train):
        at: KeyPath = (*TRAIN, index)
        if source.path.rstrip("/").lower() in BENCHMARKS:
            message = f"{source.path} is a benchmark: its results mean nothing for a model that was trained on it"
            yield warning("train-on-test", (*at, "path"), message)
        elif TEST_SPLIT.fullmatch(source.split):
            message = (
                f"split {source.split!r} of {source.path} is for evaluation: "
                "after training on it, results cannot be compared with published ones"
            )
            yield warning("train-on-test", (*at, "split"), message)
        if _identity(source) in held_out:
            message = (
                f"{source.path} is used for training and for evaluation: results will be too good; "
                "hold out rows with data.eval_size instead"
            )
            yield warning("eval-is-train", at, message)


def rows(run: PlannedRun) -> Advice:
    """Find many rows of a set that are not used, or whose answers are truncated."""
    limit, facts = run.recipe.data.max_length, run.facts
    sets = [("the training rows", TRAIN, facts.train)]
    sets += [
        (f"the rows of eval set {name!r}", _path_of_eval(run, name), counts) for name, counts in facts.evals.items()
    ]
    for what, path, counts in sets:
        dropped = sum(counts.dropped.values())
        if dropped > MANY_DROPPED * (counts.used + dropped):
            by_count = sorted(counts.dropped.items(), key=lambda item: -item[1])
            at = MAX_LENGTH if counts.dropped.get("too_long", 0) > dropped / 2 else path
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in by_count)
            message = f"{dropped / (counts.used + dropped):.0%} of {what} are dropped: {reasons}"
            yield warning("rows-dropped", at, message)
        if counts.unfinished > MANY_UNFINISHED * counts.used:
            is_trained_on = counts is facts.train
            effect = "the model will not learn to end such answers" if is_trained_on else "their ends are not measured"
            message = (
                f"{counts.unfinished / counts.used:.0%} of {what} have an answer that is truncated at "
                f"max_length {limit:,}: {effect}"
            )
            yield warning("answers-cut", MAX_LENGTH, message)


def answer_lengths(run: PlannedRun) -> Advice:
    """Find chosen answers that are much longer than rejected ones."""
    lengths = run.facts.lengths
    kinds = {_loss_of_beta(spec) for _, spec in _losses(run)}
    if lengths is None or not kinds - LENGTH_LOSSES:
        return
    is_clear = lengths.chosen - lengths.rejected > CLEAR * lengths.gap_error
    if is_clear and lengths.chosen > LONG_ANSWERS * lengths.rejected:
        message = (
            f"chosen answers are {lengths.chosen / lengths.rejected:.1f} times as long as rejected ones "
            f"({lengths.chosen:.0f} and {lengths.rejected:.0f} tokens on average over {lengths.pairs:,} pairs): the "
            "policy may learn to write longer; the losses sigmoid_norm, simpo, r_dpo and ld_dpo correct for length"
        )
        yield warning("length-decides", TRAIN, message)


def wording(run: PlannedRun) -> Advice:
    """Find rows to which a chat template was applied already, or is never applied."""
    facts, many = run.facts, MANY_RENDERED * run.facts.looked_at
    if facts.rendered > many:
        message = (
            f"{facts.rendered:,} of {facts.looked_at:,} rows are messages with template tokens such as <|im_start|> "
            "or [INST]: a chat template would be applied a second time; remove these tokens from the messages"
        )
        yield warning("rendered-rows", TRAIN, message)
    elif facts.doubled > many:
        message = (
            f"{facts.doubled:,} of {facts.looked_at:,} rows start a conversation twice: a chat template was applied to "
            "its parts before they were joined; use messages instead of text"
        )
        yield warning("rendered-twice", TRAIN, message)
    elif facts.plain_text:
        message = (
            "the rows are text, so the chat template of the tokenizer is not applied; "
            "to train the model as in a chat, set format_options: {as: messages}: turns of transcripts become "
            "messages, other prompts the user's and answers the assistant's"
        )
        yield note("plain-text", TRAIN, message)


def template(run: PlannedRun) -> Advice:
    """Find control tokens of the chat template that the tokenizer does not have."""
    if run.facts.split_tokens:
        ends_turns = run.facts.ends_turns
        risk = "" if ends_turns else ", and it may not stop at the end of a turn; chat_template: zephyr avoids this"
        message = (
            f"the tokenizer splits {', '.join(run.facts.split_tokens)} of the chat template into several tokens each"
            f"{f' in {run.facts.split_rows:,} rows' if run.facts.split_rows else ''}, "
            f"so the model must learn to spell them{risk}; or add them to the tokenizer and train the embeddings"
        )
        severity: Severity = "note" if ends_turns else "warning"
        yield Diagnostic(severity, "control-tokens", ("model", "chat_template"), message)


def context(run: PlannedRun) -> Advice:
    """Find rows that are longer than the context of the model."""
    length, limit = run.recipe.data.max_length, run.facts.context_length
    if limit is not None and length > limit:
        message = f"max_length {length:,} is more than the context length of the model, {limit:,}"
        yield warning("context", MAX_LENGTH, message)


def _short(number: float) -> str:
    """Write a learning rate as people do: `5e-4`."""
    mantissa, _, exponent = f"{number:.3g}".partition("e")
    if not exponent and 0 < number < 0.01:
        mantissa, _, exponent = f"{number:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _loss_with_own_rate(run: PlannedRun) -> str | None:
    """Return a loss of the recipe that has other learning rates in full fine-tuning; None if there is none."""
    if run.kind == "lora":
        return None
    return next((spec["type"] for _, spec in _losses(run) if spec["type"] in RATE_OF_LOSS), None)


def _highest_rate(run: PlannedRun) -> tuple[float, bool]:
    """Return the highest learning rate, and whether the model size that it depends on is known."""
    loss = _loss_with_own_rate(run)
    bound = RATE_OF_LOSS[loss][0] if loss else HIGH_RATE[run.recipe.method, run.kind]
    if run.is_from_scratch:
        return HIGH_RATE_FROM_SCRATCH, True
    if run.kind == "lora":
        return bound, True
    if run.parameters is None:
        return bound, False
    # The rate falls with the width of a model, and the number of parameters grows with the square of the width.
    return float(f"{bound * max(1.0, math.sqrt(BILLION / max(1.0, run.parameters))):.1g}"), True


def _size(parameters: float | None) -> str:
    if parameters is None:
        return "a large model"
    return f"{parameters / 1e9:.3g} B parameters" if parameters >= BILLION else f"{parameters / 1e6:.3g} M parameters"


def _losses(run: PlannedRun) -> list[tuple[KeyPath, dict[str, Any]]]:
    return run.recipe.dpo.losses if run.recipe.method == "dpo" else []


def _loss_of_beta(spec: dict[str, Any]) -> str:
    """Return the loss that beta belongs to: the base loss of a loss that has one."""
    base = spec.get("base", spec["type"])
    return str(base["type"] if isinstance(base, dict) else base)


def _path_of_eval(run: PlannedRun, name: str) -> KeyPath:
    return ("data", "eval", name) if name in run.recipe.data.eval else ("data", "eval_size")


def _eval_sizes(run: PlannedRun) -> Iterator[tuple[str, KeyPath, int]]:
    data, counted = run.recipe.data, run.facts.eval_rows
    for name, sources in data.eval.items():
        limits = [source.max_samples for source in sources if source.max_samples is not None]
        count = counted.get(name, sum(limits) if len(limits) == len(sources) else None)
        if count:
            yield name, ("data", "eval", name), count
    held_out = counted.get("eval") if isinstance(data.eval_size, float) else data.eval_size
    if data.eval_size is not None and held_out:
        yield "eval", ("data", "eval_size"), int(held_out)


def _identity(source: Source) -> tuple[object, ...]:
    return source.path, source.name, source.split, tuple(source.data_files or ())


RULES: tuple[Rule, ...] = (
    *(learning_rate, length_of_run, warmup, checkpoints, adapter, reference),
    *(beta, statistics, balance),
    *(evaluation, sources, rows, answer_lengths, wording, template, context),
)
