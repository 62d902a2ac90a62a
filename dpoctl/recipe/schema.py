"""The schema of a recipe: one frozen pydantic class per section; the text under each key is its documentation.

To add a key: add a field with its text to a section, read it somewhere, and run `make docs`. Error messages and `--set`
know it then.
"""

import re
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from dpoctl.recipe.data_section import DataSection
from dpoctl.recipe.diagnostics import KeyPath
from dpoctl.recipe.eval_sections import BenchmarkSection, GateSection, benchmark_task
from dpoctl.recipe.judge_section import JudgeSection
from dpoctl.recipe.library_names import (
    InitLoraWeights,
    LrScheduler,
    ModulePattern,
    Optim,
    init_name,
    module_expression,
    optim_name,
)
from dpoctl.recipe.section import Count, Expect, NewTokens, OneOf, Probability, Range, Section, Seed, Text

DType = Literal["auto", "float32", "bfloat16", "float16"]
AttnImplementation = Literal["auto", "sdpa", "eager", "flash_attention_2"]
HUB_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
TrainOnThink = Literal["all", "nonempty", "none"]
REFUSALS = (
    *("I can't", "I cannot", "I can not", "I won't", "I will not", "I'm unable", "I am unable", "I'm not able"),
    *("I am not able", "I'm sorry", "I am sorry", "I apologize", "as an AI"),
)
"""The words of refusals, unless a recipe has its own."""
LOSS: KeyPath = ("dpo", "loss")


def exactly_one(value: Any) -> Any:
    """Accept only the integer 1: to pydantic's Literal, True and 1.0 are equal to it."""
    if type(value) is not int:
        raise ValueError("not 1")
    return value


