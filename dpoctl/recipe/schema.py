"""The recipe's schema: one frozen section per concern, every key documented by the line under it.

To add a key: add the field and its docstring to a section, and read it somewhere. The JSON schema, the
error messages and `--set` pick it up.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, Field

from dpoctl.recipe.expect import Expect, Path
from dpoctl.recipe.inert import inert_keys
from dpoctl.recipe.schema_data import DataSection
from dpoctl.recipe.section import Count, DType, Probability, Section, Share, Text
from dpoctl.recipe.values import (
    auto_or_count,
    auto_or_flag,
    exactly_one,
    hub_repository,
    lora_targets,
    name_list,
    one_or_several,
    typed_config,
)
from dpoctl.recipe.writer import write_yaml

LOSS: Path = ("dpo", "loss")


class TokenizerSpec(Section):
    """A byte-level BPE trained on the recipe's own data."""

    vocab_size: Annotated[int, Ge(260)] = Field(examples=[1024])
    """How many tokens the tokenizer has; the 256 bytes and the control tokens are among them."""


class FromScratch(Section):
    """A new model with seeded random weights."""

    config: Annotated[dict[str, Any], AfterValidator(typed_config)] = Field(
        examples=[{"model_type": "llama", "hidden_size": 64}]
    )
    """A transformers config: `model_type` and whatever that type takes."""
    tokenizer: TokenizerSpec = Field(examples=[{"vocab_size": 1024}])
    """The tokenizer to train."""


class ModelSection(Section):
    """Which model is trained, and how it is loaded."""

    model_name_or_path: Text | None = Field(default=None, examples=["mistralai/Mistral-7B-v0.1"])
    """A hub id, a folder, or an adapter of either."""
    revision: Text | None = Field(default=None, examples=["main"])
    """The branch, tag or commit of a hub id; a folder has none."""
    from_scratch: FromScratch | None = None
    """Build a new model instead of loading one."""
    dtype: DType = "auto"
    """The precision of the computation; auto is bfloat16 where the GPU has it, else float16; float32 without one."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention that transformers is asked for where the shared-prefix attention cannot serve."""
    chat_template: Text | None = Field(default=None, examples=["zephyr"])
    """Null is the tokenizer's own, of a new one chatml; else chatml, zephyr, llama3, mistral or a .jinja file."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    disable_dropout: bool = True
    """Turn every dropout off, in policy and reference."""


class QuantizationSection(Section):
    """A quantised base model, through bitsandbytes."""

    load_in_4bit: bool = False
    """Keep the frozen weights in 4 bits."""
    load_in_8bit: bool = False
    """Keep the frozen weights in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code book."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too."""
    bnb_4bit_compute_dtype: DType = "auto"
    """The precision that 4-bit weights are multiplied in; auto is the model's dtype."""


