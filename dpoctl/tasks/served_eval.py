"""`dpoctl eval --model-url URL --model NAME --data SOURCE`: the texts of a served model that belongs to no run.

A server gives texts and no log-probabilities: whatever needs those is left out by name, and a gate on it is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpoctl import console
from dpoctl.data.records import Text
from dpoctl.data.sources import has_splits
from dpoctl.data.tokenize import render_prompts
from dpoctl.errors import RunError, UsageError
from dpoctl.model.generate import Generation
from dpoctl.model.load import compute_dtype, weight_dtype
from dpoctl.recipe.sampled_pairs import PromptsSection
from dpoctl.recipe.schema import EvalSection, SamplesSection
from dpoctl.runs.gates import check_gates
from dpoctl.runs.results import Provenance
from dpoctl.tasks.baselines import Baseline
from dpoctl.tasks.eval_samples import count_words, describe_samples, judge_of
from dpoctl.tasks.evaluate import check_output, keep_result, refuse_other_sections, settings_of, show_result
from dpoctl.tasks.finished_run import FinishedRun, model_recipe, recipe_of
from dpoctl.tasks.judges import Judge
from dpoctl.tasks.judging import judge_samples
from dpoctl.tasks.sampled_pairs import read_prompts
from dpoctl.tasks.samples import Sample, Sampler, ask, sampling_of, to_lines
from dpoctl.tasks.served import Client
from dpoctl.tasks.setup import Setup, build_accelerator, quiet_libraries

NOT_MEASURED = ("loss", "rewards/accuracies", "rewards/margins", "kl")
"""The main metrics that need log-probabilities."""
OF_TEXTS = ("samples", "judge")
"""The tables of a result for which texts suffice."""
Texts = Sequence[Generation | None]


def run(
    served: Client,
    *,
    data: str | None,
    limit: int | None = None,
    json_output: bool = False,
    overrides: Sequence[str] = (),
    repeats: int = 1,
    baseline: Baseline | None = None,
    output: Path | None = None,
) -> bool:
    """Evaluate the texts that a served model writes to the prompts of some data.

    Args:
        served: asks the model.
        data: a file, folder or hub id with prompts; None if `eval.samples.prompts` has them.
        limit: use only the first prompts.
        json_output: print one JSON object.
        overrides: `key=value` texts that set values of the section `eval`.
        repeats: draw and judge all texts so often.
        baseline: what the texts are compared with; None for nothing.
        output: the folder that keeps the result, in `evals/`; None keeps it nowhere.

    Returns:
        Whether all gates passed.

    Raises:
        UsageError: the options or the section `eval` ask for what a served model does not give.
        RunError: no prompt has a text of each side.
    """
    quiet_libraries()
    check_output(output)
    section = _section(served, data, overrides)
    _refuse(section, baseline)
    judge = judge_of(section)
    prompts, origin = _prompts(served, section, data, limit)
    texts = section.samples or SamplesSection()
    asked = [prompt for prompt in prompts for _ in range(texts.per_prompt)]
    policy = [_ask(served, asked, texts, repeat) for repeat in range(repeats)]
    others = _of_baseline(baseline, prompts, texts, repeats)
    samples, unanswered = _paired(asked, policy, others)
    found, samples = _measure(section, texts, judge, samples)
    found["samples"] |= {"unanswered": unanswered} if unanswered else {}
    name = None if baseline is None else baseline.name
    origin = replace(origin, baseline=name, settings=tuple(settings_of(overrides, repeats, None)))
    about = {"endpoint": {"url": served.endpoint.url, "model": served.endpoint.model}}
    report = {**origin.to_dict(), **about, "not_measured": list(NOT_MEASURED), **found}
    gates = check_gates(report, section.gates)
    report |= {"gates": [gate.to_dict() for gate in gates]} if gates else {}
    where = keep_result(served.endpoint.name, output, origin, report, to_lines(samples), {})
    unmeasured = f"not measured, because a server gives no log-probabilities: {', '.join(NOT_MEASURED)}"
    show_result(report, {}, samples, found, [unmeasured, *map(str, gates), where], as_json=json_output)
    return all(gate.passed for gate in gates)


def _section(served: Client, data: str | None, overrides: Sequence[str]) -> EvalSection:
    """Return the section `eval` of the command line."""
    refuse_other_sections(overrides)
    # A recipe that is complete, so that the section is checked as in any other.
    source = json.dumps({"eval": [data or "data"]})
    changes = [f"data.eval={source}", "training.eval_steps=1", "eval.samples={}", *overrides]
    section = model_recipe(Path(served.endpoint.model), method="sft", overrides=changes).eval
    if data is None and (section.samples is None or section.samples.prompts is None):
        raise UsageError("a served model has no eval data", hint="pass some with --data SOURCE")
    return section


def _refuse(section: EvalSection, baseline: Baseline | None) -> None:
    """Refuse what needs log-probabilities, or a baseline that is not there, before anything is paid for.

    Raises:
        UsageError: the section asks for it.
    """
    needs = "needs log-probabilities, which a served model does not give"
    if section.benchmarks:
        raise UsageError(f"eval.benchmarks {needs}", hint="pass a run or a model folder in its place")
    for gate in section.gates:
        if gate.metric.partition(".")[0] not in OF_TEXTS:
            raise UsageError(
                f"eval.gates: {gate.metric} {needs}", hint="set gates on samples and judge only, or pass a run"
            )
    if section.judge is not None and section.judge.type != "keywords" and baseline is None:
        raise UsageError("a judge that compares needs a baseline", hint="pass one with --against")


def _prompts(
    served: Client, section: EvalSection, data: str | None, limit: int | None
) -> tuple[list[Text], Provenance]:
    """Return the prompts to answer, and what the result will say of its origin."""
    texts = section.samples or SamplesSection()
    if texts.prompts is not None:
        found: list[Text] = [[{"role": "user", "content": text}] for text in texts.prompts]
        source, limit = "eval.samples.prompts", None
    else:
        source = data or ""
        split = {"split": "test"} if has_splits(source) else {}
        found, left_out = read_prompts(PromptsSection(path=source, **split))
        rows = "".join(f"; not used: {count:,} rows, {reason}" for reason, count in left_out.items())
        console.say(f"eval: {len(found):,} prompts{rows}")
        # The default number of samples is one for trainings.
        bounds = [limit, texts.num if "num" in texts.model_fields_set else None]
        limit = min((bound for bound in bounds if bound is not None), default=None)
    used = found[:limit]
    if not used:
        raise UsageError("eval.samples.num is 0: there is nothing to evaluate", hint="raise it, or leave it out")
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:32]
    model = hashlib.sha256(served.endpoint.name.encode()).hexdigest()[:16]
    about = {"eval": {"sources": [source], "key": digest, "records": len(used)}}
    return used, Provenance(
        served.endpoint.name, model, step=None, data=about, limit=limit, baseline=None, official=False
    )


def _ask(client: Client, prompts: Sequence[Text], section: SamplesSection, repeat: int) -> Texts:
    """Return a text for each prompt; None where the server refused it, or answered without one."""
    replies = ask(client, prompts, sampling_of(section), repeat)
    return [None if one.problem else Generation(one.text, one.finished) for one in replies]


def _of_baseline(
    baseline: Baseline | None, prompts: Sequence[Text], section: SamplesSection, repeats: int
) -> list[Texts] | None:
    """Return the texts of the baseline, which is served as well, or loaded here with its own template."""
    if baseline is None:
        return None
    if baseline.client is not None:
        asked = [prompt for prompt in prompts for _ in range(section.per_prompt)]
        return [_ask(baseline.client, asked, section, repeat) for repeat in range(repeats)]
    assert baseline.folder is not None
    recipe = recipe_of(baseline.folder)
    accelerator = build_accelerator(recipe)
    dtype = weight_dtype(recipe, compute_dtype(recipe, accelerator.device))
    finished = FinishedRun.load(baseline.folder, accelerator.device, dtype)
    setup = Setup.of(recipe, accelerator, finished.tokenizer, finished.policy)
    ids = render_prompts(finished.tokenizer, list(prompts), recipe.data.chat_template_kwargs)
    sampler = Sampler(section, setup, list(zip(prompts, ids, strict=True)))
    return [sampler.draw(finished.policy.causal, repeat) for repeat in range(repeats)]


def _paired(
    prompts: Sequence[Text], policy: Sequence[Texts], others: Sequence[Texts] | None
) -> tuple[list[Sample], int]:
    """Return the samples that have a text of each side, and the number of those that lack one.

    Raises:
        RunError: there are none.
    """
    samples, unanswered = [], 0
    for repeat, texts in enumerate(policy):
        beside = [None] * len(texts) if others is None else others[repeat]
        for prompt, text, other in zip(prompts, texts, beside, strict=True):
            if text is None or (other is None and others is not None):
                unanswered += 1
            else:
                samples.append(Sample(prompt, text, other, repeat))
    if not samples:
        by = "" if others is None else " by both models"
        raise RunError(f"no prompt was answered{by}: there is nothing to evaluate")
    if unanswered:
        console.warn(f"{unanswered:,} of {unanswered + len(samples):,} prompts have no answer, and do not count")
    return samples, unanswered


def _measure(
    section: EvalSection, texts: SamplesSection, judge: Judge | None, samples: list[Sample]
) -> tuple[dict[str, Any], list[Sample]]:
    """Return the numbers of the samples and of their judge, and the samples with its votes."""
    found = describe_samples(samples, texts)
    if section.judge is None:
        return found, samples
    if judge is None:
        return found | {"judge": count_words(section.judge, samples)}, samples
    votes, samples = judge_samples(section.judge, judge, samples)
    return found | {"judge": votes}, samples
