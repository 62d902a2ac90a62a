"""`dpoctl sft` and `dpoctl dpo`: wire a recipe's model, data, reference and loss together, and walk the plan."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.logps import Scorer
from dpoctl.core.loop import Cadence, EvalSet, Outputs, Run, fit
from dpoctl.core.objective import LiveReference, Objective
from dpoctl.core.optim import build_optimizer, learning_rate
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.prepare import PreparedData
from dpoctl.errors import UsageError
from dpoctl.model.checkpointing import set_gradient_checkpointing
from dpoctl.model.load import load_policy
from dpoctl.model.policy import Policy
from dpoctl.model.probe import Verdict, probe
from dpoctl.recipe.schema import Recipe
from dpoctl.runs import checkpoint
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.environment import describe_environment
from dpoctl.runs.trackers import check_installed
from dpoctl.tasks.dry_run import show_plan
from dpoctl.tasks.journal import Journal
from dpoctl.tasks.machine import build_accelerator, quiet_libraries, token_budget
from dpoctl.tasks.prepared import read_data
from dpoctl.tasks.reference import Reference
from dpoctl.tasks.resume import refuse_other_recipe
from dpoctl.tasks.self_check import check_first_step
from dpoctl.tasks.task import Task, build_task

TRAIN = ""  # the name of the training store among the eval sets, whose names are never empty


def run(
    recipe: Recipe,
    *,
    recipe_text: str,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    json_output: bool = False,
) -> None:
    """Train as a recipe says; every rank calls this.

    Args:
        recipe: checked and complete.
        recipe_text: the file as it was given, kept beside the results.
        resume: go on from the newest good checkpoint of the run directory.
        overwrite: delete what a run left in the directory.
        dry_run: show what would be done, and train nothing.
        json_output: print one JSON object at the end.
    """
    quiet_libraries()
    if dry_run:
        show_plan(recipe, json_output=json_output)
        return
    check_installed(recipe.training.report_to)
    accelerator = build_accelerator(recipe)
    with ExitStack() as stack:
        directory = _open_directory(recipe, recipe_text, accelerator, stack, resume=resume, overwrite=overwrite)
        tokenizer, data = read_data(recipe, accelerator)
        _write_data_report(directory, data, accelerator)
        summary = _train(recipe, accelerator, directory, tokenizer, data)
    if json_output:
        console.emit(json.dumps(summary))
    else:
        console.say(f"done: {directory.path}")


def _open_directory(
    recipe: Recipe, text: str, accelerator: Accelerator, stack: ExitStack, *, resume: bool, overwrite: bool
) -> RunDirectory:
    """Take the run directory and write what is known before anything is loaded."""
    path = Path(recipe.training.output_dir)
    with accelerator.main_process_first():
        if not accelerator.is_main_process:
            return RunDirectory(path)
        directory = stack.enter_context(RunDirectory.open(path, resume=resume, overwrite=overwrite))
        if resume:
            refuse_other_recipe(directory, recipe)
        directory.write_text(directory.resolved_recipe.name, recipe.to_yaml())
        directory.write_text("recipe.yaml", text)
        directory.write_json("env.json", describe_environment(world_size=accelerator.num_processes))
        return directory


def _write_data_report(directory: RunDirectory, data: PreparedData, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        directory.write_json("data_report.json", data.report)
        directory.write_text(directory.rejects.name, data.rejects.read_text(encoding="utf-8"))


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    directory: RunDirectory,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> dict[str, Any]:
    """Run the whole training, from loaded data to exported model, and return its summary."""
    newest = _newest_checkpoint(directory, accelerator)
    if newest and newest.extra["data"] != data.train.key:
        raise UsageError(
            f"{directory.path}: the training data, the tokenizer or the template is not what the run began with",
            hint="put it back, or start anew with --overwrite",
        )
    policy = load_policy(recipe, tokenizer, accelerator.device)
    with accelerator.autocast():
        (verdict,) = broadcast_object_list([probe(policy.causal, max_length=recipe.data.max_length)])
    lengths, task = Lengths.of(data.train), build_task(recipe)
    budget, checkpointing = token_budget(recipe, policy, lengths, accelerator)
    if newest and recipe.training.max_tokens_per_device == "auto":
        # The same cuts give the same bits.
        budget = newest.extra["max_tokens"]
    plan = _plan(recipe, lengths, verdict, budget, accelerator)
    _announce(policy, verdict, plan, checkpointing, accelerator)

    readers, live = _readers(recipe, accelerator, tokenizer, data, policy, plan, task, verdict)
    evals = {name: EvalSet(readers[name], plan.one_pass(Lengths.of(store))) for name, store in data.evals.items()}
    set_gradient_checkpointing(policy, checkpointing)
    optimizer = build_optimizer(policy.model.named_parameters(), recipe.training)
    scorer, optimizer = accelerator.prepare(Scorer(policy.model, policy.causal, verdict).train(), optimizer)
    objective = Objective(accelerator, scorer, task.loss, task.report, live)
    if newest is None and task.at_init is not None and recipe.dpo.reference.path is None:
        check_first_step(objective, plan, readers[TRAIN], task.at_init, policy.dtype)
    # Each rank draws its own dropout; everything before this line drew from generators of its own.
    torch.manual_seed(recipe.training.seed + accelerator.process_index)

    training = recipe.training
    with Journal(recipe, directory, accelerator, policy, optimizer, plan, newest, data_key=data.train.key) as journal:
        fit(
            Run(
                accelerator=accelerator,
                objective=objective,
                optimizer=optimizer,
                plan=plan,
                reader=readers[TRAIN],
                learning_rate=learning_rate(training, plan.num_steps),
                max_grad_norm=training.max_grad_norm,
                outputs=Outputs(journal.log, journal.save, journal.advance),
                cadence=Cadence(
                    training.logging_steps, training.eval_steps, training.save_steps, training.eval_on_start
                ),
                evals=evals,
                start=newest.step if newest else 0,
            )
        )
    if accelerator.is_main_process:
        policy.export(directory.path, tokenizer)
    accelerator.wait_for_everyone()
    return {"output_dir": str(directory.path), "steps": plan.num_steps, "metrics": journal.last}


def _newest_checkpoint(directory: RunDirectory, accelerator: Accelerator) -> Checkpoint | None:
    """Return this rank's part of the newest good checkpoint, chosen by the first rank."""
    found = [checkpoint.newest(directory.checkpoints)] if accelerator.is_main_process else [None]
    (path,) = broadcast_object_list(found)
    return None if path is None else checkpoint.load(path, accelerator.process_index)


