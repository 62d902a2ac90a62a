"""The optimizers, and what each of their keys does."""

from pathlib import Path
from typing import Any, get_args

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from dpoctl.core.optim import build_optimizer, set_learning_rate
from dpoctl.recipe.library_names import Optim
from dpoctl.recipe.schema import TrainingSection
from dpoctl.runs.serialization import read_tree, write_tree


def settings(**changes: Any) -> TrainingSection:
    return TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1.0} | changes)


def trained(optim: str, **changes: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(96, 96)
    optimizer = build_optimizer(layer.named_parameters(), settings(**{"optim": optim, "learning_rate": 1e-2} | changes))
    for _ in range(5):
        layer(torch.ones(2, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


@pytest.mark.parametrize("optim", get_args(Optim))
def test_every_optimizer_lowers_the_loss(optim: str) -> None:
    torch.manual_seed(0)
    before = nn.Linear(96, 96)
    ones = torch.ones(2, 96)
    # Lion moves every weight by the learning rate.
    changes = {"learning_rate": 1e-3} if "lion" in optim else {}
    assert trained(optim, **changes)(ones).square().mean() < 0.9 * before(ones).square().mean()


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


class Hidden(nn.Module):
    """An embedding, two matrices of hidden layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(50, 80), nn.Linear(80, 120), nn.Linear(120, 80)
        self.norm, self.head = nn.LayerNorm(80), nn.Linear(80, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.down(self.up(self.embed(ids)).relu())))
        return out


OUTSIDE = {"embed.weight", "head.weight"}


def steps(model: Hidden, optimizers: list[torch.optim.Optimizer], number: int = 5) -> None:
    for step in range(number):
        torch.manual_seed(step)
        ids = torch.randint(50, (4, 9))
        nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(kind: str, model: Hidden) -> list[torch.optim.Optimizer]:
    """The classes of the libraries, called as their documentation does."""
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.ndim == 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups: Any = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if kind == "adafactor":
        return [Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)]
    if kind.endswith("lion_32bit"):
        return [bitsandbytes.optim.Lion32bit(groups, lr=1e-2, betas=(0.9, 0.999))]
    if kind.endswith("lion_8bit"):
        return [bitsandbytes.optim.Lion8bit(groups, lr=1e-2, betas=(0.9, 0.999))]
    if kind.endswith("adamw_8bit"):
        return [bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.999))]
    if kind == "paged_adamw_32bit":
        return [bitsandbytes.optim.AdamW32bit(groups, lr=1e-2, betas=(0.9, 0.999))]
    if kind == "rmsprop":
        return [torch.optim.RMSprop(groups, lr=1e-2)]
    if kind == "muon":
        hidden = [model.up.weight, model.down.weight]
        rest: Any = [{"params": [model.embed.weight, model.head.weight], "weight_decay": 0.1}, groups[1]]
        muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=1e-2, fused=True)]
    assert kind == "adamw"
    return [torch.optim.AdamW(groups, lr=1e-2)]


@pytest.mark.parametrize("optim", get_args(Optim))
def test_five_steps_are_those_of_the_library_also_after_its_state_was_stored(optim: str, tmp_path: Path) -> None:
    training = settings(optim=optim, learning_rate=1e-2, weight_decay=0.1)
    ours, theirs, resumed = Hidden(), Hidden(), Hidden()
    optimizer = build_optimizer(ours.named_parameters(), training, outside=OUTSIDE)
    steps(theirs, by_hand(optim, theirs))
    steps(ours, [optimizer])
    for (name, own), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # A fused kernel of AdamW rounds otherwise.
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6, msg=name)

    resumed.load_state_dict(ours.state_dict())
    write_tree(tmp_path, "optimizer", optimizer.state_dict())
    again = build_optimizer(resumed.named_parameters(), training, outside=OUTSIDE)
    again.load_state_dict(read_tree(tmp_path, "optimizer"))
    set_learning_rate(optimizer, 5e-3)
    set_learning_rate(again, 5e-3)
    steps(ours, [optimizer])
    steps(resumed, [again])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), resumed.parameters(), strict=True))


def test_a_scaled_parameter_learns_at_its_own_rate_throughout() -> None:
    model = Hidden()
    optimizer = build_optimizer(model.named_parameters(), settings(), scales={"up.weight": 4.0, "up.bias": 4.0})
    set_learning_rate(optimizer, 0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters() if rates[id(p)] != 0.25} == {
        "up.weight": 1.0,
        "up.bias": 1.0,
    }


@pytest.mark.parametrize(
    ("optim", "arguments"),
    [
        ("adafactor", {"clip_threshold": 0.1}),
        ("adafactor", {"decay_rate": -0.3}),
        ("adafactor", {"beta1": 0.9}),
        ("adafactor", {"scale_parameter": True}),
        ("muon", {"momentum": 0.5}),
        ("muon", {"nesterov": False}),
        ("muon", {"ns_steps": 2}),
        ("muon", {"adjust_lr_fn": "original"}),
    ],
    ids=str,
)
def test_arguments_of_an_optimizer_reach_it(optim: str, arguments: dict[str, Any]) -> None:
    one, other = trained(optim, optim_args=arguments), trained(optim)
    assert not torch.equal(one.weight, other.weight)


def test_other_names_of_optimizers_mean_the_same() -> None:
    names = {name: settings(optim=name).optim for name in ("adamw_torch_fused", "adamw_bnb_8bit", "lion")}
    assert names == {"adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit", "lion": "lion_32bit"}