def name_list(value: Any) -> Any:
    """Read a name as a list of one name, and `none` or null as an empty list."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


def hub_repository(value: str) -> str:
    """Accept the name of a hub repository together with its owner."""
    if not HUB_REPOSITORY.fullmatch(value):
        raise ValueError("not a repository")
    return value


def typed_config(value: dict[str, Any]) -> dict[str, Any]:
    """Accept a model config that has a `model_type`."""
    if not isinstance(value.get("model_type"), str):
        raise ValueError("no model_type")
    return value


class TokenizerSpec(Section):
    """A byte-level BPE tokenizer, trained on the data of the recipe."""

    vocab_size: Annotated[int, Ge(260), Le(10_000_000)] = Field(examples=[1024])
    """The number of tokens, including the 256 bytes and the control tokens."""


class FromScratch(Section):
    """A new model with random weights."""

    config: Annotated[
        dict[str, Any], AfterValidator(typed_config), Expect("a transformers config that has a model_type")
    ] = Field(examples=[{"model_type": "llama", "hidden_size": 64}])
    """A transformers config: `model_type`, and any parameters of that model type."""
    tokenizer: TokenizerSpec = Field(examples=[{"vocab_size": 1024}])
    """The tokenizer to train for it."""


class ModelSection(Section):
    """The model to train."""

    model_name_or_path: Text | None = Field(default=None, examples=["mistralai/Mistral-7B-v0.1"])
    """The model: a hub id, a folder, or an adapter in either."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub id."""
    from_scratch: FromScratch | None = None
    """Create a new model instead of loading one."""
    dtype: DType = "auto"
    """The precision of the computation. `auto`: bfloat16 if the GPU supports it, else float16; float32 on a CPU."""
    attn_implementation: AttnImplementation = "auto"
    """The attention of transformers to use where the shared-prefix attention of dpoctl does not work."""
    chat_template: Text | None = Field(default=None, examples=["zephyr"])
    """`chatml`, `zephyr`, `llama3`, `mistral` or a .jinja file. null: the tokenizer's own; `chatml` for a new model."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    disable_dropout: bool = True
    """Turn off all dropout, in the policy and in the reference."""


class QuantizationSection(Section):
    """Quantisation of the frozen base model, with bitsandbytes."""

    load_in_4bit: bool = False
    """Store the frozen weights in 4 bits."""
    load_in_8bit: bool = False
    """Store the frozen weights in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too."""
    bnb_4bit_compute_dtype: DType = "auto"
    """The precision of multiplications with 4-bit weights. `auto`: `model.dtype`."""


class LoraSection(Section):
    """LoRA adapters, with the names of peft. Leave the section out to train all weights."""

    start: Literal["new", "continue"] = "new"
    """For a model that is an adapter already. `new`: freeze it and add another one; `continue`: train it further."""
    r: Annotated[int, Ge(1), Le(65_536)] = 16
    """The rank."""
    lora_alpha: Annotated[float, Gt(0)] = 32.0
    """The scale: updates are multiplied by lora_alpha / r."""
    lora_dropout: Probability = 0.0
    """Dropout on the input of the adapter. It needs `model.disable_dropout: false`."""
    rank_pattern: dict[ModulePattern, Annotated[int, Ge(1), Le(65_536)]] = Field(default={}, examples=[{"o_proj": 4}])
    """Other ranks for some modules: the end of their names, or a regular expression for it."""
    alpha_pattern: dict[ModulePattern, Annotated[float, Gt(0)]] = Field(default={}, examples=[{"o_proj": 8}])
    """Other values of `lora_alpha` for some modules, in the same way."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[Text], MinLen(1)] | Annotated[str, AfterValidator(module_expression)],
        OneOf("all-linear, a list of module names, or a regular expression for whole names"),
    ] = Field(default="all-linear", examples=[["q_proj", "v_proj"]])
    """The layers that get an adapter: all linear ones but the head, those with these last names, or those whose whole
    names match a regular expression such as `.*layers.[0-3].*q_proj`."""
    layers_to_transform: Annotated[list[Annotated[int, Ge(0), Le(100_000)]], MinLen(1)] | None = Field(
        default=None, examples=[[0, 1]]
    )
    """The numbers of the decoder layers that get adapters, from 0. null: all."""
    modules_to_save: list[Text] | None = Field(default=None, examples=[["lm_head"]])
    """Modules to train in full, and to save with the adapter."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """DoRA: train the norm of each row of a weight matrix too, beside its direction."""
    init_lora_weights: Annotated[
        InitLoraWeights, BeforeValidator(init_name, json_schema_input_type=InitLoraWeights | Literal[True])
    ] = "default"
    """How adapters start, as in peft. `default` and `gaussian`: at zero. `pissa` and `olora`: with the largest singular
    values of the weights, or with their QR decomposition, which is then taken out of the frozen weights."""
    loraplus_lr_ratio: Annotated[float, Ge(1)] | None = Field(default=None, examples=[16])
    """LoRA+: the learning rate of the factor B, and of DoRA's norms, in relation to that of A. null: the same."""

    @property
    def changes_base(self) -> bool:
        """Whether adapters start with a part of the weights, which is taken out of these."""
        return self.init_lora_weights in ("pissa", "olora")

    @property
    def adapts_all(self) -> bool:
        """Whether all linear layers get an adapter, but for the head."""
        return self.target_modules == "all-linear"


class SftSection(Section):
    """Settings of `dpoctl sft`."""

    loss_on: Literal["assistant", "last"] = "assistant"
    """`assistant`: train on all assistant turns; `last`: train on the last one only."""
    train_on_think: TrainOnThink = "all"
    """The thinking blocks in the loss: `all`; `nonempty`: not the empty ones that some chat templates write; `none`."""
    average: Literal["tokens", "responses"] = "tokens"
    """`tokens`: the mean over all tokens; `responses`: the mean over rows of summed losses: long answers weigh more."""
    router_aux_loss_coef: Annotated[float, Gt(0), Le(100)] | None = Field(default=None, examples=[0.001])
    """Add the load-balancing loss of a mixture of experts, a mean over rows, times this. null: leave it out."""
    neftune_noise_alpha: Annotated[float, Gt(0), Le(1000)] | None = Field(default=None, examples=[5])
    """NEFTune: add uniform noise to the embeddings in training, as large as alpha / √(tokens of the row x width)."""


