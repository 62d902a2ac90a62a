"""The recipe's data section: where rows come from, and what becomes of them before a model sees them."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import BeforeValidator, Field

from dpoctl.recipe.expect import Expect, Path
from dpoctl.recipe.section import Count, Section, Text
from dpoctl.recipe.values import eval_sets, held_out, source_list, source_path

PairMode = Literal["best-worst", "best-rest", "best-random", "adjacent", "all"]
Overlong = Literal["drop", "truncate"]
PromptTruncation = Literal["keep_end", "keep_start"]


class Source(Section):
    """One place that rows come from. A bare string is its path."""

    path: Text = Field(examples=["pairs.jsonl"])
    """A hub id, a file, a folder saved by `datasets`, or a built-in source such as demo:reviewer2."""
    name: Text | None = Field(default=None, examples=["default"])
    """The configuration of a hub data set."""
    split: Text = "train"
    """The split of a hub data set, of a folder saved by `datasets`, or of a built-in source."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub data set."""
    data_files: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["part-0.jsonl"]])
    """Which files of a folder or hub data set, where not all."""
    format: Text = "auto"
    """The format of the rows; auto looks at them and says what it found."""
    format_options: dict[str, Any] = Field(default={})
    """What else the format is told, e.g. which of two judgements counts."""
    weight: Annotated[float, Gt(0)] = 1.0
    """How often a row is seen per epoch: 0.5 takes a seeded half, 2 takes each row twice."""
    max_samples: Count | None = Field(default=None, examples=[1000])
    """Use no more than this many rows: a seeded sample."""
    column_map: dict[str, Text] = Field(default={})
    """Canonical column name: its name in the file."""
    pairs: PairMode | None = None
    """Which answers of a row that rates several are compared; null is best-worst, for a list-wise loss all."""
    min_margin: Annotated[float, Ge(0)] | None = None
    """Drop pairs whose ratings differ by less."""
    max_pairs_per_prompt: Count | None = None
    """Use no more than this many pairs of one prompt."""
    ties: Literal["drop", "keep"] | None = None
    """What becomes of pairs with equal ratings, always counted; null is drop."""
    max_length: Annotated[int, Ge(2)] | None = None
    """data.max_length, for this source."""
    max_prompt_length: Count | None = None
    """data.max_prompt_length, for this source."""
    overlong: Overlong | None = None
    """data.overlong, for this source."""
    prompt_truncation: PromptTruncation | None = None
    """data.prompt_truncation, for this source."""
    metrics: Text | None = None
    """The name that metrics of this source's rows go by; null is no metrics of their own."""


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(source_path, json_schema_input_type=str | Source)]],
    MinLen(1),
    BeforeValidator(source_list, json_schema_input_type=str | list[str | Source]),
    Expect("a list of sources, each a path or a mapping with one"),
]


class DataSection(Section):
    """What the model learns from and is measured on."""

    train: Sources = Field(examples=[["pairs.jsonl"]])
    """The sources of training rows."""
    eval: Annotated[
        dict[Text, Sources],
        BeforeValidator(
            eval_sets,
            json_schema_input_type=str | list[str | Source] | dict[str, str | list[str | Source]] | None,
        ),
        Expect("a list of sources, or a mapping of a name to a list of sources"),
    ] = Field(default={}, examples=[["heldout.jsonl"]])
    """Named eval sets; a bare list is the one named `eval`."""
    eval_size: Annotated[
        float | int | None,
        BeforeValidator(held_out, json_schema_input_type=float | int | None),
        Expect("a share above 0 and below 1, a whole number of rows of at least 1, or null"),
    ] = Field(default=None, examples=[0.05])
    """Hold out this share, or this many, of the training rows as the eval set `eval`."""
    max_length: Annotated[int, Ge(2)] = 1024
    """Tokens of prompt + answer."""
    max_prompt_length: Count | None = Field(default=None, examples=[512])
    """Tokens of the prompt; must be smaller than max_length."""
    overlong: Overlong = "drop"
    """What becomes of a row that is longer; always counted."""
    prompt_truncation: PromptTruncation = "keep_end"
    """Which end of an over-long prompt survives; needs overlong: truncate."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of rows that are seen again; always counted."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables for the chat template."""

    @property
    def sources(self) -> list[tuple[Path, Source]]:
        """Every source of training and evaluation, and where in the recipe it stands."""
        sets: list[tuple[Path, list[Source]]] = [(("data", "train"), self.train)]
        sets += [(("data", "eval", name), sources) for name, sources in self.eval.items()]
        return [((*path, index), source) for path, sources in sets for index, source in enumerate(sources)]
