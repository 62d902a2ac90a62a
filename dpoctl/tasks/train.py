"""`dpoctl sft` and `dpoctl dpo`: build the parts of a training from a recipe, and run the loop."""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dpoctl import __version__, console
from dpoctl.core.guard import Guard, require_same, require_shared
from dpoctl.core.loop import Cadence, EvalSet, fit
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.core.schedule import warmup_steps
from dpoctl.core.step import LESS_MEMORY, MemoryRetry, Stepper
from dpoctl.data.prepare import PreparedData
from dpoctl.errors import LostRanksError, RunError, UsageError, writing
from dpoctl.model.compile import compile_layers
from dpoctl.model.export import export_model
from dpoctl.model.load import compute_dtype, load_policy
from dpoctl.model.memory import (
    MemoryMeter,
    is_out_of_memory,
    keep_freed_memory,
    return_freed_memory,
    set_gradient_checkpointing,
)
from dpoctl.model.sharding import Sharding
from dpoctl.recipe.advice import advise, show_warnings
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.diagnostics import Diagnostic
from dpoctl.recipe.document import Document
from dpoctl.recipe.schema import Recipe, TrainingSection
from dpoctl.recipe.secrets import without_secrets
from dpoctl.runs import checkpoint
from dpoctl.runs.best import BestEvaluation, write_best
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.environment import describe_environment
from dpoctl.runs.expected import NAME as EXPECTED
from dpoctl.runs.expected import compare, to_dicts
from dpoctl.runs.health import Expectation
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.model_card import refresh_card
from dpoctl.runs.report import NAME as REPORT
from dpoctl.runs.report import refresh_report
from dpoctl.runs.signals import terminable
from dpoctl.runs.status import Status, recorded_status
from dpoctl.runs.trackers import check_installed
from dpoctl.tasks.best_model import take_best
from dpoctl.tasks.check import facts_of
from dpoctl.tasks.estimate import MemoryEstimate
from dpoctl.tasks.extensions import ENVIRONMENT, NO_EXTENSIONS, RECORD, Extensions
from dpoctl.tasks.inspect import show_plan
from dpoctl.tasks.predicted import Comparison, begin_metering
from dpoctl.tasks.recorder import OWES_EVALUATION, Recorder
from dpoctl.tasks.reference import LiveReference, Reference, check_first_step, metrics_at_start
from dpoctl.tasks.resume import inputs_of, keep_threads, refuse_changes, refuse_other_inputs
from dpoctl.tasks.samples import Samples
from dpoctl.tasks.setup import (
    Setup,
    build_accelerator,
    quiet_libraries,
    read_data,
    refuse_too_large,
    set_rank_timeout,
)
from dpoctl.tasks.sharding import choose_sharding
from dpoctl.tasks.upload import require_login, upload

NO_ANSWER = ("Timed out", "timed out", "Timeout", "onnection closed by peer", "onnection reset by peer", "Broken pipe")
"""Parts of the messages of errors by which a rank learns that another one is gone."""
CONTINUE = "continue with --resume"
TRAIN = ""  # the name of the training set among the eval sets, whose names are never empty


@dataclass(frozen=True)
class _Job:
    """The arguments of a training, with its accelerator.

    Attributes:
        recipe: checked and complete.
        recipe_text: the text of the recipe file.
        document: the recipe's YAML, with the lines of its keys.
        accelerator: ranks, device and precision.
        extensions: the user's code.
        allow_changed: keys that may differ from the recipe that the run started with.
        resume: continue the run in the run directory.
        overwrite: delete the run in the run directory.
        memory: measures memory since before the model was loaded.
    """

    recipe: Recipe
    recipe_text: str
    document: Document | None
    accelerator: Accelerator
    extensions: Extensions
    allow_changed: Sequence[str]
    resume: bool
    overwrite: bool
    memory: MemoryMeter