class ReferenceSection(Section):
    """The reference model, which the policy is compared with."""

    mode: Literal["auto", "cached", "live", "none"] = "auto"
    """`cached`: compute it once and keep it on disk; `live`: at every step; `none`: not at all; `auto`: choose."""
    path: Text | None = Field(default=None, examples=["runs/sft"])
    """Another model as the reference. null: the policy as it is before training."""
    sync_steps: Count | None = Field(default=None, examples=[512])
    """Move the reference towards the policy every this many steps (TR-DPO). null: never."""
    sync_alpha: Annotated[float, Gt(0), Le(1)] = 0.6
    """The size of that move: sync_alpha * policy + (1 - sync_alpha) * reference, for adapters factor by factor."""

    @property
    def is_live(self) -> bool:
        """Whether it is computed at every step, because the recipe asks for that or because the reference moves."""
        return self.mode == "live" or self.sync_steps is not None


class DpoSection(Section):
    """Settings of `dpoctl dpo`."""

    loss: Annotated[
        dict[str, Any] | Annotated[list[dict[str, Any]], MinLen(1)],
        OneOf("a mapping such as {type: sigmoid, beta: 0.1}, or a list of them"),
    ] = Field(default={"type": "sigmoid"})
    """A [loss](#losses): its `type` and its keys. Or a list of losses, which are added up, each with a `weight`."""
    loss_on: Literal["last", "assistant"] = "last"
    """`last`: the loss sees the last assistant turn only; `assistant`: all assistant turns after the shared ones."""
    train_on_think: TrainOnThink = "all"
    """`sft.train_on_think` for the turns that the loss sees."""
    reference: ReferenceSection = ReferenceSection()
    """The reference model."""

    @property
    def losses(self) -> list[tuple[KeyPath, dict[str, Any]]]:
        """Each loss, with its path in the recipe."""
        if isinstance(self.loss, dict):
            return [(LOSS, self.loss)]
        return [((*LOSS, index), spec) for index, spec in enumerate(self.loss)]


class KeepBestSection(Section):
    """The metric by which a run chooses the checkpoint that it exports."""

    metric: Text = Field(examples=["eval_rewards/accuracies"])
    """A metric of the evaluations, by its name in `metrics.jsonl`; of an eval set NAME it begins with `eval_NAME_`."""
    mode: Literal["max", "min"] = Field(examples=["max"])
    """`max`: the highest value is the best; `min`: the lowest."""


