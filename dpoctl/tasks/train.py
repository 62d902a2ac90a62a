"""`dpoctl sft` and `dpoctl dpo`: wire a recipe's model, data, reference and loss together, and walk the plan."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.logps import Scorer
from dpoctl.core.loop import Cadence, EvalSet, Outputs, Run, fit
from dpoctl.core.objective import Objective
from dpoctl.core.optim import warmup_steps
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.prepare import PreparedData
from dpoctl.errors import UsageError
from dpoctl.model.checkpointing import set_gradient_checkpointing
from dpoctl.model.load import load_policy
from dpoctl.model.policy import Policy
from dpoctl.model.probe import Verdict, probe
from dpoctl.recipe.advice import advise, show_warnings
from dpoctl.recipe.document import Document
from dpoctl.recipe.schema import Recipe, TrainingSection
from dpoctl.runs import checkpoint
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.environment import describe_environment
from dpoctl.runs.health import Expectation
from dpoctl.runs.report import refresh_report
from dpoctl.runs.trackers import check_installed
from dpoctl.tasks.check import facts_of
from dpoctl.tasks.dry_run import show_plan
from dpoctl.tasks.extensions import ENVIRONMENT, RECORD, Extensions, Listeners
from dpoctl.tasks.journal import Journal
from dpoctl.tasks.machine import build_accelerator, quiet_libraries, token_budget
from dpoctl.tasks.prepared import metric_names, read_data
from dpoctl.tasks.reference import Live, Reference
from dpoctl.tasks.resume import refuse_other_recipe
from dpoctl.tasks.samples import Samples
from dpoctl.tasks.self_check import check_first_step
from dpoctl.tasks.task import Task, build_task

NO_EXTENSIONS = Extensions()
TRAIN = ""  # the name of the training store among the eval sets, whose names are never empty


def run(
    recipe: Recipe,
    *,
    recipe_text: str,
    document: Document | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    json_output: bool = False,
    extensions: Extensions = NO_EXTENSIONS,
) -> dict[str, Any]:
    """Train as a recipe says; every rank calls this.

    Args:
        recipe: checked and complete.
        recipe_text: the file as it was given, kept beside the results.
        document: where its keys stand, for advice.
        resume: go on from the newest good checkpoint of the run directory.
        overwrite: delete what a run left in the directory.
        dry_run: show what would be done, and train nothing.
        json_output: print one JSON object at the end.
        extensions: what code replaces.

    Returns:
        The run directory, the steps that were done, and the last value of every metric; nothing of a dry run.
    """
    quiet_libraries()
    if dry_run:
        show_plan(recipe, document=document, json_output=json_output)
        return {}
    check_installed(recipe.training.report_to)
    accelerator = build_accelerator(recipe)
    with ExitStack() as stack:
        directory = _open_directory(recipe, accelerator, stack, resume=resume, overwrite=overwrite)
        with accelerator.main_process_first():
            _write_beginning(directory, recipe, recipe_text, accelerator, extensions, resume=resume)
        tokenizer, data = read_data(recipe, accelerator)
        _write_data_report(directory, data, accelerator)
        summary = _train(recipe, document, accelerator, directory, tokenizer, data, extensions)
        if accelerator.is_main_process:
            refresh_report(directory.path)
    if json_output:
        console.emit(json.dumps(summary))
    else:
        console.say(f"done: {directory.path}")
    return summary


def _open_directory(
    recipe: Recipe, accelerator: Accelerator, stack: ExitStack, *, resume: bool, overwrite: bool
) -> RunDirectory:
    """Take the run directory."""
    path = Path(recipe.training.output_dir)
    with accelerator.main_process_first():
        if not accelerator.is_main_process:
            return RunDirectory(path)
        return stack.enter_context(RunDirectory.open(path, resume=resume, overwrite=overwrite))


def _write_beginning(
    directory: RunDirectory,
    recipe: Recipe,
    text: str,
    accelerator: Accelerator,
    extensions: Extensions,
    *,
    resume: bool,
) -> None:
    """Write what is known before anything is loaded."""
    if not accelerator.is_main_process:
        return
    if resume:
        refuse_other_recipe(directory, recipe)
        extensions.check_resumed(directory.path)
    directory.write_text(directory.resolved_recipe.name, recipe.to_yaml())
    directory.write_text("recipe.yaml", text)
    environment = describe_environment(world_size=accelerator.num_processes)
    directory.write_json(ENVIRONMENT, environment | {RECORD: extensions.names()})


def _write_data_report(directory: RunDirectory, data: PreparedData, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        # With the formats that were found, so that reading it again cannot mean something else.
        directory.write_text(directory.resolved_recipe.name, data.recipe.to_yaml())
        directory.write_json("data_report.json", data.report)
        directory.write_text(directory.rejects.name, data.rejects.read_text(encoding="utf-8"))


def _train(
    recipe: Recipe,
    document: Document | None,
    accelerator: Accelerator,
    directory: RunDirectory,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    extensions: Extensions,
) -> dict[str, Any]:
    """Run the whole training, from loaded data to exported model, and return its summary."""
    newest = _newest_checkpoint(directory, accelerator, data.train.key)
    policy = load_policy(recipe, tokenizer, accelerator.device, model_init=extensions.model_init)
    verdict, plan, checkpointing = _lay_out(recipe, policy, Lengths.of(data.train), accelerator, newest)
    _announce(policy, verdict, plan, checkpointing, accelerator)
    if accelerator.is_main_process:
        _give_advice(recipe, document, directory, tokenizer, data, policy)

    task = build_task(recipe)
    readers = _readers(recipe, data, plan, accelerator, int(tokenizer.pad_token_id or 0), extensions)
    readers, live = _with_reference(readers, recipe, accelerator, policy, plan, task, verdict)
    evals = {name: EvalSet(readers[name], plan.one_pass(Lengths.of(store))) for name, store in data.evals.items()}
    set_gradient_checkpointing(policy, checkpointing)
    objective, optimizer = _objective(recipe, accelerator, policy, verdict, task, live, extensions)
    if newest is None and task.needs_reference and recipe.dpo.reference.path is None:
        check_first_step(objective, plan, readers[TRAIN], task.at_init, policy.dtype)
    start = newest.step if newest else -1
    samples = Samples(recipe, directory.path, accelerator, tokenizer, policy, data.evals, start)
    # Each rank draws its own dropout; everything before this line drew from generators of its own.
    torch.manual_seed(recipe.training.seed + accelerator.process_index)

    training = recipe.training
    with Journal(
        *(recipe, directory, accelerator, policy, optimizer, plan, objective, newest),
        data_key=data.train.key,
        live=live,
        expected=_expectation(recipe, plan, task),
    ) as journal:
        listeners = Listeners(extensions.callbacks, journal.log, accelerator)
        done = fit(
            Run(
                accelerator=accelerator,
                objective=objective,
                optimizer=optimizer,
                plan=plan,
                reader=readers[TRAIN],
                learning_rate=extensions.rates(training, plan.num_steps),
                max_grad_norm=training.max_grad_norm,
                outputs=Outputs(
                    *(listeners.log, journal.save, journal.advance), partial(samples.write, journal), listeners.ended
                ),
                cadence=_cadence(training),
                evals=evals,
                start=max(start, 0),
                updated=live.follow if live is not None else lambda step: None,
            )
        )
    if accelerator.is_main_process:
        policy.export(directory.path, tokenizer)
    accelerator.wait_for_everyone()
    return {"output_dir": str(directory.path), "steps": done, "metrics": journal.last}


def _objective(
    recipe: Recipe,
    accelerator: Accelerator,
    policy: Policy,
    verdict: Verdict,
    task: Task,
    live: Live | None,
    extensions: Extensions,
) -> tuple[Objective, Any]:
    """Return what is minimised, and what minimises it, on all ranks together."""
    plain = Scorer(policy.model, policy.causal, verdict, confidence="confidence" in task.needs)
    scorer, optimizer = accelerator.prepare(plain.train(), extensions.build_optimizer(policy, recipe.training))
    report = extensions.report(task.report)
    return Objective(accelerator, scorer, task.terms, report, live, recipe.training.seed), optimizer


def _newest_checkpoint(directory: RunDirectory, accelerator: Accelerator, data_key: str) -> Checkpoint | None:
    """Return this rank's part of the newest good checkpoint, chosen by the first rank."""
    found = [checkpoint.newest(directory.checkpoints)] if accelerator.is_main_process else [None]
    (path,) = broadcast_object_list(found)
    newest = None if path is None else checkpoint.load(path, accelerator.process_index)
    if newest and newest.extra["data"] != data_key:
        raise UsageError(
            f"{directory.path}: the training data, the tokenizer or the template is not what the run began with",
            hint="put it back, or start anew with --overwrite",
        )
    return newest