def run(
    recipe: Recipe,
    *,
    recipe_text: str,
    document: Document | None = None,
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    json_output: bool = False,
    processes: int = 1,
    extensions: Extensions = NO_EXTENSIONS,
) -> dict[str, Any]:
    """Train a recipe; every rank calls this.

    Args:
        recipe: checked and complete.
        recipe_text: the text of the recipe file, kept in the run directory.
        document: the recipe's YAML, for the lines in the advice.
        resume: continue from the newest good checkpoint in the run directory.
        allow_changed: keys that may differ from the recipe that the run started with.
        overwrite: delete an earlier run in the directory.
        dry_run: show the plan, and train nothing.
        verbose: with `dry_run`, show the recipe with every default.
        json_output: print one JSON object at the end.
        processes: with `dry_run`, their number.
        extensions: the user's code.

    Returns:
        The run directory, the number of steps done, and the last value of every metric; empty after a dry run.
    """
    began = time.monotonic()
    quiet_libraries()
    if dry_run:
        show_plan(recipe, document=document, json_output=json_output, verbose=verbose, processes=processes)
        return {}
    check_installed(recipe.training.report_to)
    require_login(recipe.training)
    resume = resume or (recipe.training.resume == "auto" and not overwrite)
    accelerator = build_accelerator(recipe)
    memory = _prepare(recipe, accelerator, is_known=extensions.model_init is None)
    output = Path(recipe.training.output_dir)
    with terminable(), ExitStack() as stack, writing(output, CONTINUE), explained(accelerator):
        job = _Job(recipe, recipe_text, document, accelerator, extensions, allow_changed, resume, overwrite, memory)
        # Before an earlier run in it is deleted.
        require_shared(accelerator, RunDirectory(recipe.training.output_dir).path)
        directory, status = _open_directory(job, stack)
        tokenizer, data = read_data(recipe, accelerator, spare=directory.cache)
        _refuse_different_ranks(recipe, data, accelerator)
        if accelerator.is_main_process and not directory.has_begun():
            _write_data_report(directory, data)
        summary = _train(job, directory, status, tokenizer, data)
        if accelerator.is_main_process:
            summary |= _finish(directory, recipe)
    if json_output:
        console.emit(json.dumps(summary))
    else:
        _say_done(directory.path, recipe, has_evals=bool(data.evals), seconds=time.monotonic() - began)
    return summary


def _prepare(recipe: Recipe, accelerator: Accelerator, *, is_known: bool) -> MemoryMeter:
    """Refuse what cannot run here, before data are prepared, and begin to measure memory."""
    if accelerator.device.type == "cpu":
        _prepare_cpu(recipe, accelerator.device)
    if is_known:
        refuse_too_large(recipe, accelerator)
    return begin_metering(recipe, accelerator.device)


def _begin_steps(recipe: Recipe, accelerator: Accelerator) -> None:
    """Prepare for steps, in which ranks wait for each other, and in which memory is needed anew."""
    set_rank_timeout(recipe.training.ddp_timeout)
    if accelerator.device.type == "cpu":
        return_freed_memory()


def _prepare_cpu(recipe: Recipe, cpu: torch.device) -> None:
    """Keep memory for later steps, and refuse float16, where layers would compute in float32, or mix both and fail.

    Raises:
        UsageError: the recipe asks for it.
    """
    if compute_dtype(recipe, cpu) == torch.float16:
        raise UsageError(
            "model.dtype: float16 trains on GPUs only, and this machine has none",
            hint="set model.dtype: bfloat16, or leave it out, which is float32 on a CPU",
        )
    keep_freed_memory()