class EarlyStoppingSection(Section):
    """The end of a run whose `keep_best.metric` no longer improves."""

    patience: Count = Field(examples=[3])
    """Stop after this many evaluations in a row without an improvement."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """A change of at most this much is no improvement."""


class TrainingSection(Section):
    """The optimisation, and what a run writes."""

    output_dir: Text = Field(examples=["runs/my-run"])
    """The run directory."""
    global_batch_size: Count = 64
    """The number of rows (pairs, for preferences) per optimizer step, over all devices."""
    max_tokens_per_device: Annotated[
        Literal["auto"] | Count, OneOf("auto, or a whole number from 1 to 1,000,000,000")
    ] = "auto"
    """The maximum number of tokens in a micro-batch. It changes speed and memory, never the result."""
    num_train_epochs: Annotated[float, Gt(0), Le(100_000)] = 1.0
    """The number of passes over the training rows."""
    max_steps: Count | None = Field(default=None, examples=[1000])
    """The number of optimizer steps, instead of `num_train_epochs`."""
    learning_rate: Annotated[float, Ge(0)] = Field(examples=[5e-6])
    """The highest learning rate, reached after warm-up."""
    lr_scheduler_type: LrScheduler = "cosine"
    """The schedule of the learning rate, as in transformers. All but `constant` have a warm-up."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default={}, examples=[{"min_lr_rate": 0.1}])
    """The [arguments of the schedule](training.md#learning-rate), as in transformers."""
    warmup_ratio: Annotated[float, Ge(0), Le(1)] | None = Field(default=None, examples=[0.1])
    """The fraction of steps in which the learning rate rises from 0. null: 0.1, unless `warmup_steps` is set."""
    warmup_steps: Annotated[int, Ge(0), Le(1_000_000_000)] | None = Field(default=None, examples=[100])
    """The number of warm-up steps, instead of `warmup_ratio`."""
    warmup_from_zero: bool = False
    """Give the first step of the warm-up a learning rate of 0, as transformers does. Otherwise it is one step ahead."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay: added to the gradient for rmsprop, decoupled for all others. Biases and norms have none."""
    adam_beta1: Probability = 0.9
    """The decay of Adam's first moment; for Lion, the share of the moment in an update."""
    adam_beta2: Probability = 0.999
    """The decay of Adam's second moment; for Lion, that of its one moment."""
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    """The constant added to the denominator of the update."""
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    """Clip gradients to this norm. null: no clipping."""
    optim: Annotated[Optim, BeforeValidator(optim_name)] = "adamw"
    """The [optimizer](training.md#optimizers). The 8-bit and paged ones and Lion need bitsandbytes."""
    optim_args: dict[str, Any] = Field(default={}, examples=[{"momentum": 0.9}])
    """More arguments of the optimizer: `adafactor` and `muon` have some."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the trained weights in full fine-tuning. `bfloat16` needs half the memory for weights, gradients and
    optimizer state; updates are rounded stochastically, so that small ones are not lost."""
    trainable: Annotated[list[ModulePattern], MinLen(1)] | None = Field(default=None, examples=[["layers.3.", "norm"]])
    """Train the weights only in whose name one of these regular expressions occurs, in full fine-tuning. null: all."""
    gradient_checkpointing: Annotated[Literal["auto"] | bool, OneOf("auto, true or false")] = "auto"
    """Recompute activations in the backward pass, to save memory. `auto`: in as few layers as possible."""
    sharding: Literal["none", "full", "auto"] = "auto"
    """Divide weights, gradients and optimizer state over the processes. `auto`: if they do not fit on each of them."""
    replicas: Count = 1
    """The number of groups of processes that each hold a whole sharded model, for example one per machine."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory: slow, but needs little GPU memory."""
    torch_compile: bool = False
    """Compile the layers of the model: up to a minute at the start, then faster steps, mainly for small models."""
    logging_steps: Count = 10
    """The number of steps between lines of metrics."""
    eval_on_start: bool = True
    """Evaluate before the first step too. Of a policy that is still its reference, only the first micro-batch of each
    eval set is computed, as a check: rewards are 0, and the other metrics follow from the reference."""
    eval_steps: Count | None = Field(default=None, examples=[100])
    """The number of steps between evaluations. Required if there is eval data."""
    save_steps: Count | None = Field(default=None, examples=[100])
    """The number of steps between checkpoints. null: no checkpoints during the run."""
    save_total_limit: Annotated[int, Ge(2), Le(1_000_000)] | None = 2
    """The number of checkpoints to keep; at least 2, in case the newest is damaged. null: keep all."""
    keep_best: KeepBestSection | None = None
    """Keep the checkpoint of the best evaluation, and export it at the end. null: export the last step."""
    early_stopping: EarlyStoppingSection | None = None
    """Stop when evaluations no longer improve. null: train to the end."""
    resume: Literal["never", "auto"] = "never"
    """`auto`: continue the run in `output_dir` if there is one, like --resume; for job schedulers that restart runs."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Stop the run or skip the step if the loss or a gradient is not finite. Such a step never changes the weights."""
    ddp_timeout: Annotated[int, Ge(1), Le(2_592_000)] = 1800
    """The number of seconds that a process waits for the others before the run ends."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]],
        BeforeValidator(name_list),
        Expect("none, or any of tensorboard, wandb, trackio"),
    ] = Field(default=[])
    """The trackers that get the metrics too."""
    run_name: Text | None = Field(default=None, examples=["zephyr-dpo"])
    """The name of the run in wandb and trackio. TensorBoard uses the name of the folder."""
    hub_model_id: Annotated[str, AfterValidator(hub_repository), Expect("owner/name")] | None = Field(
        default=None, examples=["me/zephyr-dpo"]
    )
    """The hub repository to upload the model to at the end. null: no upload."""
    hub_private_repo: bool = True
    """Create that repository as a private one, if it does not exist yet."""
    seed: Seed = 42
    """The seed of everything random: order of rows, splits, dropout, new weights."""


class SamplesSection(Section):
    """Texts that policy and reference write for the same prompts, at each evaluation and in `dpoctl eval`."""

    num: Annotated[int, Ge(0), Le(100_000)] = 8
    """The number of prompts from each eval set, from its start. 0: no samples."""
    prompts: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["Who are you?"]])
    """The prompts to answer, instead of those of the eval sets."""
    max_new_tokens: NewTokens = 128
    """The maximum length of a text, in tokens."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """The sampling temperature. 0: always take the most likely token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9
    """Sample only from the most likely tokens whose probabilities add up to this."""
    seed: Seed = 0
    """The seed of the texts. Training does not depend on it."""
    per_prompt: Annotated[int, Ge(1), Le(1000)] = 1
    """The number of texts per prompt and model."""
    refusals: list[Text] = Field(default=[*REFUSALS])
    """The words that make a text a refusal, whose share `dpoctl eval` reports. They match as a judge's words do."""


