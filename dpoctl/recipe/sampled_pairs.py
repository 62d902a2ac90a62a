"""A recipe of sampled pairs: settings of `dpoctl convert-data --format sampled`, which scores answers of a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field

from dpoctl.recipe.data_section import PairMode
from dpoctl.recipe.diagnostics import KeyPath
from dpoctl.recipe.judge_section import ASKING, SENDING, JudgingSection
from dpoctl.recipe.judge_section import NEEDED as OF_JUDGES
from dpoctl.recipe.pair_generation import SamplingSection, WriterSection, load_generation
from dpoctl.recipe.schema import DType, QuantizationSection
from dpoctl.recipe.section import Count, Expect, Section, Seed, Text

ITEM = "{item}"
SCORE_KEYS: dict[str, tuple[str, ...]] = {
    "keywords": ("categories", "target"),
    "pairwise": (*ASKING, *SENDING),
    "rubric": (*ASKING, *SENDING, "lowest", "highest"),
    "reward_model": ("model_name_or_path", "revision", "dtype", "batch_size", "max_length", "trust_remote_code"),
    "command": ("command",),
}
"""The keys that each type of score reads, beside `type`."""
NEEDED: dict[str, dict[str, str]] = {
    **OF_JUDGES,
    "reward_model": {"model_name_or_path": "Skywork/Skywork-Reward-V2-Qwen3-0.6B"},
    "command": {"command": "[python, score.py]"},
}
"""The keys that each type of score needs, with an example."""


class PromptsSection(Section):
    """The prompts to answer."""

    path: Text = Field(examples=["prompts.jsonl"])
    """A text file with one text per line, or data in any format: pairs, demonstrations, rankings."""
    column: Text | None = Field(default=None, examples=["title"])
    """The column of texts to make prompts of. null: the prompts of the rows, as their format has them."""
    template: Text = ITEM
    """The prompt for a line of a text file, or for a text of the column; it must contain `{item}`."""
    split: Text = "train"
    """The split of a hub data set, of a folder saved by `datasets`, or of a built-in source."""
    format: Text = "auto"
    """The format of the rows. `auto`: detect it."""
    format_options: dict[str, Any] = Field(default={}, examples=[{"as": "messages"}])
    """Options of the format."""


class EndpointSection(Section):
    """A served model, behind an OpenAI-compatible API."""

    url: Text = Field(examples=["http://localhost:8000/v1"])
    """The base of the API: vLLM, SGLang, llama.cpp, `transformers serve`, or a hosted one."""
    model: Text = Field(examples=["my-policy"])
    """The name of the model there. Answers are kept under it: serve another model under another name."""
    api_key_env: Text = "OPENAI_API_KEY"
    """The environment variable with the key of that API. A server of your own needs none."""
    concurrency: Annotated[int, Ge(1), Le(1000)] = 8
    """The maximum number of requests under way."""
    timeout: Annotated[float, Gt(0), Le(86_400)] = 120.0
    """The number of seconds to wait for an answer before it is asked for again."""
    max_requests: Count = 1_000_000
    """The maximum number of requests. If more are needed, they are not sent."""
    request: dict[str, Any] = Field(default={}, examples=[{"top_k": 20}])
    """Further fields of each request. null as a value leaves a field out that is there by default, such as `seed`."""


class DrawsSection(SamplingSection):
    """The sampling of the answers."""

    num: Annotated[int, Ge(2), Le(64)] = 4
    """The number of answers to each prompt."""
    seed: Seed = 42
    """The seed of the answers and of the order of prompts. The answers to a prompt do not depend on other prompts."""


class ScoreSection(JudgingSection):
    """The score of an answer: higher is better. Answers without a score are left out."""

    type: Literal["keywords", "pairwise", "rubric", "reward_model", "command"] = Field(examples=["reward_model"])
    """`keywords`: 1 for words of the target, 0 for those of other categories; `pairwise`: a served model compares every
    two answers, and the score is the share of wins; `rubric`: it rates each; `reward_model`: a sequence classifier;
    `command`: a program."""
    model_name_or_path: Text | None = Field(default=None, examples=["runs/reward-model"])
    """The reward model: a hub id or a folder of a sequence classifier with one output."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub id."""
    dtype: DType = "auto"
    """The precision of the reward model. `auto`: bfloat16 if the GPU supports it, else float16; float32 on a CPU."""
    batch_size: Annotated[int, Ge(1), Le(65_536)] = 16
    """The number of answers that the reward model reads at once. It changes speed and memory only."""
    max_length: Annotated[int, Ge(2), Le(100_000_000)] = 4096
    """The maximum number of tokens of prompt and answer that the reward model reads; longer ones get no score."""
    trust_remote_code: bool = False
    """Run code that comes with the reward model."""
    command: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["python", "score.py"]])
    """The program and its arguments. It reads lines of JSON with `id`, `prompt` and `answer`, and writes lines with
    `id` and `score`."""


