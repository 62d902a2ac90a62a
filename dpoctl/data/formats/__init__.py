"""Data formats: one function from a row to a record, one line in `FORMATS`.

A function raises `Reject(SHAPE, ...)` for a row that is not in its format at all, which is what `detect`
goes by, and `Reject` with any other reason for a row that is, and cannot be used. Its options are its
keyword-only parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpoctl.data.formats import arena, pairs, rankings, sft, transcripts, trl
from dpoctl.data.formats import detect as _detect
from dpoctl.data.formats import options as _options
from dpoctl.data.formats.canonical import canonical_rows
from dpoctl.data.formats.detect import Detection
from dpoctl.data.formats.options import Format, Option
from dpoctl.data.formats.parts import carry
from dpoctl.data.formats.transcripts import TURN
from dpoctl.data.records import Record, Row

__all__ = [
    "FORMATS",
    "TURN",
    "Detection",
    "Option",
    "canonical_rows",
    "check_options",
    "detect",
    "options_of",
    "read",
]

FORMATS: dict[str, Format] = {
    "openai-preference": pairs.openai_preference,
    "arena-140k": arena.arena_140k,
    "arena-100k": arena.arena_100k,
    "arena-55k": arena.arena_55k,
    "helpsteer3": pairs.helpsteer3,
    "helpsteer2-preference": pairs.helpsteer2_preference,
    "helpsteer2": rankings.helpsteer2,
    "ultrafeedback-raw": rankings.ultrafeedback_raw,
    "nectar": rankings.nectar,
    "nemo-ranking": rankings.nemo_ranking,
    "shp": pairs.shp,
    "stack-exchange": rankings.stack_exchange,
    "stack-exchange-paired": pairs.stack_exchange_paired,
    "pku": pairs.pku,
    "summarize": pairs.summarize,
    "comparison-gpt4": pairs.comparison_gpt4,
    "capybara": pairs.capybara,
    "ultrafeedback-binarized": pairs.ultrafeedback_binarized,
    "argilla-cleaned": pairs.argilla_cleaned,
    "dpo-mix": pairs.dpo_mix,
    "distilabel-orca": pairs.distilabel_orca,
    "orca": pairs.orca,
    "axolotl": pairs.axolotl,
    "sharegpt-ranking": pairs.sharegpt_ranking,
    "alpaca-ranking": pairs.alpaca_ranking,
    "llamafactory-v1": pairs.llamafactory_v1,
    "ms-swift": pairs.ms_swift,
    "snorkel": rankings.snorkel,
    "hh": transcripts.hh,
    "ranking": trl.ranking,
    "trl-explicit": trl.trl_explicit,
    "trl-implicit": trl.trl_implicit,
    "generic": trl.generic,
    "llamafactory-kto": sft.llamafactory_kto,
    "messages": trl.messages,
    "sharegpt": sft.sharegpt,
    "alpaca": sft.alpaca,
    "capybara-conversation": sft.capybara_conversation,
    "prompt-completion": trl.prompt_completion,
    "prompt-response": sft.prompt_response,
    "text": trl.text,
}
"""By name; of two that need the same columns, the more specific stands first."""


def read(name: str, row: Row, options: Mapping[str, Any] | None = None) -> Record:
    """Read a row in a format of `FORMATS`.

    Raises:
        Reject: The row cannot be used.
    """
    return carry(row, FORMATS[name](row, **options or {}))


def detect(rows: Sequence[Row]) -> Detection:
    """Find the format of a file by its first rows.

    Raises:
        DataError: No format fits, or two that are as specific do.
    """
    return _detect.detect(rows, FORMATS)


def options_of(name: str) -> dict[str, Option]:
    """List the options of a format, by name."""
    return _options.options_of(FORMATS[name])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Make sure that a format can be told this.

    Raises:
        UsageError: The format has no such option, or the option no such value.
    """
    _options.check_options(name, FORMATS[name], options)