class LoraSection(Section):
    """Low-rank adapters, in peft's names. Leave the section out to train all weights."""

    start: Literal["new", "continue"] = "new"
    """Over a model that is an adapter already: `new` freezes it and stacks another, `continue` trains it further."""
    r: Count = 16
    """The rank."""
    lora_alpha: Annotated[float, Gt(0)] = 32.0
    """The scale: updates are multiplied by lora_alpha / r."""
    lora_dropout: Probability = 0.0
    """Dropout before the adapter; needs model.disable_dropout: false to have an effect."""
    target_modules: Annotated[
        Literal["all-linear"] | list[str],
        BeforeValidator(lora_targets, json_schema_input_type=Literal["all-linear"] | list[str]),
        Expect("all-linear, or a list of module names"),
    ] = "all-linear"
    """The linear layers that get an adapter."""
    modules_to_save: list[Text] | None = Field(default=None, examples=[["lm_head"]])
    """Modules that are trained whole and saved with the adapter."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""


class SftSection(Section):
    """Supervised fine-tuning."""

    loss_on: Literal["assistant", "last"] = "assistant"
    """Train on every assistant turn, or on the last one."""
    average: Literal["tokens", "responses"] = "tokens"
    """The loss is the mean over tokens; or the mean over rows of their sums, in which longer answers weigh more."""


class ReferenceSection(Section):
    """What the policy is compared with."""

    mode: Literal["auto", "cached", "live", "none"] = "auto"
    """Computed once and kept on disk (cached), at every step (live), not at all (none), or as fits (auto)."""
    path: Text | None = Field(default=None, examples=["runs/sft"])
    """Another model as the reference, instead of the policy before training."""
    sync_steps: Count | None = Field(default=None, examples=[512])
    """Move the reference towards the policy every so many optimizer steps (TR-DPO); null leaves it where it is."""
    sync_alpha: Annotated[float, Gt(0), Le(1)] = 0.6
    """How far it moves: to sync_alpha * policy + (1 - sync_alpha) * reference; of an adapter, factor by factor."""

    @property
    def is_live(self) -> bool:
        """Whether it is computed at every step, because the recipe says so or because it moves."""
        return self.mode == "live" or self.sync_steps is not None


class DpoSection(Section):
    """Preference optimisation."""

    loss: Annotated[
        dict[str, Any] | list[dict[str, Any]],
        BeforeValidator(one_or_several, json_schema_input_type=dict[str, Any] | list[dict[str, Any]]),
        Expect("a mapping such as {type: sigmoid, beta: 0.1}, or a list of them"),
    ] = Field(default={"type": "sigmoid"})
    """The loss by `type`, and the hyperparameters of that loss; or a list of losses, each with its weight in a sum."""
    loss_on: Literal["last", "assistant"] = "last"
    """Judge an answer by its last assistant turn, or by every one after the two conversations part."""
    reference: ReferenceSection = ReferenceSection()
    """The reference model."""

    @property
    def losses(self) -> list[tuple[Path, dict[str, Any]]]:
        """Each loss, and where in the recipe it stands."""
        if isinstance(self.loss, dict):
            return [(LOSS, self.loss)]
        return [((*LOSS, index), spec) for index, spec in enumerate(self.loss)]


class TrainingSection(Section):
    """The optimisation, and what is written on the way."""

    output_dir: Text = Field(examples=["runs/my-run"])
    """The run directory."""
    global_batch_size: Count = 64
    """Rows per optimizer step (pairs, for preferences), whatever the hardware."""
    max_tokens_per_device: Annotated[
        Literal["auto"] | int,
        BeforeValidator(auto_or_count, json_schema_input_type=Literal["auto"] | int),
        Expect("auto, or a whole number of at least 1"),
    ] = "auto"
    """Tokens in one micro-batch; changes speed and memory, never the maths."""
    num_train_epochs: Annotated[float, Gt(0)] = 1.0
    """Passes over the training rows."""
    max_steps: Count | None = Field(default=None, examples=[1000])
    """Optimizer steps of the run, instead of num_train_epochs."""
    learning_rate: Annotated[float, Ge(0)] = Field(examples=[5e-6])
    """The peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """The course of the learning rate after warm-up."""
    warmup_ratio: Share | None = Field(default=None, examples=[0.1])
    """The share of all steps over which the learning rate rises from 0; 0.1 when warmup_steps is not given either."""
    warmup_steps: Annotated[int, Ge(0)] | None = Field(default=None, examples=[100])
    """The same as a number of steps."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay: decoupled with Adam, part of the gradient with rmsprop; never of biases and norms."""
    adam_beta1: Probability = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Probability = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradients are clipped to this norm; null does not clip."""
    optim: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """The optimizer; the paged ones come from bitsandbytes."""
    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        BeforeValidator(auto_or_flag, json_schema_input_type=Literal["auto"] | bool),
        Expect("auto, true or false"),
    ] = "auto"
    """Recompute activations in the backward pass to save memory."""
    torch_compile: bool = False
    """Compile the model's layers: up to a minute at the start, and faster steps after it, most so for small models."""
    logging_steps: Count = 10
    """Optimizer steps between lines of metrics."""
    eval_on_start: bool = True
    """Evaluate before the first step too."""
    eval_steps: Count | None = Field(default=None, examples=[100])
    """Optimizer steps between evaluations."""
    save_steps: Count | None = Field(default=None, examples=[100])
    """Optimizer steps between checkpoints."""
    save_total_limit: Annotated[int, Ge(2)] | None = 2
    """Keep this many checkpoints, at least 2: the newest may be damaged; null keeps all."""
    resume: Literal["never", "auto"] = "never"
    """`auto` goes on with the run in output_dir if there is one, as --resume does: for schedulers that start again."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is not finite; the weights never see it, and it is counted."""
    ddp_timeout: Annotated[int, Ge(1), Le(2_592_000)] = 1800
    """Seconds that a process waits for the others before the run ends."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]],
        BeforeValidator(name_list, json_schema_input_type=str | list[str] | None),
        Expect("none, or any of tensorboard, wandb, trackio"),
    ] = Field(default=[])
    """Trackers that get the metrics too."""
    run_name: Text | None = Field(default=None, examples=["zephyr-dpo"])
    """The name of the run at wandb and trackio; tensorboard calls it by its folder."""
    hub_model_id: Annotated[
        str | None, BeforeValidator(hub_repository, json_schema_input_type=str | None), Expect("owner/name, or null")
    ] = Field(default=None, examples=["me/zephyr-dpo"])
    """The repository on the hub that the exported model is uploaded to at the end; null uploads nothing."""
    hub_private_repo: bool = True
    """Make that repository private, if it does not exist yet."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42
    """Seeds everything that is random: order of rows, splits, dropout, new weights."""


