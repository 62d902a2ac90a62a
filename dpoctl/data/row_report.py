"""Summaries of a set for the terminal: rows used and rejected, lengths, and warnings."""

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpoctl import console
from dpoctl.data.sources import location
from dpoctl.data.turn_markers import described
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATE_NOTES = {
    "thinking_stub": "the chat template writes another empty thinking block before answers than before generation; "
    "training uses that of generation",
    "system_dropped": "the chat template drops the system message once an answer follows; "
    "training keeps it, as generation does",
    "history_rewritten": "the chat template writes earlier assistant turns differently from the last one",
    "thinking_dropped": "the chat template leaves the thinking out of answers; training does too; "
    "set loss_on: last if only earlier turns lose it, else model.chat_template to a template that writes it",
    "thinking_doubled": "the chat template writes an empty thinking block before the answer's own thinking; "
    "move the thinking to the key reasoning_content of the message",
    "thinking_empty": "the chat template writes an empty thinking block in answers, which is trained on; "
    "set train_on_think: nonempty to keep it out of the loss",
    "thinking_untrained": "thinking blocks are kept out of the loss, as train_on_think says",
    "system_ignored": "the chat template does not write the system message",
    "names_ignored": "the chat template does not write the names of messages",
    "next_marker": "the model stops at the marker of the next turn; training ends answers with that marker",
    "turns_without_end": "the chat template writes nothing behind earlier assistant turns, so that no end is learned "
    "there; set loss_on: last, or model.chat_template to a template that ends every turn",
    "empty_turns": "assistant turns are empty; training learns to answer nothing there",
    "stop_in_text": "answers of text end in a stop token of the model, which ends them in place of the "
    "end-of-sequence token; stop tokens and white space behind it were cut",
    "parts_early": "the answers part before their last turns, and loss_on: last compares those alone; "
    "set dpo.loss_on: assistant to compare every turn from where they part",
    "control_tokens": "texts hold strings that are control tokens; they are tokenized as text",
}
TOO_SLOW = "template_too_slow"
"""The reason for rows whose rejection depends on the machine, so that no store may keep it."""
HARMLESS = {"control_tokens", "next_marker", "stop_in_text", "thinking_empty", "thinking_untrained"}
"""The notes that are no warnings."""
HINTS = {
    "too_long": "raise data.max_length, or set data.overlong: truncate",
    "no_label": "`dpoctl convert-data --to unpaired` makes labelled answers of pairs",
    "no_pair": "`dpoctl convert-data --to pairs` makes pairs of labelled answers to the same prompts",
    "prompt_moved": "set model.chat_template or data.chat_template_kwargs so that a prompt is a prefix of its "
    "conversation",
    "tools_dropped": "set model.chat_template to a template that lists tools, or leave the column out",
    "content_dropped": "set model.chat_template to a template that writes every turn",
    "tool_calls_dropped": "set model.chat_template to a template that writes tool calls",
    "name_dropped": "leave the key out of the messages, or set model.chat_template to a template that writes names",
    "not_a_ranking": "a list-wise loss needs rows that put all their answers in order; leave pairs and ties out",
}
"""The advice for a set without usable rows, by the reason of their rejection."""
ADD_TOKENS = "or add the tokens to the tokenizer and train the embeddings (all weights, or lora.modules_to_save)"
PERCENTILES = (5, 50, 95)


def announce(name: str, report: Mapping[str, Any]) -> None:
    """Print the size and the lengths of a set, and notes and warnings about its rows."""
    for source in report["sources"]:
        if source["evidence"]:
            console.note(f"{source['path']}: format {source['format']} ({source['evidence']})")
        if source["json_columns"]:
            console.note(f"{source['path']}: {json_text(source['json_columns'])}")
    console.say(f"{name}: {summary(report)}")
    lengths = {side: values for side, values in report["tokens"].items() if isinstance(values, Mapping)}
    console.say(lengths_table(lengths, "tokens"))
    if report["eos_added"]:
        console.note(
            f"{name}: the chat template ends answers without a stop token; "
            f"the end-of-sequence token was added in {report['eos_added']:,} rows"
        )
    for note, count in report["template"].items():
        say = console.note if note in HARMLESS else console.warn
        say(f"{name}: {TEMPLATE_NOTES[note]} ({count:,} rows)")
    _announce_unknown_tokens(name, report["gaps"])
    _announce_split_text(name, report["markers"])
    dropped = {"ties": report["tied_pairs"], "outvoted by other rows": report["outvoted_pairs"]}
    if counts := ", ".join(f"{count:,} {why}" for why, count in dropped.items() if count):
        console.note(f"{name}: pairs were dropped from used rows: {counts}")
    if leaked := report.get("leaked", {}).get("records"):
        console.warn(
            f"{name}: {leaked:,} of {report['records']:,} records have a prompt that the training set holds too, "
            "so their results will look too good; remove them from one of the sets"
        )
    if report["prompts_truncated"] or report["answers_truncated"]:
        console.warn(
            f"{name}: {report['prompts_truncated']:,} prompts and {report['answers_truncated']:,} answers "
            f"were truncated; {report['rows_without_eos']:,} rows have an answer without its end; "
            "raise data.max_length to keep more of them"
        )


def json_text(columns: Sequence[str]) -> str:
    """Say that the cells of some columns are JSON text."""
    return f"the cells of {', '.join(columns)} are JSON text, and are read as messages"


