"""The section `eval.judge`, and the checks of its keys: each type of judge has its own."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, NoEffect
from dpoctl.recipe.section import Count, Expect, NewTokens, Section, Text

JUDGE: KeyPath = ("eval", "judge")
UNDECIDED = "undecided"
"""The name that a judge gives to a text without a category."""
ASKING = ("url", "model", "template", "max_new_tokens", "temperature", "request")
"""The keys of what is asked of a served judge, and below it of how."""
SENDING = ("api_key_env", "concurrency", "timeout", "max_requests")
OWN_KEYS: dict[str, tuple[str, ...]] = {
    "keywords": ("categories", "target"),
    "pairwise": (*ASKING, *SENDING, "calibration"),
    "rubric": (*ASKING, *SENDING, "lowest", "highest", "calibration"),
    "command": ("command", "calibration"),
}
"""The keys that each type of judge reads, beside `type`."""
NEEDED: dict[str, dict[str, str]] = {
    "keywords": {"categories": "{kind: [accept], harsh: [reject]}", "target": "kind"},
    "pairwise": {"url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-32B"},
    "rubric": {"url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-32B"},
    "command": {"command": "[python, judge.py]"},
}
"""The keys that each type of judge needs, with an example."""


class JudgingSection(Section):
    """The keys that judges of samples and scores of answers have in common."""

    type: str
    categories: Annotated[
        dict[Text, Annotated[list[Text], MinLen(1)]], MinLen(1), Expect("a mapping from categories to lists of words")
    ] = Field(default={}, examples=[{"kind": ["accept"]}])
    """The words of each category. They match whole words, in upper or lower case."""
    target: Text | None = Field(default=None, examples=["kind"])
    """The category that training should make more frequent."""
    url: Text | None = Field(default=None, examples=["http://localhost:8000/v1"])
    """The base of an OpenAI-compatible API: vLLM, SGLang, llama.cpp, `transformers serve`, or a hosted one."""
    model: Text | None = Field(default=None, examples=["Qwen/Qwen3-32B"])
    """The name of the judging model there."""
    api_key_env: Text = "OPENAI_API_KEY"
    """The environment variable with the key of that API. A server of your own needs none."""
    template: Text | None = Field(default=None, examples=["judge.txt"])
    """A file with the request to the model, as docs/evaluation.md describes it. null: the one of dpoctl."""
    lowest: Annotated[int, Ge(-1000), Le(1000)] = 1
    """The lowest rating of a rubric."""
    highest: Annotated[int, Ge(-1000), Le(1000)] = 10
    """The highest rating of a rubric."""
    max_new_tokens: NewTokens = 512
    """The maximum length of a verdict, in tokens, its reasons included."""
    temperature: Annotated[float, Ge(0)] | None = 0.0
    """The sampling temperature of the verdicts. null: that of the server."""
    request: dict[str, Any] = Field(default={}, examples=[{"reasoning_effort": "low"}])
    """Further fields of each request. null as a value leaves a field out that is there by default."""
    concurrency: Annotated[int, Ge(1), Le(1000)] = 8
    """The maximum number of requests under way."""
    timeout: Annotated[float, Gt(0), Le(86_400)] = 120.0
    """The number of seconds to wait for an answer before it is asked for again."""
    max_requests: Count = 10_000
    """The maximum number of requests of a command. If more are needed, none is sent."""


class JudgeSection(JudgingSection):
    """A judge of the samples: rules that sort them into categories, or a model or command that compares them."""

    type: Literal["keywords", "pairwise", "rubric", "command"] = "keywords"
    """`keywords`: a text gets the category whose words it contains; `pairwise`: a served model compares two texts, in
    both orders; `rubric`: it rates each; `command`: a program compares two texts. But for `keywords`, in `dpoctl eval`
    only."""
    target: Text | None = Field(default=None, examples=["kind"])
    """The category that training should make more frequent. Its share is logged as a metric."""
    command: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["python", "judge.py"]])
    """The program and its arguments. It reads pairs of texts and writes verdicts, as lines of JSON."""
    calibration: Text | None = Field(default=None, examples=["labelled.jsonl"])
    """A file of pairs that people have judged, by which the win rate is corrected. null: no correction."""


def find_judge_errors(judge: JudgeSection) -> Iterator[Diagnostic]:
    """Find keys that a judge of this type needs, and values that contradict each other."""
    missing = [key for key in NEEDED[judge.type] if not getattr(judge, key)]
    for key in missing:
        example = NEEDED[judge.type][key]
        message = f"missing key 'eval.judge.{key}', for example {key}: {example}"
        yield Diagnostic.error(JUDGE, message, related=((*JUDGE, "type"),))
    if judge.type == "keywords" and not missing:
        yield from _categories(judge)
    if judge.lowest >= judge.highest:
        message = f"eval.judge.lowest ({judge.lowest}) must be below highest ({judge.highest})"
        yield Diagnostic.error((*JUDGE, "lowest"), message, related=((*JUDGE, "highest"),))


def unused_judge_keys(judge: JudgeSection) -> dict[KeyPath, NoEffect]:
    """Find the keys that a judge of this type does not read."""
    why = NoEffect(f"a judge of type {judge.type} does not read it", ((*JUDGE, "type"),))
    keys = type(judge).model_fields.keys() - {"type", *OWN_KEYS[judge.type]}
    return {(*JUDGE, key): why for key in sorted(keys)}


def _categories(judge: JudgeSection) -> Iterator[Diagnostic]:
    path: KeyPath = ("eval", "judge", "categories")
    if judge.target not in judge.categories:
        message = f"eval.judge.target: expected a category ({', '.join(judge.categories)}), got {judge.target!r}"
        yield Diagnostic.error(("eval", "judge", "target"), message, related=(path,))
    if UNDECIDED in judge.categories:
        message = f"{UNDECIDED!r} is the name for texts without a category; use another name"
        yield Diagnostic.error((*path, UNDECIDED), message)
    seen: dict[str, str] = {}
    for name, words in judge.categories.items():
        for word in words:
            if (other := seen.setdefault(word.casefold(), name)) != name:
                message = f"{word!r} is a word of the category {other!r} too; remove it from one of them"
                yield Diagnostic.error((*path, name), message)