def _lay_out(
    recipe: Recipe, policy: Policy, lengths: Lengths, accelerator: Accelerator, newest: Checkpoint | None
) -> tuple[Verdict, Plan, int]:
    """Return how the model is run, the plan, and every how many layers are recomputed: the same on all ranks."""
    with accelerator.autocast():
        (verdict,) = broadcast_object_list([probe(policy.causal, max_length=recipe.data.max_length)])
    budget, checkpointing = token_budget(recipe, policy, lengths, accelerator)
    if newest and recipe.training.max_tokens_per_device == "auto":
        # The same cuts give the same bits.
        budget = newest.extra["max_tokens"]
    training = recipe.training
    plan = Plan(
        lengths,
        training.global_batch_size,
        accelerator.num_processes,
        budget,
        verdict.layout,
        training.seed,
        training.num_train_epochs,
        training.max_steps,
    )
    return verdict, plan, checkpointing


def _expectation(recipe: Recipe, plan: Plan, task: Task) -> Expectation:
    # Only a reference that is the policy before training fixes the first loss.
    is_known = recipe.dpo.reference.path is None and task.needs_reference
    return Expectation(
        plan.num_steps, warmup_steps(recipe.training, plan.num_steps), task.at_init if is_known else None
    )


def _cadence(training: TrainingSection) -> Cadence:
    return Cadence(training.logging_steps, training.eval_steps, training.save_steps, training.eval_on_start)