def _plan(recipe: Recipe, lengths: Lengths, verdict: Verdict, budget: int, accelerator: Accelerator) -> Plan:
    training = recipe.training
    return Plan(
        lengths,
        training.global_batch_size,
        accelerator.num_processes,
        budget,
        verdict.layout,
        training.seed,
        training.num_train_epochs,
        training.max_steps,
    )


def _readers(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    policy: Policy,
    plan: Plan,
    task: Task,
    verdict: Verdict,
) -> tuple[dict[str, Reader], LiveReference | None]:
    """Return a reader for each store, with the reference in it, or the reference where it runs beside the policy."""
    pad = int(tokenizer.pad_token_id or 0)
    stores = {TRAIN: data.train} | dict(data.evals)
    readers = {name: Reader(store, plan.layout, accelerator.device, pad) for name, store in stores.items()}
    if not task.loss.needs_reference:
        return readers, None
    reference = Reference(recipe, policy, verdict, accelerator)
    if recipe.dpo.reference.mode == "live":
        return readers, reference.live()
    # No graph is held in that pass, so more fits.
    tables = {name: reference.table(reader, 4 * plan.max_tokens) for name, reader in readers.items()}
    return {name: replace(reader, ref_logps=tables[name]) for name, reader in readers.items()}, None


def _announce(policy: Policy, verdict: Verdict, plan: Plan, checkpointing: bool, accelerator: Accelerator) -> None:
    """Say in a few lines what was chosen, and why."""
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    dtype, device = str(policy.dtype).removeprefix("torch."), accelerator.device.type
    recompute = ", layers recomputed in backward" if checkpointing else ""
    console.say(
        f"model: {type(policy.causal).__name__}, {total / 1e6:,.1f} M parameters, {trained / 1e6:,.2f} M trained "
        f"({policy.kind}), {dtype} on {device}{recompute}"
    )
    console.say(f"layout: {verdict.layout}; {verdict.reason}")
    console.say(
        f"plan: {len(plan.lengths):,} rows, {plan.num_steps:,} steps of {plan.global_batch_size}, "
        f"processes {plan.world_size}, at most {plan.max_tokens:,} tokens in a micro-batch"
    )
