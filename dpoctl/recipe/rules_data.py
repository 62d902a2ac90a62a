"""The rules of advice about the data: what is trained on, what is measured on, and how it reads to the model."""

import math
import re
from collections.abc import Callable, Iterator

from dpoctl.recipe.expect import Path
from dpoctl.recipe.facts import Grade, Remark, Situation
from dpoctl.recipe.schema_data import Source

Rule = Callable[[Situation], Iterator[Remark]]

MAX_LENGTH: Path = ("data", "max_length")
FEW_EVAL_PAIRS, ENOUGH_EVAL_PAIRS = 30, 1000
MANY_DROPPED, MANY_UNFINISHED, MANY_RENDERED = 0.2, 0.05, 0.2
TEST_SPLIT = re.compile(r"(test|validation|valid|val|dev|eval|heldout)(_.*|\[.*)?", re.IGNORECASE)
BENCHMARKS = {
    *("allenai/reward-bench", "allenai/reward-bench-2", "allenai/preference-test-sets", "tatsu-lab/alpaca_eval"),
    *("huggingfaceh4/mt_bench_prompts", "lmarena-ai/arena-hard-auto", "lmarena-ai/arena-hard-auto-v0.1"),
    *("thu-keg/rm-bench", "scalerlab/judgebench", "google/ifeval"),
}


def evaluation(now: Situation) -> Iterator[Remark]:
    """No evaluation, one that comes too seldom, or one that cannot tell."""
    data, training, steps = now.recipe.data, now.recipe.training, now.steps
    if not data.eval and data.eval_size is None:
        yield Remark(
            "warning",
            "no-eval",
            ("data", "eval"),
            "there is no eval data: nothing will show whether training helps or harms; "
            "name some in data.eval, or hold some out, e.g. data.eval_size: 0.05",
        )
        return
    if steps is not None and training.eval_steps is not None and training.eval_steps > steps:
        when = "before and after" if training.eval_on_start else "after"
        yield Remark(
            "warning",
            "eval-rare",
            ("training", "eval_steps"),
            f"eval_steps {training.eval_steps:,} is more than the {steps:,} steps of the run: "
            f"it is evaluated {when} training and never during it",
        )
    for name, path, count in _eval_sizes(now):
        # The standard error of a share near one half; of one near 1 it is smaller.
        points = 50 / math.sqrt(count)
        if now.recipe.method == "dpo" and count < ENOUGH_EVAL_PAIRS:
            yield Remark(
                "warning" if count < FEW_EVAL_PAIRS else "note",
                "eval-small",
                path,
                f"{count:,} pairs in eval set {name!r}: the standard error of an accuracy is up to "
                f"{points:.1f} points, so differences below {2 * points:.0f} points may be chance",
            )


def _eval_sizes(now: Situation) -> Iterator[tuple[str, Path, int]]:
    data, seen = now.recipe.data, now.facts.eval_rows
    for name, sources in data.eval.items():
        limits = [source.max_samples for source in sources if source.max_samples is not None]
        count = seen.get(name, sum(limits) if len(limits) == len(sources) else None)
        if count:
            yield name, ("data", "eval", name), count
    held_out = seen.get("eval") if isinstance(data.eval_size, float) else data.eval_size
    if data.eval_size is not None and held_out:
        yield "eval", ("data", "eval_size"), int(held_out)


def sources(now: Situation) -> Iterator[Remark]:
    """Rows that results should be measured on, among those that are trained on."""
    data = now.recipe.data
    held = {_identity(source) for sources in data.eval.values() for source in sources}
    for index, source in enumerate(data.train):
        at: Path = ("data", "train", index)
        if source.path.rstrip("/").lower() in BENCHMARKS:
            message = f"{source.path} is a benchmark: results on it mean nothing for a model that was trained on it"
            yield Remark("warning", "train-on-test", (*at, "path"), message)
        elif TEST_SPLIT.fullmatch(source.split):
            yield Remark(
                "warning",
                "train-on-test",
                (*at, "split"),
                f"split {source.split!r} of {source.path} is made for measuring: train on it, and results cannot "
                "be compared with published ones",
            )
        if _identity(source) in held:
            yield Remark(
                "warning",
                "eval-is-train",
                at,
                f"{source.path} is trained on and measured on: the measure will flatter; "
                "hold rows out with data.eval_size instead",
            )


def _identity(source: Source) -> tuple[object, ...]:
    return source.path, source.name, source.split, tuple(source.data_files or ())


def rows(now: Situation) -> Iterator[Remark]:
    """Training rows that are not what they should be."""
    facts = now.facts
    used, dropped = facts.used or 0, sum(facts.rejected.values())
    if dropped > MANY_DROPPED * (used + dropped):
        reasons = ", ".join(
            f"{n:,} {reason}" for reason, n in sorted(facts.rejected.items(), key=lambda item: -item[1])
        )
        path = MAX_LENGTH if facts.rejected.get("too_long", 0) > dropped / 2 else ("data", "train")
        message = f"{dropped / (used + dropped):.0%} of the training rows are not used: {reasons}"
        yield Remark("warning", "rows-dropped", path, message)
    if facts.unfinished > MANY_UNFINISHED * used:
        yield Remark(
            "warning",
            "answers-cut",
            MAX_LENGTH,
            f"{facts.unfinished / used:.0%} of the training rows have an answer that is cut off at "
            f"max_length {now.recipe.data.max_length:,}: the model will not learn to end such answers",
        )


def wording(now: Situation) -> Iterator[Remark]:
    """Rows that a chat template was applied to before, or is never applied to."""
    facts, many = now.facts, MANY_RENDERED * now.facts.looked_at
    if facts.rendered > many:
        yield Remark(
            "warning",
            "rendered-rows",
            ("data", "train"),
            f"{facts.rendered:,} of {facts.looked_at:,} rows are messages that hold marks such as <|im_start|> or "
            "[INST]: a chat template was applied to them already, and is applied again; give their bare text",
        )
    elif facts.doubled > many:
        yield Remark(
            "warning",
            "rendered-twice",
            ("data", "train"),
            f"{facts.doubled:,} of {facts.looked_at:,} rows begin twice: a chat template was applied to parts of the "
            "conversation, which then were joined; give messages, and it is applied once",
        )
    elif facts.plain_text:
        yield Remark(
            "note",
            "plain-text",
            ("data", "train"),
            "the rows are text, which passes through no chat template, and the tokenizer has one; to train the model "
            "as it is chatted with, give messages",
        )


def template(now: Situation) -> Iterator[Remark]:
    """Control tokens that the model does not know as such."""
    split = now.facts.split_tokens
    if split:
        grade: Grade = "note" if now.facts.ends_turns else "warning"
        yield Remark(
            grade,
            "control-tokens",
            ("model", "chat_template"),
            f"{', '.join(split)} of the chat template are several tokens each in this tokenizer, so the model must "
            "learn to spell them"
            + (
                ""
                if now.facts.ends_turns
                else ", and may not stop at the end of a turn; chat_template: zephyr needs none"
            ),
        )


def context(now: Situation) -> Iterator[Remark]:
    """Rows longer than the model can read."""
    length, limit = now.recipe.data.max_length, now.facts.context_length
    if limit is not None and length > limit:
        yield Remark(
            "warning",
            "context",
            MAX_LENGTH,
            f"max_length {length:,} is more than the {limit:,} positions that the model knows",
        )


RULES: tuple[Rule, ...] = (evaluation, sources, rows, wording, template, context)