class SampledRecipe(Section):
    """A recipe of `dpoctl convert-data --format sampled`: answers of a model, scored, become pairs."""

    method: Literal["sampled"] = Field(examples=["sampled"])
    """The command that this recipe is for. Other commands refuse it."""
    prompts: PromptsSection = Field(examples=[{"path": "prompts.jsonl"}])
    """The prompts to answer."""
    model: WriterSection | None = Field(default=None, examples=[{"model_name_or_path": "runs/my-sft"}])
    """The model that answers. null: `endpoint` names one."""
    quantization: QuantizationSection | None = None
    """Quantisation of that model. null: none."""
    endpoint: EndpointSection | None = Field(
        default=None, examples=[{"url": "http://localhost:8000/v1", "model": "my-policy"}]
    )
    """The served model that answers. null: `model` names one."""
    sampling: DrawsSection = DrawsSection()
    """The sampling of the answers."""
    score: ScoreSection = Field(examples=[{"type": "reward_model", "model_name_or_path": "runs/reward-model"}])
    """The score of each answer."""
    pairs: PairMode = "best-worst"
    """The scored answers of a prompt that make pairs (docs/data.md)."""
    min_margin: Annotated[float, Ge(0)] | None = None
    """Drop a pair if the scores of its two answers differ by less than this."""
    max_pairs_per_prompt: Count | None = None
    """The maximum number of pairs of one prompt. The pairs with the largest difference are kept."""
    splits: Annotated[dict[Text, Count], Expect("a mapping from names to numbers of prompts")] = Field(
        default={}, examples=[{"train": 1000, "test": 100}]
    )
    """The number of prompts with pairs of each split; if there are too few, the first gets fewer. Empty: one file."""


def load_sampled(path: Path | str, overrides: Sequence[str] = ()) -> SampledRecipe:
    """Read and check a recipe of sampled pairs; see `load_generation` for the arguments and errors."""
    expected = "a recipe of sampled pairs (prompts, model or endpoint, score)"
    return load_generation(SampledRecipe, path, expected, overrides, _contradictions)


def _contradictions(recipe: SampledRecipe) -> Iterator[tuple[KeyPath, str]]:
    """Find the keys that are missing, that contradict each other, or that have no effect."""
    if (recipe.model is None) == (recipe.endpoint is None):
        yield ("model",), "set one of model and endpoint: who answers the prompts"
    if recipe.endpoint is not None:
        if recipe.quantization is not None:
            yield ("quantization",), "has no effect: the model is served"
        if "batch_size" in recipe.sampling.model_fields_set:
            yield ("sampling", "batch_size"), "has no effect: the server makes its own batches"
    elif (quantized := recipe.quantization) is not None and quantized.load_in_4bit == quantized.load_in_8bit:
        yield ("quantization",), "set one of load_in_4bit and load_in_8bit, or remove the section"
    if recipe.sampling.temperature == 0:
        yield ("sampling", "temperature"), "must be above 0: all answers to a prompt would be the same"
    yield from _prompts(recipe.prompts)
    yield from _score(recipe.score)


def _prompts(prompts: PromptsSection) -> Iterator[tuple[KeyPath, str]]:
    makes_prompts = prompts.column is not None or prompts.path.endswith(".txt")
    if ITEM not in prompts.template:
        yield ("prompts", "template"), f"{ITEM} is missing in the text"
    if not makes_prompts and "template" in prompts.model_fields_set:
        yield ("prompts", "template"), "has no effect: without a column, the rows have their own prompts"
    for key in ("format", "format_options"):
        if makes_prompts and key in prompts.model_fields_set:
            yield ("prompts", key), "has no effect: prompts are made of texts, not read from rows of a format"


def _score(score: ScoreSection) -> Iterator[tuple[KeyPath, str]]:
    for key, example in NEEDED[score.type].items():
        if not getattr(score, key):
            yield ("score",), f"missing key 'score.{key}', for example {key}: {example}"
    for key in sorted(score.model_fields_set - {"type", *SCORE_KEYS[score.type]}):
        yield ("score", key), f"has no effect: a score of type {score.type} does not read it"
    if score.type == "keywords" and score.target is not None and score.target not in score.categories:
        yield ("score", "target"), f"expected a category ({', '.join(score.categories)}), got {score.target!r}"
    if score.lowest >= score.highest:
        yield ("score", "lowest"), f"must be below highest ({score.highest})"
