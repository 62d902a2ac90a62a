"""Real transcripts and a real tokenizer: every way from SFT to DPO starts where it should, learns, and exports."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_runs import metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpoctl.core.step import Stepper
from dpoctl.data import convert
from dpoctl.model.attention import use_attention
from dpoctl.model.quantize import prepare_quantised_layers
from dpoctl.recipe.data_section import Source
from dpoctl.tasks import train as task

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
Run = Callable[..., dict[str, Any]]
ROUTES = {
    "full": ("sft", {}),
    "lora": ("sft", {"lora": {"r": 8}}),
    "4-bit lora": ("sft", {"lora": {"r": 8}, "quantization": {"load_in_4bit": True}}),
    "new over adapter": ("sft-lora", {"lora": {"r": 4, "lora_alpha": 4}}),
    "continue adapter": ("sft-lora", {"lora": {"start": "continue"}}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short pairs of the transcripts, as `convert-data` writes them."""
    folder = tmp_path_factory.mktemp("hh")
    convert.run(convert.Conversion(Source(path=str(SHARED / "hh-harmless.jsonl.gz")), str(folder / "all.jsonl")))
    short = [line for line in (folder / "all.jsonl").read_text().splitlines() if len(line) < 700]
    (folder / "pairs.jsonl").write_text("\n".join(short[:12]))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama over the real tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "llama-tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def starts(base: Path, pairs: Path, train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT model, and an SFT adapter over it."""
    folder = tmp_path_factory.mktemp("starts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPOCTL_CACHE", str(folder / "cache"))
        train(recipe("sft", base, pairs, folder / "sft"))
        train(recipe("sft", folder / "sft", pairs, folder / "sft-lora"), {"lora": {"r": 8}})
    return folder


def recipe(method: str, model: Path, pairs: Path, out: Path) -> dict[str, Any]:
    return {
        "method": method,
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [str(pairs)], "max_length": 512},
        "training": {
            "output_dir": str(out), "global_batch_size": 12, "max_steps": 10, "learning_rate": 3e-3,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "seed": 0,
        },
    }  # fmt: skip


def logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("route", ROUTES)
def test_from_sft_to_dpo(
    route: str, base: Path, pairs: Path, starts: Path, tmp_path: Path, train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, changes = ROUTES[route]
    ids = AutoTokenizer.from_pretrained(base)(pairs.read_text()[:600], return_tensors="pt")["input_ids"]
    trained = []
    fit = task.fit

    def then_look(stepper: Stepper, *rest: Any, **options: Any) -> None:
        fit(stepper, *rest, **options)
        causal: Any = stepper.objective.scorer.causal.eval()
        with use_attention(causal, "sdpa"):
            trained.append(logps(causal, ids))

    monkeypatch.setattr(task, "fit", then_look)
    train(recipe("dpo", starts / start, pairs, tmp_path / "dpo"), changes)

    losses = [row["loss"] for row in metrics_of(tmp_path / "dpo") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics_of(tmp_path / "dpo")[0]["rewards/margins"]) < 1e-4
    assert losses[-1] < 0.9 * losses[0]

    if route == "full":
        exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo", dtype=torch.float32)
    elif route != "4-bit lora":
        exported = AutoModelForCausalLM.from_pretrained(starts / "sft", dtype=torch.float32)
        exported = PeftModel.from_pretrained(exported, tmp_path / "dpo")
    else:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        exported = AutoModelForCausalLM.from_pretrained(
            starts / "sft", dtype=torch.float32, quantization_config=quantization
        )
        exported = PeftModel.from_pretrained(exported, tmp_path / "dpo")
        # On some CPUs bitsandbytes packs 4-bit weights anew, in bfloat16, when a model is put into eval mode.
        prepare_quantised_layers(exported)
    torch.testing.assert_close(logps(exported.eval(), ids), trained[0], rtol=0, atol=1e-4)
