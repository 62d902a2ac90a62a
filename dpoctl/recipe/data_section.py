"""The `data` section of a recipe: the sources of rows, and how they become pairs and tokens."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BeforeValidator, Field

from dpoctl.recipe.diagnostics import KeyPath
from dpoctl.recipe.section import Count, Expect, OneOf, Section, Text, Tokens

PairMode = Literal["best-worst", "best-rest", "best-random", "adjacent", "all"]
Overlong = Literal["drop", "truncate"]
PromptTruncation = Literal["keep_end", "keep_start"]
SOURCE_FORMATS = (
    *("auto", "openai-preference", "arena-140k", "arena-100k", "arena-55k", "helpsteer3", "helpsteer2-preference"),
    *("helpsteer2", "ultrafeedback-raw", "nectar", "nemo-ranking", "shp", "stack-exchange", "stack-exchange-paired"),
    *("pku", "summarize", "comparison-gpt4", "capybara", "ultrafeedback-binarized", "argilla-cleaned", "dpo-mix"),
    *("distilabel-orca", "orca", "axolotl", "sharegpt-ranking", "alpaca-ranking", "llamafactory-v1", "ms-swift"),
    *("snorkel", "hh", "ranking", "trl-explicit", "trl-implicit", "generic", "llamafactory-kto", "messages"),
    *("sharegpt", "alpaca", "capybara-conversation", "prompt-completion", "prompt-response", "text"),
)
"""The values of a source's `format`: auto, or a name of `dpoctl.data.formats.FORMATS`."""
MOST_EVAL_SETS = 200
"""Each set keeps its files open."""


def source_list(value: Any) -> Any:
    """Read a string as a list of one source."""
    return [value] if isinstance(value, str) else value


def source_path(value: Any) -> Any:
    """Read a string as the path of a source."""
    return {"path": value} if isinstance(value, str) else value


def eval_sets(value: Any) -> Any:
    """Read a list as the one eval set `eval`, and null as no eval set."""
    if value is None:
        return {}
    return {"eval": value} if isinstance(value, str | list) else value


class Source(Section):
    """A source of rows, in `data.train` or `data.eval`. A string instead of these keys is its `path`."""

    path: Text = Field(examples=["pairs.jsonl"])
    """A hub id, a file, a folder saved by `datasets`, or a built-in source such as `demo:reviewer2`."""
    name: Text | None = Field(default=None, examples=["default"])
    """The configuration of a hub data set."""
    split: Text = "train"
    """The split of a hub data set, of a folder saved by `datasets`, or of a built-in source."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub data set."""
    data_files: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["part-0.jsonl"]])
    """The files to read from a folder or a hub data set. null: all files."""
    format: Text = "auto"
    """The format of the rows (docs/data.md lists them). `auto`: detect it, and print which one was found."""
    format_options: dict[str, Any] = Field(default={}, examples=[{"attribute": "correctness"}])
    """Options of the format, for example the rating to compare answers by."""
    weight: Annotated[float, Gt(0), Le(1000)] = 1.0
    """The number of times that each row is used per epoch. 0.5: a random half of the rows; 2: every row twice."""
    max_samples: Count | None = Field(default=None, examples=[1000])
    """The number of rows to use, drawn in a random order. Rows that cannot be used, e.g. too long ones, do not count:
    others are drawn until there are enough. Rows that `data.eval_size` holds out count."""
    column_map: dict[str, Text] = Field(default={}, examples=[{"prompt": "question"}])
    """The columns of the file by their standard names: `{prompt: question}` reads the prompt from `question`."""
    pairs: PairMode | None = None
    """The rated answers of a prompt that make pairs (docs/data.md). null: `best-worst`; `all` for a listwise loss."""
    min_margin: Annotated[float, Ge(0)] | None = None
    """Drop a pair if the ratings of its two answers differ by less than this."""
    max_pairs_per_prompt: Count | None = None
    """The maximum number of pairs of one prompt. The pairs with the largest rating difference are kept."""
    ties: Literal["drop", "keep"] | None = None
    """Drop or keep pairs with equal ratings. They are counted in both cases. null: `drop`."""
    max_length: Tokens | None = None
    """`data.max_length` for this source."""
    max_prompt_length: Count | None = None
    """`data.max_prompt_length` for this source."""
    overlong: Overlong | None = None
    """`data.overlong` for this source."""
    prompt_truncation: PromptTruncation | None = None
    """`data.prompt_truncation` for this source."""
    metrics: Text | None = None
    """Log separate metrics for the rows of this source, under this name. null: no separate metrics."""


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(source_path)]],
    MinLen(1),
    BeforeValidator(source_list),
    Expect("a list of sources, each a path or a mapping with a path"),
]


class DataSection(Section):
    """The data for training and evaluation."""

    train: Sources = Field(examples=[["pairs.jsonl"]])
    """The sources of the training rows."""
    eval: Annotated[
        dict[Text, Sources],
        BeforeValidator(eval_sets),
        MaxLen(MOST_EVAL_SETS),
        Expect("a list of sources, or a mapping from names to lists of sources"),
    ] = Field(default={}, examples=[["heldout.jsonl"]])
    """Eval sets by name. A list without a name is the eval set `eval`."""
    eval_size: (
        Annotated[
            Annotated[float, Gt(0), Lt(1)] | Count,
            OneOf("a fraction between 0 and 1, or a whole number from 1 to 1,000,000,000"),
        ]
        | None
    ) = Field(default=None, examples=[0.05])
    """Hold out this fraction, or this number, of the training rows as the eval set `eval`."""
    max_length: Tokens = 1024
    """The maximum number of tokens in prompt and answer together."""
    max_prompt_length: Count | None = Field(default=None, examples=[512])
    """The maximum number of tokens in the prompt. It must be smaller than `max_length`."""
    overlong: Overlong = "drop"
    """Drop or truncate rows that are too long. They are counted in both cases."""
    prompt_truncation: PromptTruncation = "keep_end"
    """The end of a prompt that truncation keeps: its end or its start. Only for `overlong: truncate`."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Keep or drop repeated rows. They are counted in both cases."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Extra variables for the chat template."""

    @property
    def sources(self) -> list[tuple[KeyPath, Source]]:
        """Every source of training and evaluation, with its path in the recipe."""
        sets: list[tuple[KeyPath, list[Source]]] = [(("data", "train"), self.train)]
        sets += [(("data", "eval", name), sources) for name, sources in self.eval.items()]
        return [((*path, index), source) for path, sources in sets for index, source in enumerate(sources)]
