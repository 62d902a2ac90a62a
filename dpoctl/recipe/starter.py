"""A first recipe for a user's model, data and GPU, with a comment on each choice."""

import re
from dataclasses import dataclass

from dpoctl.errors import UsageError
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.facts import size_in_name
from dpoctl.recipe.gpus import find_gpu

SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:g|gb|gib)?", re.IGNORECASE)
SIZE_IN_NAME = re.compile(r"[- _](\d+) *gi?b$", re.IGNORECASE)
BYTES = {"full": 16.0, "LoRA": 2.2, "QLoRA": 0.8}
"""Bytes for a parameter: weights, gradients and optimizer state in float32; bfloat16 weights; 4-bit weights, with an
embedding in bfloat16. Those of adapters are a small part of them."""
USABLE = 0.7
"""The share of a GPU's memory for these; activations get the rest."""
RATES = {("sft", "full"): "2.0e-5", ("sft", "LoRA"): "1.0e-4", ("dpo", "full"): "5.0e-7", ("dpo", "LoRA"): "5.0e-6"}


@dataclass(frozen=True)
class Wish:
    """The answers that a recipe is made from.

    Attributes:
        model: a hub id or a folder.
        data: a file, a folder, a data set of the hub, or a built-in source.
        split: of the data, where it is not `train`.
        format: that its rows were found to be in.
        method: `sft` or `dpo`.
        loss: the type of `dpo.loss` that the rows need.
        memory: gigabytes of one GPU; 0 for a CPU.
        rows: their number, where they are few.
        output: the name of the run.
    """

    model: str
    data: str
    split: str
    format: str
    method: str
    loss: str
    memory: float
    rows: int | None
    output: str


def gigabytes(given: str) -> float:
    """Read the memory of a GPU: a number of gigabytes, the name of a GPU, or `none`.

    Raises:
        UsageError: It is neither.
    """
    text = given.strip().lower()
    if text in ("none", "cpu", "0"):
        return 0.0
    if (gpu := find_gpu(text)) is not None:
        return round(gpu.memory / 1e9, 1)
    if found := SIZE.fullmatch(text) or SIZE_IN_NAME.search(text):
        return float(found[1])
    raise UsageError(f"{given!r} is no GPU that is known here", hint="give its memory in GB, such as 24, or none")


def choose_training(memory: float, parameters: float | None) -> tuple[str, str]:
    """Choose between all weights, LoRA, and LoRA over 4-bit weights.

    Args:
        memory: Gigabytes of one GPU; 0 for a CPU.
        parameters: The number of parameters; None if it is not known.

    Returns:
        `full`, `LoRA` or `QLoRA`, and the reason in words.
    """
    if parameters is None:
        return "LoRA", "the name of the model does not say its size"
    size = f"{parameters / 1e9:.3g} B parameters"
    if memory == 0:
        return ("full", f"{size}, on a CPU") if parameters < 2e8 else ("LoRA", f"{size}, on a CPU")
    for kind, each in BYTES.items():
        needed = parameters * each / 1e9
        if needed <= USABLE * memory:
            return kind, f"{size}, about {needed:.1f} of {memory:g} GB before activations"
    return "QLoRA", f"{size} do not fit into {memory:g} GB: use several GPUs, or a smaller model"


def starter_recipe(wish: Wish) -> str:
    """Write a recipe with comments."""
    kind, why = choose_training(wish.memory, size_in_name(wish.model))
    rate = RATES[wish.method, "full" if kind == "full" else "LoRA"]
    rows = "pairs" if wish.method == "dpo" else "conversations"
    device = "a CPU" if wish.memory == 0 else f"one GPU of {wish.memory:g} GB"
    split = f", split: {_text(wish.split)}" if wish.split else ""
    lines = [
        f"# {wish.method.upper()} of {wish.model} on {wish.data}, for {device}; written by `dpoctl init`.",
        f"#   dpoctl check {wish.output}.yaml",
        f"#   dpoctl {wish.method} {wish.output}.yaml --dry-run",
        f"method: {wish.method}",
        "",
        "model:",
        f"  model_name_or_path: {_text(wish.model)}",
        "  # chat_template: chatml       # for a base model, whose tokenizer has no template of its own",
        "",
        *_adapter(kind, why),
        "data:",
        "  train:",
        f"    - {{path: {_text(wish.data)}{split}}}          # rows in the format {wish.format}",
        *_held_out(wish.rows),
        "  max_length: 1024              # tokens of prompt and answer together",
        "  overlong: drop                # longer rows are counted; truncate cuts them instead",
        "",
        *_loss(wish),
        "training:",
        f"  output_dir: runs/{wish.output}",
        f"  global_batch_size: 32         # {rows} per optimizer step, whatever the hardware",
        "  num_train_epochs: 1",
        f"  learning_rate: {rate:<14}  # the usual one for {wish.method.upper()} with "
        + ("all weights" if kind == "full" else "an adapter"),
        "  lr_scheduler_type: cosine",
        "  warmup_ratio: 0.1",
        *(["  optim: paged_adamw_32bit     # its state moves to host memory when the GPU is full"] * (kind == "QLoRA")),
        "  logging_steps: 10",
        *([] if wish.rows == 1 else ["  eval_steps: 50"]),
        "  save_steps: 50",
        "  seed: 42",
    ]
    return "\n".join(lines) + "\n"


def _held_out(rows: int | None) -> list[str]:
    """Return the line of the eval set: of few rows a number, since a share of them may be none."""
    if rows == 1:
        return []
    size = "0.05" if rows is None else str(max(1, rows // 10))
    return [f"  eval_size: {size:<19}# held out; or name data of its own: eval: [heldout.jsonl]"]


def _adapter(kind: str, why: str) -> list[str]:
    if kind == "full":
        return [f"# All weights are trained: {why}.", ""]
    four = ["quantization:", "  load_in_4bit: true            # the frozen weights", ""] if kind == "QLoRA" else []
    lora = ["lora:", "  r: 16", "  lora_alpha: 32", "  target_modules: all-linear", ""]
    return [f"# {kind}: {why}.", *four, *lora]


def _loss(wish: Wish) -> list[str]:
    if wish.method == "sft":
        return []
    beta = "   # a higher beta keeps the model closer to where it starts" if wish.loss == "sigmoid" else ""
    spec = "{type: sigmoid, beta: 0.1}" if wish.loss == "sigmoid" else f"{{type: {wish.loss}}}"
    return ["dpo:", f"  loss: {spec}{beta}", ""]


def _text(value: str) -> str:
    return write_yaml(value, inline=True)