def _give_advice(
    recipe: Recipe,
    document: Document | None,
    directory: RunDirectory,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    policy: Policy,
) -> None:
    findings = advise(recipe, document, facts_of(recipe, tokenizer, data, policy))
    directory.write_json("advice.json", [finding.to_dict() for finding in findings])
    show_warnings(findings)


def _readers(
    recipe: Recipe, data: PreparedData, plan: Plan, accelerator: Accelerator, pad: int, extensions: Extensions
) -> Mapping[str, Reader]:
    """Return a reader for each store."""
    stores = {TRAIN: data.train} | dict(data.evals)
    return {
        name: Reader(
            store,
            plan.layout,
            accelerator.device,
            pad,
            collate=extensions.collator,
            names=metric_names(recipe, name),
        )
        for name, store in stores.items()
    }


def _with_reference(
    readers: Mapping[str, Reader],
    recipe: Recipe,
    accelerator: Accelerator,
    policy: Policy,
    plan: Plan,
    task: Task,
    verdict: Verdict,
) -> tuple[Mapping[str, Reader], Live | None]:
    """Put the reference into the readers, or return it where it runs beside the policy."""
    if not task.needs_reference:
        return readers, None
    reference = Reference(recipe, policy, verdict, accelerator, task.needs)
    if recipe.dpo.reference.is_live:
        return readers, reference.live()
    # No graph is held in that pass, so more fits.
    return {name: reference.read_into(reader, 4 * plan.max_tokens) for name, reader in readers.items()}, None


def _announce(policy: Policy, verdict: Verdict, plan: Plan, checkpointing: int, accelerator: Accelerator) -> None:
    """Say in a few lines what was chosen, and why."""
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    dtype, device = str(policy.dtype).removeprefix("torch."), accelerator.device.type
    which = {0: "", 1: ", layers recomputed in backward"}
    recompute = which.get(checkpointing, f", one layer in {checkpointing} recomputed in backward")
    console.say(
        f"model: {type(policy.causal).__name__}, {total / 1e6:,.1f} M parameters, {trained / 1e6:,.2f} M trained "
        f"({policy.kind}), {dtype} on {device}{recompute}"
    )
    console.say(f"layout: {verdict.layout}; {verdict.reason}")
    console.say(
        f"plan: {len(plan.lengths):,} rows, {plan.num_steps:,} steps of {plan.global_batch_size}, "
        f"processes {plan.world_size}, at most {plan.max_tokens:,} tokens in a micro-batch"
    )
