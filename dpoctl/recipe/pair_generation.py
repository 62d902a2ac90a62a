"""A contrastive recipe: settings of `dpoctl convert-data --format contrastive`, which lets a model write pairs."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, Field, ValidationError

from dpoctl.recipe.data_section import source_path
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, RecipeError, dotted, in_order
from dpoctl.recipe.document import apply_overrides
from dpoctl.recipe.key_errors import Suggester, closest
from dpoctl.recipe.loader import explain_all, find_variables, keys_of, read_mapping, read_text
from dpoctl.recipe.schema import AttnImplementation, DType, QuantizationSection
from dpoctl.recipe.section import Count, Expect, NewTokens, Section, Seed, Text

PLACEHOLDER = re.compile(r"\{(\w+)\}")
SIDES = ("negative", "positive")
GENERATORS = ("contrastive", "sampled")
"""The methods of recipes by which a model writes pairs."""
Kind = TypeVar("Kind", bound=Section)


class ItemsSection(Section):
    """The items that the answers are about. A string instead of these keys is its `path`."""

    path: Text = Field(examples=["titles.txt"])
    """A text file with one item per line, a file or data set with columns, or `demo:reviewer2`."""
    column: Text | None = Field(default=None, examples=["title"])
    """The column that contains the items. A text file has no columns."""
    split: Text = "train"
    """The split of a hub data set, of a folder saved by `datasets`, or of a built-in source."""


class WriterSection(Section):
    """The model that writes the answers."""

    model_name_or_path: Text = Field(examples=["runs/my-sft"])
    """The model: a hub id, a folder, a run directory, or an adapter in any of them."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub id."""
    dtype: DType = "auto"
    """The precision of the computation. `auto`: bfloat16 if the GPU supports it, else float16; float32 on a CPU."""
    attn_implementation: AttnImplementation = "auto"
    """The attention of transformers to use."""
    chat_template: Text | None = Field(default=None, examples=["zephyr"])
    """A built-in name or a .jinja file. null: the tokenizer's own, or plain text if it has none."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Extra variables for the chat template."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class InstructionsSection(Section):
    """Prompt templates. Each must contain `{item}`, and `{examples}` if there is an `examples` section."""

    negative: Text = Field(examples=["Write a negative review of {item}."])
    """The prompt for negative answers."""
    positive: Text = Field(examples=["Write a positive review of {item}."])
    """The prompt for positive answers."""
    neutral: Text = Field(examples=["Write a review of {item}."])
    """The prompt of the pairs, which asks for neither side."""
    example: Text = "Example {number}: {example}"
    """The template of one line of `{examples}`."""


class ExamplesSection(Section):
    """Answers to show in the prompts. The neutral prompt shows those of both sides in turn."""

    negative: Annotated[list[Text], MinLen(1)] = Field(examples=[["It lacks novelty."]])
    """Examples of negative answers."""
    positive: Annotated[list[Text], MinLen(1)] = Field(examples=[["It is well written."]])
    """Examples of positive answers."""
    per_side: Annotated[int, Ge(1), Le(1000)] = 1
    """The number of examples per side that are drawn for each item."""


class SamplingSection(Section):
    """The sampling of the answers."""

    max_new_tokens: NewTokens = 256
    """The maximum length of an answer, in tokens. Longer answers are cut off and dropped."""
    temperature: Annotated[float, Ge(0)] = 0.8
    """The sampling temperature. 0: always take the most likely token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    """Sample only from the most likely tokens whose probabilities add up to this."""
    batch_size: Annotated[int, Ge(1), Le(65_536)] = 16
    """The number of prompts in a batch. It changes speed and memory, never the result."""
    seed: Seed = 42
    """The seed of answers, examples and order. The answers to an item do not depend on other items."""


class ContrastiveRecipe(Section):
    """A recipe of `dpoctl convert-data --format contrastive`, which lets a model write both answers of pairs."""

    method: Literal["contrastive"] = Field(examples=["contrastive"])
    """The command that this recipe is for. Other commands refuse it."""
    items: Annotated[
        ItemsSection, BeforeValidator(source_path), Expect("a file of items, or a mapping with its path")
    ] = Field(examples=["titles.txt"])
    """The items that the answers are about."""
    model: WriterSection = Field(examples=[{"model_name_or_path": "runs/my-sft"}])
    """The model that writes the answers."""
    quantization: QuantizationSection | None = None
    """Quantisation of that model. null: none."""
    instructions: InstructionsSection = Field(
        examples=[{"negative": "Criticise {item}.", "positive": "Praise {item}.", "neutral": "Review {item}."}]
    )
    """The prompts for the model, and the prompt of the pairs."""
    examples: ExamplesSection | None = None
    """Answers to show in the prompts. null: none."""
    chosen: Literal["negative", "positive"] = Field(examples=["negative"])
    """The side whose answers are preferred."""
    sampling: SamplingSection = SamplingSection()
    """The sampling of the answers."""
    splits: Annotated[dict[Text, Count], Expect("a mapping from names to numbers of pairs")] = Field(
        default={}, examples=[{"train": 1000, "test": 100}]
    )
    """The number of pairs of each split; if there are too few, the first gets fewer. Empty: one file of all pairs."""