class EvalSection(Section):
    """Samples and their judge, in addition to the metrics of an evaluation."""

    samples: SamplesSection | None = None
    """Texts to generate. null: none."""
    judge: JudgeSection | None = None
    """The judge of the samples. null: none."""
    benchmarks: list[Annotated[BenchmarkSection, BeforeValidator(benchmark_task)]] = Field(default=[])
    """Benchmarks to run in `dpoctl eval`, with the extra `bench`."""
    gates: list[GateSection] = Field(default=[])
    """Bounds that `dpoctl eval` and `dpoctl compare` check, for scripts."""


class Recipe(Section):
    """Everything that determines the result of a run."""

    version: Annotated[Literal[1], BeforeValidator(exactly_one)] = 1
    """The version of the recipe format."""
    method: Literal["sft", "dpo"] = Field(examples=["dpo"])
    """The command that this recipe is for. Other commands refuse it."""
    model: ModelSection = Field(examples=[{"model_name_or_path": "mistralai/Mistral-7B-v0.1"}])
    """The model to train."""
    quantization: QuantizationSection | None = None
    """Quantisation of the frozen weights. null: none."""
    lora: LoraSection | None = None
    """LoRA adapters. null: train all weights."""
    data: DataSection = Field(examples=[{"train": ["pairs.jsonl"]}])
    """The data for training and evaluation."""
    sft: SftSection = SftSection()
    """Settings of `dpoctl sft`."""
    dpo: DpoSection = DpoSection()
    """Settings of `dpoctl dpo`."""
    eval: EvalSection = EvalSection()
    """Samples and their judge."""
    training: TrainingSection = Field(examples=[{"output_dir": "runs/my-run", "learning_rate": 5e-6}])
    """The optimisation, and what a run writes."""
    expected: dict[Text, Range] = Field(default={}, examples=[{"eval_loss": [0.47, 0.54]}])
    """The metrics that the run should end with: the lowest and the highest value of each, by its name in
    `metrics.jsonl`. The end of the run says whether they are met, and so does `expected.json`."""
