"""Each kind of adapter is peft's: five steps, the frozen base beside it, and the merged weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import IDS, logits, plain, reference_logits
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import PreTrainedModel

from dpoctl.core.optim import build_optimizer, rate_scales
from dpoctl.errors import UsageError
from dpoctl.model.export import export_model
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe

STEPS = 5
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "mlp.*": 6}, "alpha_pattern": {"v_proj": 3}},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*layers\.0.*(q|up)_proj"},
    "lora+": {"loraplus_lr_ratio": 8.0},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, rslora, saved head": {"init_lora_weights": "pissa", "use_rslora": True, "modules_to_save": ["lm_head"]},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora, lora+": {"use_dora": True, "loraplus_lr_ratio": 8.0},
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_peft(base: PreTrainedModel, recipe: Recipe) -> tuple[Any, torch.optim.Optimizer]:
    assert recipe.lora is not None
    given = recipe.lora.model_dump(exclude_unset=True)
    ratio = given.pop("loraplus_lr_ratio", None)
    torch.manual_seed(recipe.training.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | given))
    if ratio is not None:
        settings: Any = {"lr": recipe.training.learning_rate, "loraplus_lr_ratio": ratio}
        return model, create_loraplus_optimizer(model, torch.optim.AdamW, **settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=recipe.training.learning_rate, weight_decay=0)


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_are_those_of_peft_and_the_merged_model_computes_the_same(
    kind: str,
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
) -> None:
    base = save_base("llama")
    before = logits(base)
    recipe = make_recipe(lora={"r": 4, "lora_alpha": 8, **KINDS[kind]}, training={"learning_rate": 1e-2})
    policy = load(recipe)
    assert (logits(policy.causal) - before).abs().max() < 1e-5
    assert (reference_logits(policy) - before).abs().max() < 1e-5

    parameters = list(policy.trainable_parameters())
    optimizer = build_optimizer(parameters, recipe.training, scales=rate_scales(recipe.lora, parameters))
    losses = train(policy.causal, optimizer)
    theirs, their_optimizer = by_peft(base, recipe)
    assert losses == pytest.approx(train(theirs, their_optimizer), abs=1e-5)
    trained = logits(policy.causal)
    assert (trained - logits(theirs)).abs().max() < 1e-3
    assert (trained - before).abs().max() > 0.05
    assert (reference_logits(policy) - before).abs().max() < 1e-5

    export_model(policy, tmp_path / "run", tokenizer)
    loaded = plain(tmp_path / "base", tmp_path / "run")
    assert (logits(loaded) - trained).abs().max() < 1e-4
    assert (logits(loaded.merge_and_unload()) - trained).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_checkpoint_of_another_decomposition_belongs_to_the_base_without_it(
    model_type: str, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    """Another machine may find other factors of the same weights: of nothing, for example."""
    before = logits(save_base(model_type))
    policy = load(make_recipe(lora={"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}))
    assert (logits(policy.causal) - before).abs().max() < 1e-4
    policy.load_state({name: torch.zeros_like(tensor) for name, tensor in policy.state().items()})
    assert (logits(policy.causal) - before).abs().max() < 1e-4
    assert (reference_logits(policy) - before).abs().max() < 1e-4


def test_weights_that_lie_the_other_way_are_not_decomposed_by_rows(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("gpt2")
    with pytest.raises(UsageError, match="olora: peft cannot decompose the transposed weights of this model"):
        load(make_recipe(lora={"init_lora_weights": "olora"}))


def test_tied_ends_are_not_taken_apart(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    save_base("llama", tie_word_embeddings=True)
    lora = {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(UsageError, match="would change embedding and head, which are tied; leave lm_head out"):
        load(make_recipe(lora=lora))
