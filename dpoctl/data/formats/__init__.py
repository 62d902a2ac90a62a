"""Data formats: one function from a row to a record, one line in `FORMATS`.

A function raises `Reject(SHAPE, ...)` for a row that is not in its format at all, by which formats are detected, and
`Reject` with another reason for a row that is in the format and cannot be used. Its keyword-only parameters are its
options; `as` is one that the formats of plain text share.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dpoctl.data.formats import demonstrations, pairs, rankings, trl
from dpoctl.data.formats.common import add_common_columns
from dpoctl.data.formats.transcripts import as_messages
from dpoctl.data.messages import is_from_arrow, without_nulls
from dpoctl.data.records import Record, Row

Format = Callable[..., Record]

FORMATS: dict[str, Format] = {
    "openai-preference": pairs.openai_preference,
    "arena-140k": pairs.arena_140k,
    "arena-100k": pairs.arena_100k,
    "arena-55k": pairs.arena_55k,
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
    "comparison-gpt4": rankings.comparison_gpt4,
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
    "hh": pairs.hh,
    "ranking": trl.ranking,
    "trl-explicit": trl.trl_explicit,
    "trl-implicit": trl.trl_implicit,
    "generic": trl.generic,
    "llamafactory-kto": demonstrations.llamafactory_kto,
    "messages": trl.messages,
    "sharegpt": demonstrations.sharegpt,
    "alpaca": demonstrations.alpaca,
    "capybara-conversation": demonstrations.capybara_conversation,
    "prompt-completion": trl.prompt_completion,
    "prompt-response": demonstrations.prompt_response,
    "text": trl.text,
}
"""The formats by name; of two that need the same columns, the more specific stands first."""


AS = "as"
"""The option of `TEXT_FORMATS`: `text` leaves plain text as it is, `messages` makes messages of it."""
TEXT_FORMATS = ("summarize", "hh", "ranking", "trl-explicit", "generic", "prompt-completion", "prompt-response", "text")
"""The formats whose rows may be plain text."""


def read(name: str, row: Row, options: Mapping[str, Any] | None = None) -> Record:
    """Read a row in a format of `FORMATS`.

    Raises:
        Reject: The row cannot be used.
    """
    own = {key: value for key, value in (options or {}).items() if key != AS}
    if is_from_arrow(row):
        row = without_nulls(row)
    record = FORMATS[name](row, **own)
    return add_common_columns(row, as_messages(record) if (options or {}).get(AS) == "messages" else record)