class SamplesSection(Section):
    """Texts that the policy and its reference write to the same prompts, at each evaluation and in `dpoctl eval`."""

    num: Annotated[int, Ge(0)] = 8
    """How many prompts of each eval set, its first ones; 0 is no samples."""
    prompts: Annotated[list[Text], MinLen(1)] | None = Field(default=None, examples=[["Who are you?"]])
    """What to answer, instead of prompts of the eval sets."""
    max_new_tokens: Annotated[int, Ge(1), Le(1_000_000)] = 128
    """A text that is longer is cut off."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """0 takes the most likely token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9
    """Draw from the most likely tokens that hold this much probability together."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seeds the texts, each by itself: training is the same with and without samples."""
    per_prompt: Annotated[int, Ge(1), Le(1000)] = 1
    """How many texts each of the two writes to a prompt."""


class JudgeSection(Section):
    """What samples are counted by."""

    type: Literal["keywords"] = "keywords"
    """`keywords`: a text is of the category whose words it holds, and undecided if of none or several."""
    categories: Annotated[
        dict[Text, Annotated[list[Text], MinLen(1)]], MinLen(1), Expect("a mapping of a category to a list of words")
    ] = Field(examples=[{"kind": ["accept"]}])
    """The words of each category, whole words in any case."""
    target: Text = Field(examples=["kind"])
    """The category that training is for; its share is part of the learning curves."""


class EvalSection(Section):
    """What else is looked at when a model is evaluated."""

    samples: SamplesSection | None = None
    """Samples; leave the section out for none."""
    judge: JudgeSection | None = None
    """How samples are counted; leave the section out for no judge."""


class Recipe(Section):
    """Everything that decides what a run computes."""

    version: Annotated[Literal[1], BeforeValidator(exactly_one)] = 1
    """The version of this schema."""
    method: Literal["sft", "dpo"] = Field(examples=["dpo"])
    """A guard: the other command refuses the recipe."""
    model: ModelSection = Field(examples=[{"model_name_or_path": "mistralai/Mistral-7B-v0.1"}])
    """The model."""
    quantization: QuantizationSection | None = None
    """Quantisation of the frozen weights."""
    lora: LoraSection | None = None
    """Adapters; leave it out for full fine-tuning."""
    data: DataSection = Field(examples=[{"train": ["pairs.jsonl"]}])
    """The data."""
    sft: SftSection = SftSection()
    """Keys of `dpoctl sft`."""
    dpo: DpoSection = DpoSection()
    """Keys of `dpoctl dpo`."""
    eval: EvalSection = EvalSection()
    """Samples, and what they are counted by."""
    training: TrainingSection = Field(examples=[{"output_dir": "runs/my-run", "learning_rate": 5e-6}])
    """The optimisation."""

    def to_yaml(self) -> str:
        """Write the recipe out with every default filled in; it loads back to an equal recipe."""
        resolved = self.model_dump(mode="python")
        for *above, key in inert_keys(self):
            section: Any = resolved
            for part in above:
                section = section[part] or {}
            section.pop(key, None)
        return write_yaml(resolved)
