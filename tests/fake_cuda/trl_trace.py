"""Prints a traced DPO step of dpoctl beside TRL's, of one model and the same rows: `python trl_trace.py`, as Markdown.

TRL's step is its own loss under autocast on its own padded batch, the reference's log-probabilities known from before.
Its Triton kernels cannot be traced. They make no tensor, so that for memory and products an empty function in their
place is the same; the other line is of the head that TRL has where there is no Triton.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import traces

GIB = 2**30
RECOMPUTED = ", layers recomputed"


def trl_batch(store: Any) -> dict[str, Any]:
    """Collate the records of a store as TRL does, with a reference."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [
        {
            "prompt_ids": one.shared.tolist(),
            "chosen_ids": one.suffixes[0].tolist(),
            "rejected_ids": one.suffixes[1].tolist(),
            "ref_chosen_logps": -80.0,
            "ref_rejected_logps": -80.0,
        }
        for one in store.examples
    ]
    batch: dict[str, Any] = DataCollatorForPreference(pad_token_id=0)(rows)
    return batch


def trl_model(fakes: Any, layers: int, *, recomputed: bool) -> Any:
    """Make TRL's policy: bf16, its fused head, an adapter in float32, attention by SDPA."""
    import models
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from trl.trainer.utils import add_fused_lm_head

    from dpoctl.model.traced import to_fakes

    shape = models.SHAPES["llama"] | {"num_hidden_layers": layers}
    config = AutoConfig.for_model("llama", max_position_embeddings=8192, use_cache=False, **shape)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=models.BF16, attn_implementation="sdpa")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **models.LORA))
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter.enable_input_require_grads()
    to_fakes(adapter, fakes, models.GPU)
    return adapter.train()


def trl_step(layers: int, *, triton: bool, recomputed: bool) -> dict[str, Any]:
    """Trace TRL's step."""
    import models
    import steps
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    fakes, store = models.world(), models.pairs()
    batch = trl_batch(store)
    model = trl_model(fakes, layers, recomputed=recomputed)
    tracker = knowing(batch)
    tracker.note(*model.parameters(), *model.buffers())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    with fakes, tracker, efficient_attention(), kernels() if triton else contextlib.nullcontext():
        steps.begin(optimizer)
        inputs = {name: tensor.clone().to(models.GPU) for name, tensor in batch.items()}
        tracker.restart()
        with torch.autocast("cuda", models.BF16):
            loss = DPOTrainer._compute_loss(trainer(model), model, inputs, False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    rows, width = batch["input_ids"].shape
    return {"rows": rows * width, "flops": tracker.flops, "peak_bytes": tracker.peak}


def trainer(model: Any) -> Any:
    """What TRL's loss asks of its trainer."""
    import models

    same = lambda tensor: tensor  # noqa: E731
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device=models.GPU, gather=same, gather_for_metrics=same),
        args=SimpleNamespace(gradient_checkpointing_kwargs={}),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def knowing(batch: dict[str, Any]) -> Any:
    """Return a tracker that answers what TRL asks the device for."""
    import torch
    from tracker import Tracker

    aten, scored = torch.ops.aten, batch["completion_mask"][:, 1:]
    halves = scored.chunk(2)
    counts = {tuple(scored.shape): int(scored.sum()), tuple(halves[0].shape): int(halves[0].sum())}

    class Knowing(Tracker):
        """Numbers are 1; a mask picks as many as its own have."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
            if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
                mask = args[1][0]
                places = [mask.new_zeros(counts[tuple(mask.shape)], dtype=torch.int64) for _ in mask.shape]
                args = (args[0], places)
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Knowing()


@contextlib.contextmanager
def efficient_attention() -> Iterator[None]:
    """Let attention under a mask take the kernel that it takes on a GPU; a CPU build would spell it out."""
    import torch
    from torch.nn import functional

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: float, **_: Any
    ) -> Any:
        # As ATen prepares it: numbers instead of a mask, rows of a multiple of 8, all heads alike.
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        keys = bias.shape[-1]
        bias = functional.pad(bias, (0, -keys % 8))[..., :keys] if keys % 8 else bias
        bias = bias.expand(*query.shape[:3], keys)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    before, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, attend
    yield
    functional.scaled_dot_product_attention = before


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Put empty functions in the place of TRL's Triton kernels."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: None

    changes = {
        chunked_logprob: {
            "_use_triton": lambda _: True,
            "_forward_kernel": Nothing(),
            "_backward_kernel": Nothing(),
            "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
        },
        utils: {"_use_triton": lambda _: True},
    }
    before = {module: {name: vars(module).get(name) for name in names} for module, names in changes.items()}
    for module, names in changes.items():
        vars(module).update(names)
    yield
    for module, names in before.items():
        vars(module).update(names)


def compare(layers: int) -> dict[str, dict[str, Any]]:
    """Trace steps of both programs over an adapter on a model of so many layers."""
    found = {}
    for again in (False, True):
        options = {"optimizer": True, "recomputed": int(again)}
        spec = traces.Spec("llama", "lora", {"num_hidden_layers": layers}, options)
        found[f"dpoctl{RECOMPUTED * again}"] = traces.trace(spec)
    for triton in (True, False):
        head = "head as on a GPU" if triton else "head without Triton"
        for again in (False, True):
            found[f"TRL, {head}{RECOMPUTED * again}"] = trl_step(layers, triton=triton, recomputed=again)
    return found


def main() -> None:
    """Print the table."""
    traces.load()
    print("| program | tokens with padding | TFLOP of a step | peak GiB |\n|---|--:|--:|--:|")  # noqa: T201
    for name, one in compare(layers=32).items():
        figures = f"{one['flops'] / 1e12:,.0f} | {one['peak_bytes'] / GIB:.1f}"
        print(f"| {name} | {one['rows']:,} | {figures} |")  # noqa: T201


if __name__ == "__main__":
    main()
