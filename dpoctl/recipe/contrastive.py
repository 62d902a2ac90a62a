"""A contrastive recipe: what `dpoctl convert-data --format contrastive` lets a model write about a list of items."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, Field, ValidationError

from dpoctl.recipe.document import Document, read_document
from dpoctl.recipe.expect import Expect, Path
from dpoctl.recipe.loader import read_text
from dpoctl.recipe.overrides import apply_overrides
from dpoctl.recipe.problems import Problem, RecipeError, dotted, shown
from dpoctl.recipe.schema import QuantizationSection
from dpoctl.recipe.section import Count, DType, Section, Text
from dpoctl.recipe.suggest import Suggester, closest
from dpoctl.recipe.validate import keys_of
from dpoctl.recipe.wording import explain

PLACEHOLDER = re.compile(r"\{(\w+)\}")
SIDES = ("negative", "positive")


def _items(value: Any) -> Any:
    """Read a bare string as the path of the items."""
    return {"path": value} if isinstance(value, str) else value


class ItemsSection(Section):
    """What the answers are about. A bare string is its path."""

    path: Text = Field(examples=["titles.txt"])
    """A text file of one item a line, a file or data set with columns, or demo:reviewer2."""
    column: Text | None = Field(default=None, examples=["title"])
    """The column that holds the items; a text file has none."""
    split: Text = "train"
    """The split of a hub data set, of a folder saved by `datasets`, or of a built-in source."""


class WriterSection(Section):
    """The model that writes the answers."""

    model_name_or_path: Text = Field(examples=["runs/my-sft"])
    """A hub id, a folder, a run directory, or an adapter of any."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub id; a folder has none."""
    dtype: DType = "auto"
    """The precision of the computation; auto is bfloat16 where the GPU has it, else float16; float32 without one."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention that transformers is asked for."""
    chat_template: Text | None = Field(default=None, examples=["zephyr"])
    """Null is the tokenizer's own, and plain text where it has none; else a built-in name or a .jinja file."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables for the chat template."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class InstructionsSection(Section):
    """Templates with `{item}`, and with `{examples}` where there are some."""

    negative: Text = Field(examples=["Write a negative review of {item}."])
    """Asks for one kind of answer."""
    positive: Text = Field(examples=["Write a positive review of {item}."])
    """Asks for its opposite."""
    neutral: Text = Field(examples=["Write a review of {item}."])
    """Asks for neither: the prompt that the pairs are trained with."""
    example: Text = "Example {number}: {example}"
    """One line of `{examples}`."""


class ExamplesSection(Section):
    """Answers to show in the prompts. The neutral prompt takes those of both sides in turn."""

    negative: Annotated[list[Text], MinLen(1)] = Field(examples=[["It lacks novelty."]])
    """Examples of the negative side."""
    positive: Annotated[list[Text], MinLen(1)] = Field(examples=[["It is well written."]])
    """Examples of the positive side."""
    per_side: Count = 1
    """How many of a side are drawn for each item."""


class SamplingSection(Section):
    """How the answers are drawn."""

    max_new_tokens: Count = 256
    """An answer that is longer is cut off, and rejected."""
    temperature: Annotated[float, Ge(0)] = 0.8
    """0 takes the most likely token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    """Draw from the most likely tokens that hold this much probability together."""
    batch_size: Count = 16
    """Prompts at a time; changes speed and memory only."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42
    """Seeds the answers, the examples and the order of the items; each item by itself."""


class ContrastiveRecipe(Section):
    """Everything that decides which pairs are made."""

    method: Literal["contrastive"] = Field(examples=["contrastive"])
    """A guard: only `dpoctl convert-data --format contrastive` takes such a recipe."""
    items: Annotated[
        ItemsSection,
        BeforeValidator(_items, json_schema_input_type=str | ItemsSection),
        Expect("a file of items, or a mapping with its path"),
    ] = Field(examples=["titles.txt"])
    """What the answers are about."""
    model: WriterSection = Field(examples=[{"model_name_or_path": "runs/my-sft"}])
    """The model that writes the answers."""
    quantization: QuantizationSection | None = None
    """Quantisation of that model."""
    instructions: InstructionsSection = Field(
        examples=[{"negative": "Criticise {item}.", "positive": "Praise {item}.", "neutral": "Review {item}."}]
    )
    """What it is asked, and what the pairs are trained with."""
    examples: ExamplesSection | None = None
    """Examples for the prompts; leave the section out for none."""
    chosen: Literal["negative", "positive"] = Field(examples=["negative"])
    """The side that is preferred."""
    sampling: SamplingSection = SamplingSection()
    """How the answers are drawn."""
    splits: Annotated[dict[Text, Count], Expect("a mapping of a name to a number of pairs")] = Field(
        default={}, examples=[{"train": 1000, "test": 100}]
    )
    """Pairs of each split, each a file of its own; if items run out the first is smaller. Empty is one file of all."""


def load_contrastive(path: FilePath | str, overrides: Sequence[str] = ()) -> ContrastiveRecipe:
    """Read and check a contrastive recipe.

    Args:
        path: The YAML file.
        overrides: `key=value` texts that win over the file.

    Raises:
        UsageError: There is no such file.
        RecipeError: With everything that is wrong in it, each with its line and column.
    """
    return parse_contrastive(read_text(path), str(path), overrides)


def parse_contrastive(text: str, name: str, overrides: Sequence[str] = ()) -> ContrastiveRecipe:
    """Check a contrastive recipe that is in memory; see `load_contrastive`.

    Args:
        text: The YAML.
        name: What errors call it.
        overrides: As for `load_contrastive`.

    Raises:
        RecipeError: With everything that is wrong in it, each with its line and column.
    """
    document = read_document(text, name)
    if not isinstance(document.data, dict):
        given = "nothing" if document.data is None else shown(document.data)
        message = f"expected a contrastive recipe (items, model, instructions, chosen), got {given}"
        raise RecipeError([Problem(document.value_place(()), message)])
    if (method := document.data.get("method")) in ("sft", "dpo"):
        message = f"this recipe trains a model; run `dpoctl {method}` on it"
        raise RecipeError([Problem(document.key_place(("method",)), message)])
    known = list(keys_of(ContrastiveRecipe))
    apply_overrides(document, overrides, known)
    problems, recipe = list(document.problems), None
    try:
        recipe = ContrastiveRecipe.model_validate(document.data)
    except ValidationError as error:
        suggester = Suggester(known)
        found = [explain(one, ContrastiveRecipe, (), document, suggester) for one in error.errors(include_url=False)]
        misspelt = {problem.meant for problem in found}
        problems += [problem for problem in found if problem.meant or problem.path not in misspelt]
    else:
        problems += [_place(document, path, message) for path, message in _check(recipe)]
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=lambda one: (one.place.override, one.place.line, one.place.column)))
    return recipe


def _place(document: Document, path: Path, message: str) -> Problem:
    return Problem(document.key_place(path), f"{dotted(path)}: {message}", path)


def _check(recipe: ContrastiveRecipe) -> Iterator[tuple[Path, str]]:
    """Find what the keys are to one another and must not be."""
    instructions, examples = recipe.instructions, recipe.examples
    allowed = ("item",) if examples is None else ("item", "examples")
    for name in (*SIDES, "neutral"):
        yield from _placeholders(("instructions", name), getattr(instructions, name), allowed)
    if examples is not None:
        yield from _placeholders(("instructions", "example"), instructions.example, ("example",), ("number",))
        for side in SIDES:
            if (count := len(getattr(examples, side))) < examples.per_side:
                yield ("examples", side), f"per_side asks for {examples.per_side} and there are {count}"
    elif "example" in instructions.model_fields_set:
        yield ("instructions", "example"), "would do nothing: there is no examples section"
    if instructions.negative == instructions.positive:
        yield ("instructions", "positive"), "is the same as the negative one"
    if instructions.neutral in (instructions.negative, instructions.positive):
        yield ("instructions", "neutral"), "is the same as one of the two others"
    quantization = recipe.quantization
    if quantization is not None and quantization.load_in_4bit == quantization.load_in_8bit:
        yield ("quantization",), "set one of load_in_4bit and load_in_8bit, or drop the section"


def _placeholders(
    path: Path, template: str, needed: tuple[str, ...], possible: tuple[str, ...] = ()
) -> Iterator[tuple[Path, str]]:
    used = PLACEHOLDER.findall(template)
    for name in needed:
        if name not in used:
            yield path, f"has no {{{name}}}"
    for name in used:
        if name not in (*needed, *possible):
            near = closest(name, (*needed, *possible))
            meant = f"did you mean {{{near}}}?" if near else f"there is {', '.join(f'{{{one}}}' for one in needed)}"
            yield path, f"unknown placeholder {{{name}}}, {meant}"
