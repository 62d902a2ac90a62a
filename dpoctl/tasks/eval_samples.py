"""The texts of an evaluation: those of the policy and of its baseline, their numbers, and what a judge says of them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.data.store import TokenStore
from dpoctl.errors import UsageError
from dpoctl.model.generate import Generation
from dpoctl.model.policy import Policy
from dpoctl.recipe.judge_section import JudgeSection
from dpoctl.recipe.schema import EvalSection, SamplesSection
from dpoctl.runs.statistics import ratio
from dpoctl.runs.text_metrics import compare_texts
from dpoctl.tasks.finished_run import FinishedRun, is_model_only
from dpoctl.tasks.judges import Judge
from dpoctl.tasks.judging import build_judge, judge_samples, prompt_key
from dpoctl.tasks.samples import KeywordJudge, Sample, Sampler, describe
from dpoctl.tasks.served import Client
from dpoctl.tasks.setup import Setup


@dataclass(frozen=True)
class Writers:
    """The models that write the texts of an evaluation, where they are not the run and its reference.

    Attributes:
        policy: a served model that writes in place of the run; None lets the run write.
        baseline: a served model, or another finished run or model; None takes the reference of the run.
        repeats: the number of times that all texts are drawn and judged.
    """

    policy: Client | None = None
    baseline: Client | FinishedRun | None = None
    repeats: int = 1


def judge_of(section: EvalSection) -> Judge | None:
    """Make the judge of a recipe that compares texts; None if it has none, or one that counts words."""
    if section.judge is None or section.judge.type == "keywords":
        return None
    return build_judge(section.judge)


def sample_finished(
    setup: Setup,
    finished: FinishedRun,
    stores: Mapping[str, TokenStore],
    limit: int | None = None,
    *,
    judge: Judge | None = None,
    writers: Writers | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Sample a finished run and its baseline, and judge the texts; every rank calls this.

    Args:
        setup: the setup of the finished model, with the recipe of the evaluation.
        finished: the run.
        stores: the eval sets.
        limit: use only the first prompts of each set.
        judge: what compares the texts; None leaves it to the word counts of the recipe, if it has any.
        writers: the models that write; None for the run and its reference.

    Returns:
        The numbers, under `samples`, `kl` and `judge`, and the samples; both empty if the recipe asks for none, or on
        other ranks than the first.
    """
    section, writers = setup.recipe.eval.samples, writers or Writers()
    if section is None or not (section.num or section.prompts) or not stores:
        return {}, []
    sampler = Sampler.of(section, setup, stores, limit)
    policy = [_draw(sampler, finished, writers.policy, repeat) for repeat in range(writers.repeats)]
    reference, divergences = _of_baseline(setup, sampler, finished, stores, limit, section, writers, policy)
    if not setup.accelerator.is_main_process:
        return {}, []
    samples = [
        one
        for repeat, texts in enumerate(policy)
        for one in sampler.pair(texts, None if reference is None else reference[repeat], repeat)
    ]
    report = describe_samples(samples, section) | _divergence(sampler, policy[0], divergences)
    if judge is not None and setup.recipe.eval.judge is not None:
        if reference is None:
            raise UsageError("a judge that compares needs a baseline", hint="pass one with --against")
        report["judge"], samples = judge_samples(setup.recipe.eval.judge, judge, samples)
    elif setup.recipe.eval.judge is not None:
        report["judge"] = count_words(setup.recipe.eval.judge, samples)
    return report, samples


def describe_samples(samples: Sequence[Sample], section: SamplesSection) -> dict[str, Any]:
    """Return the numbers of samples, under `samples`."""
    sides: dict[str, list[Generation]] = {
        "reference": [one.reference for one in samples if one.reference is not None],
        "policy": [one.policy for one in samples],
    }
    sides = {name: side for name, side in sides.items() if side}
    numbers = compare_texts(
        {name: [one.text for one in side] for name, side in sides.items()},
        {name: [one.finished for one in side] for name, side in sides.items()},
        [prompt_key(one.prompt) for one in samples],
        section.refusals,
    )
    return {"samples": numbers | describe(samples)}


def _draw(sampler: Sampler, finished: FinishedRun, client: Client | None, repeat: int) -> list[Generation]:
    return sampler.draw(finished.policy.causal, repeat) if client is None else sampler.ask(client, repeat)


def _of_baseline(
    setup: Setup,
    sampler: Sampler,
    finished: FinishedRun,
    stores: Mapping[str, TokenStore],
    limit: int | None,
    section: SamplesSection,
    writers: Writers,
    policy: Sequence[Sequence[Generation]],
) -> tuple[list[list[Generation]] | None, list[float] | None]:
    """Return the texts of the baseline, if there is one.

    Second, the divergence over each of the policy's first texts, if it can be known.
    """
    baseline, repeats = writers.baseline, range(writers.repeats)
    if isinstance(baseline, Client):
        return [sampler.ask(baseline, repeat) for repeat in repeats], None
    if baseline is None and is_model_only(finished.path):
        return None, None
    other, knows_tokens = sampler, True
    enter: Callable[[], AbstractContextManager[PreTrainedModel]] = finished.reference
    if baseline is not None:
        knows_tokens = same_tokens(setup.tokenizer, baseline.tokenizer)
        theirs = _beside(setup, baseline.policy, baseline.tokenizer)
        other, causal = Sampler.of(section, theirs, stores, limit, is_own=knows_tokens), baseline.policy.causal
        enter = lambda: nullcontext(causal)  # noqa: E731
    elif setup.sharded is not None and finished.other_policy is not None:
        other = sampler.of_model(_beside(setup, finished.other_policy, setup.tokenizer))
    with enter() as model:
        texts = [other.draw(model, repeat) for repeat in repeats]
    if not knows_tokens:
        return texts, None
    return texts, sampler.divergences(finished.policy.causal, enter, policy[0], other.setup)


def _beside(setup: Setup, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Setup:
    """Return the setup of another model, which is divided over the ranks if the first one is."""
    if setup.sharded is None:
        return replace(setup, tokenizer=tokenizer, policy=policy)
    return replace(setup, tokenizer=tokenizer).with_model(policy)


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers number the same tokens."""
    return bool(one.get_vocab() == other.get_vocab())


def _divergence(sampler: Sampler, texts: Sequence[Generation], divergences: Sequence[float] | None) -> dict[str, Any]:
    """Return the divergence from the baseline on the policy's texts, in nats per token."""
    if divergences is None:
        return {}
    lengths = [len(tokens) for tokens in sampler.tokens(texts)]
    return ratio(divergences, lengths, [prompt_key(prompt) for prompt in sampler.prompts]).named("kl")


def count_words(section: JudgeSection, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the shares of a keyword judge."""
    count = KeywordJudge(section.categories).count
    sides = {
        "reference": [(one.reference.text, prompt_key(one.prompt)) for one in samples if one.reference is not None],
        "policy": [(one.policy.text, prompt_key(one.prompt)) for one in samples],
    }
    return {"target": section.target, **{name: count(*zip(*rows, strict=True)) for name, rows in sides.items() if rows}}
