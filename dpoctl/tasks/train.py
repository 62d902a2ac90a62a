"""`dpoctl sft` and `dpoctl dpo`: wire a recipe's model, data, reference and loss together, and walk the plan."""

import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dpoctl import __version__, console
from dpoctl.core.guard import Guard, refuse_different
from dpoctl.core.logps import Scorer
from dpoctl.core.loop import Cadence, EvalSet, Outputs, Run, fit
from dpoctl.core.objective import Objective
from dpoctl.core.optim import warmup_steps
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.prepare import PreparedData
from dpoctl.model.checkpointing import set_gradient_checkpointing
from dpoctl.model.compiled import compile_layers
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
from dpoctl.runs.redact import redact_source
from dpoctl.runs.report import refresh_report
from dpoctl.runs.signals import terminable
from dpoctl.runs.status import reported
from dpoctl.runs.trackers import check_installed
from dpoctl.tasks.check import facts_of
from dpoctl.tasks.dry_run import show_plan
from dpoctl.tasks.extensions import ENVIRONMENT, RECORD, Extensions, Listeners
from dpoctl.tasks.journal import Journal
from dpoctl.tasks.machine import be_patient, build_accelerator, keep_freed_memory, quiet_libraries, token_budget
from dpoctl.tasks.prepared import metric_names, read_data
from dpoctl.tasks.reference import Live, Reference
from dpoctl.tasks.resume import refuse_changes, refuse_other_data
from dpoctl.tasks.samples import Samples
from dpoctl.tasks.self_check import check_first_step
from dpoctl.tasks.task import Task, build_task
from dpoctl.tasks.trouble import Relief, named
from dpoctl.tasks.upload import require_login, upload

NO_EXTENSIONS = Extensions()
TRAIN = ""  # the name of the training store among the eval sets, whose names are never empty


@dataclass(frozen=True)
class _Job:
    """What a training is given, and where it runs.

    Attributes:
        recipe: checked and complete.
        document: where its keys stand.
        accelerator: knows the ranks.
        directory: of the run.
        extensions: what code replaces.
        allow_changed: keys that may differ from what the run began with.
    """

    recipe: Recipe
    document: Document | None
    accelerator: Accelerator
    directory: RunDirectory
    extensions: Extensions
    allow_changed: Sequence[str]