def lengths_table(lengths: Mapping[str, Mapping[str, float]], unit: str) -> "Table":
    """Build the table of lengths of prompts and answers, in tokens or characters."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(unit)
    columns = list(next(iter(lengths.values())))
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in lengths.items():
        table.add_row(name, *(f"{values[column]:,}" for column in columns))
    return table


def summary(report: Mapping[str, Any]) -> str:
    """Say in one line how many rows are used, and why the others are not."""
    others = {
        **report["rejected"],
        "held out": report["held_out"],
        "not sampled": report["unsampled"],
    }
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in others.items() if count)
    text = f"{report['used']:,} of {report['rows']:,} rows used"
    if left_out:
        text += f" ({left_out})"
    if report["duplicates"]:
        text += f"; {report['duplicates']:,} duplicates"
    tokens = report["tokens"]
    return f"{text}; {tokens['total']:,} tokens, {tokens['scored']:,} trained on"


def too_slow(name: str, paths: Sequence[str], report: Mapping[str, Any]) -> DataError:
    """Make the error of a set with rows that are left out because of the time that the chat template takes for them."""
    count = report["rejected"][TOO_SLOW]
    (source, part, line), detail = report["first_rejected"][TOO_SLOW]
    rows = "1 row is left out" if count == 1 else f"{count:,} rows are left out"
    return DataError(
        f"{name}: {rows} ({location(paths[source], part)}:{line}): {detail}, which depends on how busy the machine is",
        hint="start again on an idle machine, or set model.chat_template to another one",
    )


def nothing_used(
    name: str, paths: Sequence[str], report: Mapping[str, Any], *, held_out: float | None = None
) -> DataError:
    """Make the error of a set without usable rows; `held_out` is the size of one that is held out from others."""
    where = f"{name}: {', '.join(dict.fromkeys(paths))}"
    if not report["rows"]:
        if held_out is None:
            return DataError(f"{where}: no rows")
        return DataError(
            f"{where}: data.eval_size: {held_out:g} holds out no rows: there are too few",
            hint="give a number of rows, e.g. data.eval_size: 1, or add data",
        )
    reasons = []
    for reason, count in report["rejected"].items():
        (source, part, line), detail = report["first_rejected"][reason]
        first = f"{location(paths[source], part)}:{line}"
        reasons.append(f"{count:,} {reason} ({first}{f': {detail}' if detail else ''})")
    for kind in ("held_out", "unsampled"):
        if report[kind]:
            reasons.append(f"{report[kind]:,} {kind}")
    hint = next((hint for reason, hint in HINTS.items() if reason in report["rejected"]), None)
    if report["held_out"] == report["rows"]:
        hint = "data.eval_size holds out all rows: lower it, or add data"
    return DataError(f"{where}: none of {report['rows']:,} rows can be used: {', '.join(reasons)}", hint=hint)


class LengthStats:
    """The lengths of prompts and answers, in any unit; each takes four bytes."""

    def __init__(self) -> None:
        self._lengths = defaultdict[str, "array[int]"](lambda: array("i"))

    def add(self, prompt: int, answers: tuple[int, ...], pairs: tuple[tuple[int, int], ...]) -> None:
        """Add the lengths of a record's prompt and answers; `pairs` are (winner, loser), as indices of the answers."""
        lengths = self._lengths
        lengths["prompt"].append(prompt)
        for winner, loser in pairs:
            lengths["chosen"].append(answers[winner])
            lengths["rejected"].append(answers[loser])
            lengths["gap"].append(answers[winner] - answers[loser])
        if not pairs:
            lengths["answer"].extend(answers)

    def summary(self) -> dict[str, dict[str, float]]:
        """Describe `prompt`, `answer`, or `chosen`, `rejected` and their `gap` (chosen - rejected).

        Returns:
            For each the `mean`, `p5`, `p50`, `p95` and `max`.
        """
        return {name: _describe(np.array(lengths)) for name, lengths in self._lengths.items()}


def _describe(values: npt.NDArray[np.int32]) -> dict[str, float]:
    percentiles = np.percentile(values, PERCENTILES, method="lower")
    return {
        "mean": round(float(values.mean()), 1),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
    }


def announce_split_template(name: str, report: Mapping[str, Any]) -> None:
    """Warn of turn markers of the chat template that are several tokens; before a training advice does."""
    markers = report["markers"]
    if markers["template"]:
        say = console.note if markers["template_ends_turns"] else console.warn
        say(
            f"{name}: the chat template writes turn markers that are no tokens of this tokenizer: "
            f"{described(markers['template'])}; set model.chat_template to another template, {ADD_TOKENS}"
        )


def _announce_split_text(name: str, markers: Mapping[str, Any]) -> None:
    if markers["text"]:
        console.warn(
            f"{name}: rows of text hold turn markers that are no tokens of this tokenizer: "
            f"{described(markers['text'])}; use messages instead of text, {ADD_TOKENS}"
        )


def _announce_unknown_tokens(name: str, counts: Mapping[str, Any]) -> None:
    if counts["unknown"]:
        lost = ", ".join(f"{character!r} {count:,}" for character, count in counts["characters"].items())
        console.warn(
            f"{name}: the tokenizer does not know some characters; {counts['unknown']:,} tokens in "
            f"{counts['rows_unknown']:,} rows are its unknown token: {lost}"
        )
    if counts["in_bytes"]:
        console.note(
            f"{name}: {counts['in_bytes']:,} tokens in {counts['rows_in_bytes']:,} rows are single bytes of characters "
            "that have no token"
        )
