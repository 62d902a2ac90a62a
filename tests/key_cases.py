"""What the run of a tiny recipe leaves behind, and for each key of the recipe a change that must show in it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tiny_runs import metrics_of
from tiny_world import HUB_ID


@dataclass
class Outcome:
    """What a run left behind, and what it asked of the libraries."""

    folder: Path
    refused: str | None = None
    asked: dict[str, list[Any]] = field(default_factory=dict)
    forwards: Counter[str] = field(default_factory=Counter)
    references: int = 0

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in metrics_of(self.folder)
        ]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.curve if "loss" in row]

    @property
    def evaluations(self) -> list[int]:
        return [row["step"] for row in self.curve if "eval_loss" in row]

    @property
    def weights(self) -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(self.folder.glob("*.safetensors"))]

    @property
    def samples(self) -> list[str]:
        return [file.read_text() for file in sorted(self.folder.glob("samples/*.jsonl"))]

    @property
    def best(self) -> tuple[str, int, float]:
        """The metric of the model that was exported, its step and its value."""
        found = json.loads((self.folder / "best.json").read_text())
        return found["metric"], found["step"], found["value"]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    @property
    def expected(self) -> list[dict[str, Any]]:
        """What became of the metrics that the recipe expects."""
        found: list[dict[str, Any]] = json.loads((self.folder / "expected.json").read_text())
        return found

    @property
    def adapter(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return settings

    @property
    def resolved(self) -> dict[str, Any]:
        recipe: dict[str, Any] = yaml.safe_load((self.folder / "recipe.resolved.yaml").read_text())
        return recipe

    @property
    def account(self) -> dict[str, Any]:
        """What became of the training rows."""
        report: dict[str, Any] = json.loads((self.folder / "data_report.json").read_text())["train"]
        return report

    @property
    def eval_account(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "data_report.json").read_text())["evals"]["eval"]
        return report


@dataclass(frozen=True)
class Case:
    """A changed value, what must differ, and the changes under which the key has a meaning."""

    value: Any
    sees: str | Callable[[Outcome], Any] = "curve"
    given: dict[str, Any] = field(default_factory=dict)


LORA = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, "training.learning_rate": 0.1}
FOUR_BITS = LORA | {"quantization.load_in_4bit": True, "model.dtype": "float32"}
SCRATCH = {
    "model.model_name_or_path": None,
    "model.from_scratch": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "tokenizer": {"vocab_size": 270},
    },
}
EXPERTS = {
    "method": "sft",
    "data.train": ["{turns.jsonl}"],
    "model.model_name_or_path": None,
    "model.from_scratch": {
        "config": SCRATCH["model.from_scratch"]["config"]
        | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        "tokenizer": {"vocab_size": 270},
    },
}
HUB = {"path": "some/pairs", "split": "a"}
SAVING = {"training.save_steps": 1}
# The loss falls at every step, and the policy is never as far from its reference as at the end.
KEEPING = {
    "training.num_train_epochs": 2,
    "training.eval_steps": 1,
    "training.keep_best": {"metric": "eval_loss", "mode": "max"},
}
SHORT = {"data.max_length": 60, "data.overlong": "truncate"}
WANDB = {"training.report_to": ["wandb"]}
SAMPLES = {"eval.samples": {"max_new_tokens": 24, "temperature": 1.5}}
JUDGED = SAMPLES | {
    "eval.judge": {"categories": {"any": [*"abcdefghijklmnopqrstuvwxyz0123456789"], "no": ["no"]}, "target": "any"}
}

# `{name}` in a text is a path of the world that the tests stand in.
CASES: dict[str, Case] = {
    "version": Case(2, "refused"),
    "method": Case("sft", "refused"),
    "model.model_name_or_path": Case("{other}"),
    "model.revision": Case("v2", given={"model.model_name_or_path": HUB_ID}),
    "model.from_scratch.config": Case({"intermediate_size": 64}, "weights", SCRATCH),
    "model.from_scratch.tokenizer.vocab_size": Case(290, "weights", SCRATCH),
    "model.dtype": Case("bfloat16", given={"model.dtype": "float32"}),
    "model.attn_implementation": Case("eager", lambda o: o.asked["model"][0]["attn_implementation"]),
    "model.chat_template": Case("zephyr"),
    "model.trust_remote_code": Case(True, lambda o: [call["trust_remote_code"] for call in o.asked["model"]]),
    "model.disable_dropout": Case(False, given={"model.model_name_or_path": "{dropout}"}),
    "quantization.load_in_4bit": Case(True, given=LORA),
    "quantization.load_in_8bit": Case(True, given=LORA),
    "quantization.bnb_4bit_quant_type": Case("fp4", given=FOUR_BITS),
    "quantization.bnb_4bit_use_double_quant": Case(False, given=FOUR_BITS),
    "quantization.bnb_4bit_compute_dtype": Case("bfloat16", given=FOUR_BITS),
    "lora.start": Case(
        "continue", lambda o: o.adapter["r"], {"model.model_name_or_path": "{adapter}", "lora": {"start": "new"}}
    ),
    "lora.r": Case(4, lambda o: o.adapter["r"], LORA),
    "lora.lora_alpha": Case(8, given=LORA),
    "lora.lora_dropout": Case(0.5, given=LORA | {"model.disable_dropout": False}),
    "lora.target_modules": Case(["q_proj", "v_proj"], lambda o: sorted(o.adapter["target_modules"]), LORA),
    "lora.modules_to_save": Case(["lm_head"], given=LORA),
    "lora.use_rslora": Case(True, given=LORA),
    "lora.use_dora": Case(True, given=LORA),
    "lora.init_lora_weights": Case("pissa", given=LORA),
    "lora.rank_pattern": Case({"layers.0.*": 1}, lambda o: o.adapter["rank_pattern"], LORA),
    "lora.alpha_pattern": Case({"layers.0.*": 1}, given=LORA),
    "lora.layers_to_transform": Case([0], given=LORA),
    "lora.loraplus_lr_ratio": Case(16, "weights", LORA),
    "data.eval_size": Case(3, lambda o: o.account["held_out"], {"data.eval": None, "data.eval_size": 1}),
    "data.max_length": Case(60, lambda o: o.account["rejected"]),
    "data.max_prompt_length": Case(30, lambda o: o.account["rejected"]),
    "data.overlong": Case("truncate", lambda o: o.account["answers_truncated"], {"data.max_length": 60}),
    "data.prompt_truncation": Case("keep_start", given=SHORT),
    "data.duplicates": Case("drop", lambda o: o.account["used"], {"data.train": ["{twice.jsonl}"]}),
    "data.chat_template_kwargs": Case({"greeting": "hello"}, given={"model.model_name_or_path": "{greeting}"}),
    "sft.loss_on": Case("last", given={"method": "sft", "data.train": ["{turns.jsonl}"]}),
    "dpo.loss_on": Case("assistant", given={"data.train": ["{sides.jsonl}"]}),
    "sft.train_on_think": Case("none", given={"method": "sft", "data.train": ["{thinking.jsonl}"]}),
    "dpo.train_on_think": Case("none", given={"data.train": ["{thinking.jsonl}"]}),
    "sft.average": Case("responses", given={"method": "sft", "data.train": ["{turns.jsonl}"]}),
    "sft.router_aux_loss_coef": Case(0.5, "weights", EXPERTS),
    "sft.neftune_noise_alpha": Case(50.0, given={"method": "sft", "data.train": ["{turns.jsonl}"]}),
    "dpo.loss": Case([{"type": "sigmoid"}, {"type": "sft", "weight": 0.5}]),
    "dpo.reference.sync_steps": Case(1, given={"training.num_train_epochs": 2}),
    "dpo.reference.sync_alpha": Case(0.3, given={"training.num_train_epochs": 2, "dpo.reference.sync_steps": 1}),
    "dpo.reference.mode": Case("live", "references"),
    "dpo.reference.path": Case("{other}"),
    "eval.samples.num": Case(2, "samples", SAMPLES),
    "eval.samples.prompts": Case(["hello?"], "samples", SAMPLES),
    "eval.samples.max_new_tokens": Case(2, "samples", SAMPLES),
    "eval.samples.temperature": Case(0.5, "samples", SAMPLES),
    "eval.samples.top_p": Case(0.1, "samples", SAMPLES),
    "eval.samples.seed": Case(1, "samples", SAMPLES),
    "eval.samples.per_prompt": Case(2, "samples", SAMPLES),
    "eval.samples.refusals": Case(["no"], lambda o: o.resolved["eval"]["samples"]["refusals"], SAMPLES),
    "eval.judge.type": Case("rubric", "refused", JUDGED),
    "eval.judge.categories": Case({"any": ["never"]}, given=JUDGED),
    "eval.judge.target": Case("no", given=JUDGED),
    "training.output_dir": Case("{tiny}-elsewhere", lambda o: str(o.folder) if "model.safetensors" in o.files else ""),
    "training.global_batch_size": Case(2, "steps"),
    "training.max_tokens_per_device": Case(60, lambda o: o.forwards["scorer"]),
    "training.num_train_epochs": Case(2.0, "steps"),
    "training.max_steps": Case(1, "steps"),
    "training.learning_rate": Case(1e-4, "weights"),
    "training.lr_scheduler_type": Case(
        "linear", "weights", {"training.global_batch_size": 2, "training.warmup_steps": 0}
    ),
    "training.lr_scheduler_kwargs": Case(
        {"num_cycles": 1.0}, "weights", {"training.global_batch_size": 2, "training.warmup_steps": 0}
    ),
    "training.warmup_from_zero": Case(True, "weights"),
    "training.warmup_ratio": Case(1.0, "weights"),
    "training.warmup_steps": Case(2, "weights"),
    "training.weight_decay": Case(0.5, "weights"),
    "training.adam_beta1": Case(0.5, "weights"),
    "training.adam_beta2": Case(0.5, "weights"),
    "training.adam_epsilon": Case(0.1, "weights"),
    "training.max_grad_norm": Case(0.01, "weights", {"training.adam_epsilon": 0.1}),
    "training.optim": Case("rmsprop", "weights"),
    "training.optim_args": Case({"momentum": 0.5}, "weights", {"training.optim": "muon"}),
    "training.param_dtype": Case("bfloat16", "weights", {"model.dtype": "bfloat16"}),
    "training.trainable": Case([r"layers\.0\."], "weights"),
    "training.gradient_checkpointing": Case(
        True, lambda o: o.forwards["mlp"], {"training.gradient_checkpointing": False}
    ),
    "training.sharding": Case("full", lambda o: o.asked["sharding"]),
    "training.replicas": Case(2, lambda o: o.asked["sharding"], {"training.sharding": "full"}),
    "training.cpu_offload": Case(True, lambda o: o.asked["sharding"], {"training.sharding": "full"}),
    "training.torch_compile": Case(True, lambda o: "compile" in o.asked),
    "training.logging_steps": Case(2, "steps"),
    "training.eval_on_start": Case(False, "evaluations"),
    "training.eval_steps": Case(1, "evaluations"),
    "training.save_steps": Case(1, "checkpoints"),
    "training.save_total_limit": Case(3, "checkpoints", SAVING | {"training.global_batch_size": 2}),
    "training.keep_best.metric": Case("eval_rewards/margins", "best", KEEPING),
    "training.keep_best.mode": Case("min", "best", KEEPING),
    "training.early_stopping.patience": Case(1, "steps", KEEPING | {"training.early_stopping": {"patience": 9}}),
    "training.early_stopping.min_delta": Case(1e3, "steps", KEEPING | {"training.early_stopping": {"patience": 1}}),
    "training.resume": Case("never", "refused", {"training.resume": "auto", "training.output_dir": "{again}"}),
    "training.on_nonfinite": Case("stop", "refused", {"training.on_nonfinite": "skip", "training.learning_rate": 1e30}),
    "training.ddp_timeout": Case(60, lambda o: o.asked["timeout"][0]["arguments"]),
    "training.report_to": Case(["tensorboard"], "files"),
    "training.run_name": Case("mine", lambda o: o.asked["wandb"][0]["arguments"][0].run_name, WANDB),
    "training.hub_model_id": Case("me/model", lambda o: [call["repo_id"] for call in o.asked.get("upload", [])]),
    "training.hub_private_repo": Case(
        False, lambda o: o.asked["repository"][0]["private"], {"training.hub_model_id": "me/model"}
    ),
    "training.seed": Case(2, "weights"),
    "expected": Case({"eval_loss": [0.0, 9.0]}, "expected", {"expected": {"eval_loss": [8.0, 9.0]}}),
}
"""Every leaf key of the recipe, but for the keys of sources."""

RATED = {"path": "{rated.jsonl}"}
LONG = {"path": "{pairs.jsonl}", "max_length": 60}
SOURCE_CASES: dict[str, tuple[Any, dict[str, Any], Callable[[dict[str, Any], Outcome], Any]]] = {
    "path": ("{others.jsonl}", {}, lambda account, _: account["tokens"]),
    "name": ("en", HUB, lambda _, o: [call["arguments"] for call in o.asked["dataset"]]),
    "split": ("b", HUB, lambda _, o: [call["split"] for call in o.asked["dataset"]]),
    "revision": ("v2", HUB, lambda _, o: [call["revision"] for call in o.asked["dataset"]]),
    "data_files": (["two.jsonl"], {"path": "{folder}"}, lambda account, _: account["rows"]),
    "format": ("trl-explicit", {"path": "{ambiguous.jsonl}"}, lambda account, _: account["tokens"]),
    "weight": (2.0, {}, lambda account, _: account["records"]),
    "max_samples": (2, {}, lambda account, _: account["used"]),
    "column_map": (
        {"chosen": "best", "rejected": "chosen"},
        {"path": "{renamed.jsonl}"},
        lambda account, _: account["tokens"],
    ),
    "format_options": ({"dimension": "safer"}, {"path": "{safety.jsonl}"}, lambda account, _: account["tokens"]),
    "pairs": ("all", RATED, lambda account, _: account["pairs"]),
    "min_margin": (3.0, RATED, lambda account, _: account["rejected"]),
    "max_pairs_per_prompt": (1, RATED | {"pairs": "all"}, lambda account, _: account["pairs"]),
    "ties": ("keep", RATED, lambda account, _: account["rejected"]),
    "max_length": (60, {}, lambda account, _: account["rejected"]),
    "max_prompt_length": (30, {}, lambda account, _: account["rejected"]),
    "overlong": ("truncate", LONG, lambda account, _: account["answers_truncated"]),
    "prompt_truncation": (
        "keep_start",
        LONG | {"overlong": "truncate", "max_prompt_length": 20},
        lambda _, o: [o.curve, o.weights],
    ),
    "metrics": ("mine", {}, lambda _, o: o.resolved["data"]),
}
"""Every key of a source: a changed value, the source it is changed in, and what must differ."""


GATE = {"metric": "rewards/accuracies", "min": 0.5}
REPORT = {"loss": 0.4, "rewards/accuracies": 0.6, "rewards/accuracies_ci": [0.4, 0.8]}
GATE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "metric": (GATE, {"metric": "loss"}),
    "min": (GATE, {"min": 0.7}),
    "max": (GATE, {"max": 0.55}),
    "by": (GATE, {"by": "lower"}),
}
"""Every key of a gate: the gate, and the change after which the same result no longer passes."""

BENCHMARK_KEYS = {"task": "smoke_choice", "num_fewshot": 1, "limit": 3, "include_path": "", "chat_template": True}
"""Every key of a benchmark, and a value that changes its figures; the folder is another one in each test."""
ASKING = {"type": "pairwise", "model": "tiny"}
RATING = {"type": "rubric", "model": "tiny"}
JUDGE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "url": (ASKING, {"url": "http://127.0.0.1:9/v1", "timeout": 0.2}),
    "model": (ASKING, {"model": "other"}),
    "api_key_env": (ASKING, {"api_key_env": "OTHER_KEY"}),
    "template": (ASKING, {"template": "{template}"}),
    "lowest": (RATING, {"lowest": 0}),
    "highest": (RATING, {"highest": 5}),
    "max_new_tokens": (ASKING, {"max_new_tokens": 9}),
    "temperature": (ASKING, {"temperature": 0.5}),
    "request": (ASKING, {"request": {"reasoning_effort": "low"}}),
    "concurrency": (ASKING | {"concurrency": 1}, {"concurrency": 4}),
    "timeout": (ASKING, {"timeout": 0.01}),
    "max_requests": (ASKING, {"max_requests": 1}),
    "command": ({"type": "command", "command": ["true"]}, {"command": ["false"]}),
    "calibration": (ASKING, {"calibration": "nowhere.jsonl"}),
}
"""The keys of judges that compare, but for `type`: a judge, and a change after which it asks or answers otherwise."""