def run(
    recipe: Recipe,
    *,
    recipe_text: str,
    document: Document | None = None,
    resume: bool = False,
    allow_changed: Sequence[str] = (),
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
        allow_changed: keys that may differ from what the run began with.
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
    require_login(recipe.training)
    resume = resume or (recipe.training.resume == "auto" and not overwrite)
    accelerator = build_accelerator(recipe)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with terminable(), ExitStack() as stack, named(accelerator):
        directory = _open_directory(recipe, accelerator, stack, resume=resume, overwrite=overwrite)
        job = _Job(recipe, document, accelerator, directory, extensions, allow_changed)
        with accelerator.main_process_first():
            _write_beginning(job, recipe_text, resume=resume)
        tokenizer, data = read_data(recipe, accelerator)
        _refuse_different_ranks(recipe, data, accelerator)
        _write_data_report(directory, data, accelerator)
        summary = _train(job, tokenizer, data)
        if accelerator.is_main_process:
            refresh_report(directory.path)
            upload(directory.path, recipe.training)
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
        directory = stack.enter_context(RunDirectory.open(path, resume=resume, overwrite=overwrite))
        stack.enter_context(reported(directory.path))
        return directory


def _write_beginning(job: _Job, text: str, *, resume: bool) -> None:
    """Write what is known before anything is loaded."""
    if not job.accelerator.is_main_process:
        return
    if resume:
        refuse_changes(job.directory, job.recipe, job.allow_changed)
        job.extensions.check_resumed(job.directory.path)
    job.directory.write_text(job.directory.resolved_recipe.name, redact_source(job.recipe.to_yaml()))
    job.directory.write_text("recipe.yaml", redact_source(text))
    environment = describe_environment(world_size=job.accelerator.num_processes)
    job.directory.write_json(ENVIRONMENT, environment | {RECORD: job.extensions.names()})


def _refuse_different_ranks(recipe: Recipe, data: PreparedData, accelerator: Accelerator) -> None:
    """See that all ranks are about to do the same."""
    refuse_different(accelerator, "recipe or version", zlib.crc32((recipe.to_yaml() + __version__).encode()))
    refuse_different(accelerator, "training data", zlib.crc32(data.train.key.encode()))


def _write_data_report(directory: RunDirectory, data: PreparedData, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        # With the formats that were found, so that reading it again cannot mean something else.
        directory.write_text(directory.resolved_recipe.name, redact_source(data.recipe.to_yaml()))
        directory.write_json("data_report.json", data.report)
        directory.write_text(directory.rejects.name, data.rejects.read_text(encoding="utf-8"))


def _train(job: _Job, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> dict[str, Any]:
    """Run the whole training, from loaded data to exported model, and return its summary."""
    recipe, accelerator, extensions = job.recipe, job.accelerator, job.extensions
    newest = _newest_checkpoint(job.directory, accelerator)
    if newest is not None:
        refuse_other_data(job.directory, newest, data.train.key, job.allow_changed)
    policy = load_policy(recipe, tokenizer, accelerator.device, model_init=extensions.model_init)
    verdict, plan, checkpointing = _lay_out(recipe, policy, Lengths.of(data.train), accelerator, newest)
    if recipe.training.torch_compile:
        compile_layers(policy.causal)
    _announce(policy, verdict, plan, checkpointing, accelerator)
    _give_advice(job, tokenizer, data, policy)

    task = build_task(recipe)
    readers = _readers(job, data, plan, int(tokenizer.pad_token_id or 0))
    readers, live = _with_reference(readers, job, policy, plan, task, verdict)
    evals = {name: EvalSet(readers[name], plan.one_pass(Lengths.of(store))) for name, store in data.evals.items()}
    set_gradient_checkpointing(policy, checkpointing)
    objective, optimizer = _objective(job, policy, verdict, task, live)
    if newest is None and task.needs_reference and recipe.dpo.reference.path is None:
        check_first_step(objective, plan, readers[TRAIN], task.at_init, policy.dtype)
    start = newest.step if newest else -1
    samples = Samples(recipe, job.directory.path, accelerator, tokenizer, policy, data.evals, start)
    # Each rank draws its own dropout; everything before this line drew from generators of its own.
    torch.manual_seed(recipe.training.seed + accelerator.process_index)

    guard, relief = Guard(accelerator, recipe.training.on_nonfinite), _relief(job, plan, newest)
    be_patient(recipe.training.ddp_timeout)
    with Journal(
        *(recipe, job.directory, accelerator, policy, optimizer, plan, objective, newest),
        data_key=data.train.key,
        guard=guard,
        relief=relief,
        live=live,
        expected=_expectation(recipe, plan, task),
    ) as journal:
        done = fit(
            Run(
                accelerator=accelerator,
                objective=objective,
                optimizer=optimizer,
                plan=plan,
                reader=readers[TRAIN],
                learning_rate=extensions.rates(recipe.training, plan.num_steps),
                max_grad_norm=recipe.training.max_grad_norm,
                outputs=_outputs(job, journal, samples),
                cadence=_cadence(recipe.training),
                guard=guard,
                relieve=relief,
                evals=evals,
                start=max(start, 0),
                updated=live.follow if live is not None else lambda step: None,
            )
        )
    if accelerator.is_main_process:
        policy.export(job.directory.path, tokenizer)
    accelerator.wait_for_everyone()
    return {"output_dir": str(job.directory.path), "steps": done, "metrics": journal.last}


def _outputs(job: _Job, journal: Journal, samples: Samples) -> Outputs:
    listeners = Listeners(job.extensions.callbacks, journal.log, job.accelerator)
    return Outputs(
        log=listeners.log,
        save=journal.save,
        advance=journal.advance,
        evaluated=partial(samples.write, journal),
        ended=listeners.ended,
        settle=journal.settle,
    )


def _objective(job: _Job, policy: Policy, verdict: Verdict, task: Task, live: Live | None) -> tuple[Objective, Any]:
    """Return what is minimised, and what minimises it, on all ranks together."""
    training, extensions = job.recipe.training, job.extensions
    plain = Scorer(policy.model, policy.causal, verdict, confidence="confidence" in task.needs)
    scorer, optimizer = job.accelerator.prepare(plain.train(), extensions.build_optimizer(policy, training))
    report = extensions.report(task.report)
    return Objective(job.accelerator, scorer, task.terms, report, live, training.seed), optimizer


def _newest_checkpoint(directory: RunDirectory, accelerator: Accelerator) -> Checkpoint | None:
    """Return this rank's part of the newest good checkpoint, chosen by the first rank."""
    found = [checkpoint.newest(directory.checkpoints)] if accelerator.is_main_process else [None]
    (path,) = broadcast_object_list(found)
    return None if path is None else checkpoint.load(path, accelerator.process_index)


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


def _relief(job: _Job, plan: Plan, newest: Checkpoint | None) -> Relief:
    used = newest is not None and bool(newest.extra.get("relieved"))
    automatic = job.recipe.training.max_tokens_per_device == "auto"
    return Relief(automatic, job.accelerator, plan.max_tokens, used=used)


def _cadence(training: TrainingSection) -> Cadence:
    return Cadence(training.logging_steps, training.eval_steps, training.save_steps, training.eval_on_start)


def _give_advice(job: _Job, tokenizer: PreTrainedTokenizerBase, data: PreparedData, policy: Policy) -> None:
    if job.accelerator.is_main_process:
        findings = advise(job.recipe, job.document, facts_of(job.recipe, tokenizer, data, policy))
        job.directory.write_json("advice.json", [finding.to_dict() for finding in findings])
        show_warnings(findings)


def _readers(job: _Job, data: PreparedData, plan: Plan, pad: int) -> Mapping[str, Reader]:
    """Return a reader for each store."""
    stores = {TRAIN: data.train} | dict(data.evals)
    return {
        name: Reader(
            store,
            plan.layout,
            job.accelerator.device,
            pad,
            collate=job.extensions.collator,
            names=metric_names(job.recipe, name),
        )
        for name, store in stores.items()
    }


def _with_reference(
    readers: Mapping[str, Reader], job: _Job, policy: Policy, plan: Plan, task: Task, verdict: Verdict
) -> tuple[Mapping[str, Reader], Live | None]:
    """Put the reference into the readers, or return it where it runs beside the policy."""
    if not task.needs_reference:
        return readers, None
    reference = Reference(job.recipe, policy, verdict, job.accelerator, task.needs)
    if job.recipe.dpo.reference.is_live:
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