def load_contrastive(path: Path | str, overrides: Sequence[str] = ()) -> ContrastiveRecipe:
    """Read and check a contrastive recipe; see `load_generation` for the arguments and errors."""
    expected = "a contrastive recipe (items, model, instructions, chosen)"
    return load_generation(ContrastiveRecipe, path, expected, overrides, _contradictions)


def load_generation(
    kind: type[Kind],
    path: Path | str,
    expected: str,
    overrides: Sequence[str],
    contradictions: Callable[[Kind], Iterator[tuple[KeyPath, str]]],
) -> Kind:
    """Read and check a recipe by which a model writes data.

    Args:
        kind: The class of the recipe.
        path: The YAML file.
        expected: The kind of file, in words.
        overrides: `key=value` texts that replace values of the file.
        contradictions: Finds the keys that contradict each other.

    Raises:
        UsageError: There is no such file.
        RecipeError: All errors of the recipe, each with its line and column.
    """
    document = read_mapping(read_text(path), str(path), expected, overrides)
    method = document.data.get("method")
    commands = {name: f"dpoctl {name}" for name in ("sft", "dpo")}
    commands |= {name: f"dpoctl convert-data --format {name}" for name in GENERATORS}
    (own,) = get_args(kind.model_fields["method"].annotation)
    if method in commands and method != own:
        what = "makes pairs in another way" if method in GENERATORS else "trains a model"
        message = f"this recipe {what}; run `{commands[method]}` on it"
        raise RecipeError([document.locate(Diagnostic.error(("method",), message))])
    known = list(keys_of(kind))
    apply_overrides(document, overrides, known)
    problems, recipe = [*document.problems, *find_variables(document)], None
    try:
        recipe = kind.model_validate(document.data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += explain_all(errors, kind, document, Suggester(known))
    else:
        found = (Diagnostic.error(path, f"{dotted(path)}: {message}") for path, message in contradictions(recipe))
        problems += map(document.locate, found)
    if problems or recipe is None:
        raise RecipeError(in_order(problems))
    return recipe


def _contradictions(recipe: ContrastiveRecipe) -> Iterator[tuple[KeyPath, str]]:
    """Find the keys that contradict each other."""
    instructions, examples = recipe.instructions, recipe.examples
    needed = ("item",) if examples is None else ("item", "examples")
    for name in (*SIDES, "neutral"):
        yield from _placeholders(("instructions", name), getattr(instructions, name), needed)
    if examples is not None:
        yield from _placeholders(("instructions", "example"), instructions.example, ("example",), ("number",))
        for side in SIDES:
            if (count := len(getattr(examples, side))) < examples.per_side:
                yield ("examples", side), f"expected at least {examples.per_side} examples (per_side), got {count}"
    elif "example" in instructions.model_fields_set:
        yield ("instructions", "example"), "has no effect: there is no examples section"
    if instructions.negative == instructions.positive:
        yield ("instructions", "positive"), "must differ from negative"
    if instructions.neutral in (instructions.negative, instructions.positive):
        yield ("instructions", "neutral"), "must differ from negative and positive"
    quantization = recipe.quantization
    if quantization is not None and quantization.load_in_4bit == quantization.load_in_8bit:
        yield ("quantization",), "set one of load_in_4bit and load_in_8bit, or remove the section"


def _placeholders(
    path: KeyPath, template: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[KeyPath, str]]:
    used = PLACEHOLDER.findall(template)
    for name in needed:
        if name not in used:
            yield path, f"{{{name}}} is missing in the text"
    for name in used:
        if name not in (*needed, *optional):
            near = closest(name, (*needed, *optional))
            hint = f"did you mean {{{near}}}?" if near else f"expected {', '.join(f'{{{one}}}' for one in needed)}"
            yield path, f"unknown placeholder {{{name}}}, {hint}"
