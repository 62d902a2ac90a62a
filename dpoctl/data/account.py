"""What became of the rows, in words: for people while a recipe is prepared, and when nothing is left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpoctl import console
from dpoctl.data.sources import location
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATE_NOTES = {
    "thinking_stub": "the template writes another thinking stub before answers than before generating; "
    "trained on what generation sees",
    "system_dropped": "the template drops the system message once an answer follows; "
    "trained with it, as generation sees it",
    "history_rewritten": "the template writes earlier assistant turns differently from the last one",
    "thinking_dropped": "the template leaves the thinking out of answers; trained without it",
    "thinking_doubled": "the template opens and ends thinking before the answer's own; "
    "give the thinking as reasoning_content of the message",
    "system_ignored": "the template does not write the system message",
    "tools_ignored": "the template does not write the tools",
    "control_tokens": "contents hold strings that are control tokens; they are tokenized as text",
}


HINTS = {
    "too_long": "raise data.max_length, or set data.overlong: truncate",
    "no_label": "`dpoctl convert-data --to unpaired` makes labelled answers of pairs",
    "no_pair": "`dpoctl convert-data --to pairs` makes pairs of labelled answers to the same prompts",
    "not_a_ranking": "a list-wise loss needs rows that put all their answers in order; leave pairs and ties out",
}
"""What to do where nothing is left, by the reason."""


def announce(name: str, account: Mapping[str, Any]) -> None:
    """Say what a set holds, and what was done to its rows."""
    for source in account["sources"]:
        if source["evidence"]:
            console.note(f"{source['path']}: format {source['format']} ({source['evidence']})")
    console.say(f"{name}: {summary(account)}")
    lengths = {side: values for side, values in account["tokens"].items() if isinstance(values, Mapping)}
    console.say(lengths_table(lengths, "tokens"))
    if account["eos_added"]:
        console.note(
            f"{name}: the template ends answers without a stop token; "
            f"the end-of-sequence token was added in {account['eos_added']:,} rows"
        )
    for note, count in account["template"].items():
        say = console.note if note == "control_tokens" else console.warn
        say(f"{name}: {TEMPLATE_NOTES[note]} ({count:,} rows)")
    _announce_gaps(name, account["gaps"])
    _announce_pairs(name, account)
    if leaked := account.get("leaked", {}).get("records"):
        console.warn(
            f"{name}: {leaked:,} of {account['records']:,} records have a prompt that is trained on: "
            "the measure will flatter"
        )
    if account["prompts_truncated"] or account["answers_truncated"]:
        console.warn(
            f"{name}: {account['prompts_truncated']:,} prompts and {account['answers_truncated']:,} answers "
            f"were truncated; {account['rows_without_eos']:,} rows have an answer that does not end"
        )


def _announce_pairs(name: str, account: Mapping[str, Any]) -> None:
    counts = {"ties": account["tied_pairs"], "outvoted by other rows": account["outvoted_pairs"]}
    dropped = ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
    if dropped:
        console.note(f"{name}: of the rows that are used, some pairs were dropped: {dropped}")


def _announce_gaps(name: str, gaps: Mapping[str, Any]) -> None:
    if gaps["unknown"]:
        lost = ", ".join(f"{character!r} {count:,}" for character, count in gaps["characters"].items())
        console.warn(
            f"{name}: the tokenizer has no token for some characters; {gaps['unknown']:,} tokens in "
            f"{gaps['rows_unknown']:,} rows are unknown: {lost}"
        )
    if gaps["in_bytes"]:
        console.note(
            f"{name}: {gaps['in_bytes']:,} tokens in {gaps['rows_in_bytes']:,} rows are bytes of characters "
            "that have no token"
        )


def lengths_table(lengths: Mapping[str, Mapping[str, float]], unit: str) -> "Table":
    """Show how long prompts and answers are, in tokens or characters."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(unit)
    columns = list(next(iter(lengths.values())))
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in lengths.items():
        table.add_row(name, *(f"{values[column]:,}" for column in columns))
    return table


def summary(account: Mapping[str, Any]) -> str:
    """Say in one line how many rows are used, and why the others are not."""
    others = {
        **account["rejected"],
        "held out": account["held_out"],
        "not sampled": account["unsampled"],
    }
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in others.items() if count)
    text = f"{account['used']:,} of {account['rows']:,} rows used"
    if left_out:
        text += f" ({left_out})"
    if account["duplicates"]:
        text += f"; {account['duplicates']:,} duplicates"
    tokens = account["tokens"]
    return f"{text}; {tokens['total']:,} tokens, {tokens['scored']:,} trained on"


def explain_nothing_used(name: str, paths: Sequence[str], report: Mapping[str, Any]) -> DataError:
    """Make the error of a set that has no usable row."""
    where = f"{name}: {', '.join(dict.fromkeys(paths))}"
    if not report["rows"]:
        return DataError(f"{where}: no rows")
    reasons = []
    for reason, count in report["rejected"].items():
        (source, part, line), detail = report["first_rejected"][reason]
        first = f"{location(paths[source], part)}:{line}"
        reasons.append(f"{count:,} {reason} ({first}{f': {detail}' if detail else ''})")
    for kind in ("held_out", "unsampled"):
        if report[kind]:
            reasons.append(f"{report[kind]:,} {kind}")
    hint = next((hint for reason, hint in HINTS.items() if reason in report["rejected"]), None)
    return DataError(f"{where}: none of {report['rows']:,} rows can be used: {', '.join(reasons)}", hint=hint)