def _finish(directory: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Compare the run with what its recipe expects, write its report, and upload it; return the comparison."""
    found = compare(recipe.expected, MetricsFile(directory.metrics).rows())
    for one in found:
        (console.say if one.is_met else console.warn)(str(one))
    if found:
        directory.write_json(EXPECTED, to_dicts(found))
    refresh_report(directory.path)
    refresh_card(directory.path)
    upload(directory.path, recipe.training)
    return {"expected": to_dicts(found)} if found else {}


def _say_done(run: Path, recipe: Recipe, *, has_evals: bool, seconds: float) -> None:
    """Say where the results are, and what to type next."""
    console.say(f"done: {run}, in {console.duration(seconds)}; report: {run / REPORT}")
    measure = f"dpoctl eval {quote(str(run))}" if has_evals else f"dpoctl eval {quote(str(run))} --data SOURCE"
    compare = " --reference" if recipe.method == "dpo" else ""
    console.say(f"next: {measure}\n      dpoctl chat {quote(str(run))}{compare}")


def _open_directory(job: _Job, stack: ExitStack) -> tuple[RunDirectory, Status | None]:
    """Open and lock the run directory, on the first rank, and record that the run runs.

    A run in it stays as it is until this one trains: a command that is refused changes nothing.
    """
    path, accelerator = Path(job.recipe.training.output_dir), job.accelerator
    with accelerator.main_process_first():
        if not accelerator.is_main_process:
            return RunDirectory(path), None
        opened = RunDirectory.open(path, resume=job.resume, overwrite=job.overwrite, clear=False)
        directory, has_begun = stack.enter_context(opened), opened.has_begun()
        if job.resume:
            refuse_changes(directory, job.recipe, job.allow_changed)
            job.extensions.check_resumed(directory.path)
        status = stack.enter_context(recorded_status(directory.path, has_begun=has_begun))
        if not has_begun:
            directory.clear()
            _write_first_files(job, directory)
        return directory, status


def _begin(
    job: _Job, directory: RunDirectory, status: Status | None, data: PreparedData, advice: Sequence[Diagnostic]
) -> None:
    """Write what a run writes before its first step, on the first rank: nothing can be refused any more."""
    if status is None:
        return
    status.train()
    if job.overwrite:
        directory.clear()
    _write_first_files(job, directory)
    _write_data_report(directory, data)
    directory.write_json("advice.json", [finding.to_dict() for finding in advice])


def _write_first_files(job: _Job, directory: RunDirectory) -> None:
    """Write the recipe and the environment."""
    directory.write_text(directory.resolved_recipe.name, resolved_yaml(job.recipe))
    directory.write_text("recipe.yaml", without_secrets(job.recipe_text))
    environment = describe_environment(world_size=job.accelerator.num_processes)
    directory.write_json(ENVIRONMENT, environment | {RECORD: job.extensions.names()})


def _refuse_different_ranks(recipe: Recipe, data: PreparedData, accelerator: Accelerator) -> None:
    """Check that all ranks have the same recipe, version and data."""
    require_same(accelerator, "recipe or dpoctl version", zlib.crc32((resolved_yaml(recipe) + __version__).encode()))
    require_same(accelerator, "training data", zlib.crc32(data.train.key.encode()))


def _write_data_report(directory: RunDirectory, data: PreparedData) -> None:
    # With the detected formats, so that reading the recipe again gives the same rows.
    directory.write_text(directory.resolved_recipe.name, resolved_yaml(data.recipe))
    directory.write_json("data_report.json", data.report)
    data.write_rejects(directory.rejects)


def _train(
    job: _Job,
    directory: RunDirectory,
    status: Status | None,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> dict[str, Any]:
    """Run the training, from loaded data to exported model, and return its summary."""
    recipe, accelerator, extensions = job.recipe, job.accelerator, job.extensions
    sharding = choose_sharding(recipe, accelerator, tokenizer, data.train, is_known=extensions.model_init is None)
    newest = _newest_checkpoint(directory, accelerator, sharding) if job.resume else None
    setup, live, plan, estimate = _set_up(job, tokenizer, data, newest, sharding)
    inputs = _check_inputs(job, directory, setup, data.train.key, newest)
    advice = _announce(job, setup, plan, estimate, data)
    policy, readers = setup.policy, _readers(setup, live, data, plan, directory.cache)
    _begin(job, directory, status, data, advice)
    set_gradient_checkpointing(policy.causal, estimate.every)
    scorer, optimizer, clip = setup.prepare()
    objective = setup.objective(scorer, live)
    if newest is None and setup.starts_at_reference:
        check_first_step(objective, plan, readers[TRAIN], setup.task.at_init, policy.dtype)
    evals = _evals(setup, objective, data, plan, readers, is_new=newest is None)
    start, owed = newest.step if newest else -1, newest is not None and bool(newest.extra.get(OWES_EVALUATION))
    samples = Samples(setup, directory.path, data.evals, start)
    # Each rank draws its own dropout; everything above has its own generators.
    torch.manual_seed(recipe.training.seed + accelerator.process_index)

    stepper = Stepper(
        objective,
        optimizer,
        plan,
        readers[TRAIN],
        Guard(accelerator, recipe.training.on_nonfinite),
        learning_rate=extensions.rates(recipe.training, plan.num_steps),
        max_grad_norm=recipe.training.max_grad_norm,
        retry=_memory_retry(recipe, accelerator, newest),
        clip=clip,
    )
    _begin_steps(recipe, accelerator)
    with Recorder(
        setup,
        directory,
        stepper,
        samples=samples,
        callbacks=extensions.callbacks,
        resumed=newest,
        inputs=inputs,
        expected=_expectation(setup, plan),
        comparison=Comparison.of(directory, estimate, plan, accelerator, job.memory, policy.dtype),
    ) as recorder:
        done = fit(stepper, recorder, _cadence(recipe.training), evals, max(start, 0), owes_evaluation=owed)
    if recorder.best is not None:
        take_best(setup, directory.checkpoints, recorder.best, done, plan.num_steps)
    _write_model(setup, directory, inputs, recorder.best)
    return {"output_dir": str(directory.path), "steps": done, **recorder.summary()}


def _evals(
    setup: Setup,
    objective: Objective,
    data: PreparedData,
    plan: Plan,
    readers: Mapping[str, Reader],
    *,
    is_new: bool,
) -> dict[str, EvalSet]:
    """Return the evaluation sets, and their metrics before the first step where the policy is still its reference."""
    dtype, at_init = setup.policy.dtype, setup.task.at_init
    is_known = is_new and setup.recipe.training.eval_on_start and setup.starts_at_reference
    is_known = is_known and setup.extensions.extra_metrics is None
    evals = {}
    for name, store in data.evals.items():
        reader, lengths = readers[name], Lengths.of(store)
        one_pass = plan.one_pass(lengths)
        at_start = metrics_at_start(objective, one_pass, reader, name, at_init, dtype) if is_known else None
        evals[name] = EvalSet(reader, lengths, at_start)
    return evals


def _newest_checkpoint(
    directory: RunDirectory, accelerator: Accelerator, sharding: Sharding | None
) -> Checkpoint | None:
    """Return this rank's part of the newest good checkpoint, which the first rank chooses."""
    found = [checkpoint.newest(directory.checkpoints)] if accelerator.is_main_process else [None]
    (path,) = broadcast_object_list(found)
    shards = 1 if sharding is None else sharding.shards
    return None if path is None else checkpoint.load(path, accelerator.process_index, shards)


def _set_up(
    job: _Job,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    newest: Checkpoint | None,
    sharding: Sharding | None,
) -> tuple[Setup, LiveReference | None, Plan, MemoryEstimate]:
    """Load the models, and plan the run.

    Returns:
        The setup of the policy, a reference that runs beside it, the plan and the estimate: the same on all ranks.
    """
    recipe, lengths = job.recipe, Lengths.of(data.train)
    if newest is not None:
        keep_threads(newest)
    with console.WorkProgress("loading the model"):
        policy = load_policy(
            recipe,
            tokenizer,
            job.accelerator.device,
            model_init=job.extensions.model_init,
            lazy=sharding is not None,
        )
    job.memory.reset_peak()
    setup = Setup.of(recipe, job.accelerator, tokenizer, policy, job.extensions, sharding)
    # Before the token budget, which is what its memory leaves.
    is_live = setup.task.needs_reference and recipe.dpo.reference.is_live
    live = Reference(setup).live() if is_live else None
    estimate = setup.estimate(data.train)
    budget = estimate.budget
    if newest and recipe.training.max_tokens_per_device == "auto":
        # The same micro-batches give the same bits.
        budget = newest.extra["max_tokens"]
    plan = setup.plan(lengths, budget)
    if recipe.training.torch_compile:
        compile_layers(policy.causal)
    return setup, live, plan, estimate


def _write_model(setup: Setup, directory: RunDirectory, inputs: Mapping[str, Any], best: BestEvaluation | None) -> None:
    """Write the trained model into the run directory, and which step it is of; all ranks call this."""
    base = inputs["weights"] if setup.policy.kind == "lora" else None
    with console.WorkProgress("writing the model") if setup.accelerator.is_main_process else nullcontext():
        export_model(
            setup.policy,
            directory.path,
            setup.tokenizer,
            sharding=setup.sharding,
            writes=setup.accelerator.is_main_process,
            base_weights=base,
        )
    if setup.accelerator.is_main_process:
        write_best(directory.path, best)
    setup.accelerator.wait_for_everyone()


def _check_inputs(
    job: _Job, directory: RunDirectory, setup: Setup, data_key: str, newest: Checkpoint | None
) -> Mapping[str, Any]:
    """Return what the run depends on, the same on all ranks, once it is what a run that is resumed depended on."""
    inputs: dict[str, Any] = {}
    if job.accelerator.is_main_process or setup.sharding is not None:
        inputs = inputs_of(setup, data_key)
    if setup.sharding is not None:
        # Parts of different models would be mixed without a word.
        own = json.dumps({name: inputs.get(name) for name in ("model", "weights", "adapter", "reference")})
        require_same(job.accelerator, "model", zlib.crc32(own.encode()))
    (inputs,) = broadcast_object_list([inputs])
    if newest is not None:
        refuse_other_inputs(directory, job.recipe, newest, inputs, job.allow_changed)
    return dict(inputs)


def _expectation(setup: Setup, plan: Plan) -> Expectation:
    warmup = warmup_steps(setup.recipe.training, plan.num_steps)
    at_init = setup.task.at_init if setup.starts_at_reference else None
    return Expectation(plan.num_steps, warmup, at_init, plan.global_batch_size)


def _memory_retry(recipe: Recipe, accelerator: Accelerator, newest: Checkpoint | None) -> MemoryRetry:
    is_open = recipe.training.max_tokens_per_device == "auto" and accelerator.num_processes == 1
    return MemoryRetry(is_open, used=newest is not None and bool(newest.extra.get("relieved")))


def _cadence(training: TrainingSection) -> Cadence:
    return Cadence(training.logging_steps, training.eval_steps, training.save_steps, training.eval_on_start)


def _readers(
    setup: Setup, live: LiveReference | None, data: PreparedData, plan: Plan, spare: Path
) -> Mapping[str, Reader]:
    """Return a reader for each set; it has the numbers of the reference, unless that runs beside the policy."""
    stores = {TRAIN: data.train} | dict(data.evals)
    readers = {name: setup.reader(store, name) for name, store in stores.items()}
    if live is not None or not setup.task.needs_reference:
        return readers
    reference = Reference(setup, spare)
    # Of the training data, the records that the run will use, in its order. This pass keeps no graph, so more fit; a
    # CPU gets no faster by that.
    wanted, budget = {TRAIN: plan.records()}, plan.max_tokens * (4 if setup.accelerator.device.type == "cuda" else 1)
    return {name: reference.read_into(reader, budget, wanted.get(name)) for name, reader in readers.items()}


def _announce(job: _Job, setup: Setup, plan: Plan, estimate: MemoryEstimate, data: PreparedData) -> list[Diagnostic]:
    """Print the model, the layout, the plan and the advice; return the advice, on the first rank."""
    policy = setup.policy
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    dtype, device = str(policy.dtype).removeprefix("torch."), setup.accelerator.device.type
    words = {0: "", 1: ", all layers recomputed in backward"}
    recompute = words.get(estimate.every, f", one layer in {estimate.every} recomputed in backward")
    console.say(
        f"model: {type(policy.causal).__name__}, {total / 1e6:,.1f} M parameters, "
        f"{'all' if trained == total else f'{trained / 1e6:,.2f} M'} trained ({policy.kind}), "
        f"{dtype} on {device}{recompute}"
    )
    each, shards = setup.state_bytes, 1 if setup.sharding is None else setup.sharding.shards
    shared = f", divided over {shards} processes" if shards > 1 else ""
    console.say(
        f"memory: {sum(each)} bytes per trained parameter (weights {each[0]}, gradients {each[1]}, "
        f"optimizer state {each[2]}, copies in another precision {each[3]}), {trained * sum(each) / 1e9:.2f} GB{shared}"
    )
    console.say(f"batch layout: {setup.probe.layout}; {setup.probe.reason}")
    batch = min(plan.global_batch_size, len(plan.lengths))
    console.say(
        f"plan: {len(plan.lengths):,} rows, {plan.num_steps:,} steps of {batch} rows, "
        f"{plan.world_size} {'process' if plan.world_size == 1 else 'processes'}, "
        f"at most {plan.max_tokens:,} tokens in a micro-batch"
    )
    if not job.accelerator.is_main_process:
        return []
    findings = advise(job.recipe, job.document, facts_of(job.recipe, setup.tokenizer, data, policy))
    show_warnings(findings)
    return findings


@contextmanager
def explained(accelerator: Accelerator) -> Iterator[None]:
    """Turn an error about memory or about lost ranks into one line that says what to do.

    Raises:
        RunError: memory ran out.
        LostRanksError: the other ranks do not answer.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise RunError("out of memory", hint=LESS_MEMORY) from error
        if accelerator.num_processes > 1 and _is_silence(error):
            raise LostRanksError(
                f"rank {accelerator.process_index} got no answer from the other ranks: {_first_line(error)}",
                hint="see their error messages, then continue with --resume",
            ) from error
        raise


def _is_silence(error: BaseException) -> bool:
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError) or any(
        words in str(error) for words in NO_ANSWER
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
