"""The optimizers, and what each of their keys does."""

from typing import Any

import pytest
import torch
from torch import nn

from dpoctl.core.optim import build_optimizer, set_learning_rate
from dpoctl.recipe.schema import TrainingSection


def settings(**changes: Any) -> TrainingSection:
    return TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1.0} | changes)


def trained(optim: str, **changes: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(96, 96)
    optimizer = build_optimizer(layer.named_parameters(), settings(optim=optim, learning_rate=1e-2, **changes))
    for _ in range(5):
        layer(torch.ones(2, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


OPTIMS = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "rmsprop"]


@pytest.mark.parametrize("optim", OPTIMS)
def test_every_optimizer_lowers_the_loss(optim: str) -> None:
    torch.manual_seed(0)
    before = nn.Linear(96, 96)
    ones = torch.ones(2, 96)
    assert trained(optim)(ones).square().mean() < 0.9 * before(ones).square().mean()


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_adam_is_adam(optim: str) -> None:
    error = (trained(optim).weight - trained("adamw").weight).abs().max()
    assert error < (1e-6 if optim == "paged_adamw_32bit" else 5e-3)


@pytest.mark.parametrize(
    "changes", [{"adam_beta1": 0.5}, {"adam_beta2": 0.5}, {"adam_epsilon": 0.1}, {"weight_decay": 0.5}], ids=str
)
def test_adam_s_keys_are_used(changes: dict[str, Any]) -> None:
    assert not torch.equal(trained("adamw", **changes).weight, trained("adamw").weight)


def test_biases_are_not_decayed() -> None:
    layer = nn.Linear(4, 4)
    optimizer = build_optimizer(layer.named_parameters(), settings(weight_decay=0.1))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (1, 0.0)]


def test_all_groups_follow_the_schedule() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4).named_parameters(), settings())
    set_learning_rate(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]


def test_rmsprop_uses_epsilon_and_weight_decay() -> None:
    for changes in ({"adam_epsilon": 0.1}, {"weight_decay": 0.5}):
        assert not torch.equal(trained("rmsprop", **changes).weight, trained("rmsprop").weight)
