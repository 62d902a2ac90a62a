"""What became of the rows, in words: for people while a recipe is prepared, and when nothing is left."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpoctl import console
from dpoctl.data.sources import location
from dpoctl.errors import DataError

TEMPLATE_NOTES = {
    "thinking_stub": "the template writes another thinking stub before answers than before generating; "
    "trained on what generation sees",
    "system_dropped": "the template drops the system message once an answer follows; "
    "trained with it, as generation sees it",
    "history_rewritten": "the template writes earlier assistant turns differently from the last one",
    "content_rewritten": "the template does not write the answer as it stands in the row",
}


def announce(name: str, account: Mapping[str, Any]) -> None:
    """Say what a set holds, and what was done to its rows."""
    for source in account["sources"]:
        if source["evidence"]:
            console.note(f"{source['path']}: format {source['format']} ({source['evidence']})")
    console.say(f"{name}: {summary(account)}")
    if account["eos_added"]:
        console.note(
            f"{name}: the template ends answers without a stop token; "
            f"the end-of-sequence token was added in {account['eos_added']:,} rows"
        )
    for note, count in account["template"].items():
        console.warn(f"{name}: {TEMPLATE_NOTES[note]} ({count:,} rows)")
    if account["prompts_truncated"] or account["answers_truncated"]:
        console.warn(
            f"{name}: {account['prompts_truncated']:,} prompts and {account['answers_truncated']:,} answers "
            f"were truncated; {account['rows_without_eos']:,} rows have an answer that does not end"
        )


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
    hint = None
    if "too_long" in report["rejected"]:
        hint = "raise data.max_length, or set data.overlong: truncate"
    return DataError(f"{where}: none of {report['rows']:,} rows can be used: {', '.join(reasons)}", hint=hint)
