"""Weights in bfloat16: rounding is right in the mean, and training goes where float32 goes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpoctl.core import low_precision
from dpoctl.core.low_precision import BFloat16AdamW, round_stochastically, rounded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_of_many_roundings_is_the_value() -> None:
    values = torch.tensor([1.0 + 1 / 1024, -3.0 - 1 / 300, 1e-30, 7.0, 0.0, 65504.1])
    rounds = round_stochastically(values.expand(40_000, -1).clone(), generator()).double()
    torch.testing.assert_close(rounds.mean(0), values.double(), rtol=2e-4, atol=0)
    neighbours = [set(column.unique().tolist()) for column in rounds.T]
    assert all(
        len(found) == (1 if value in (7.0, 0.0) else 2)
        for value, found in zip(values.tolist(), neighbours, strict=True)
    )


def test_a_number_that_bfloat16_holds_stays() -> None:
    values = torch.randn(5000, generator=generator()).bfloat16()
    assert torch.equal(round_stochastically(values.float(), generator(1)), values)


def test_the_largest_numbers_do_not_become_infinite_from_below() -> None:
    largest = torch.full((1000,), torch.finfo(torch.bfloat16).max).float()
    assert round_stochastically(largest, generator()).isfinite().all()


def problem(dtype: torch.dtype) -> tuple[nn.Parameter, Tensor]:
    """A weight that must move by many steps, each far below a bit of it."""
    start = torch.full((64, 32), 1.0)
    return nn.Parameter(start.to(dtype)), torch.full((64, 32), 1.05)


def solve(make: Any, dtype: torch.dtype, steps: int = 400) -> Tensor:
    weight, goal = problem(dtype)
    optimizer = make([weight])
    for _ in range(steps):
        optimizer.zero_grad()
        (weight.float() - goal).square().sum().backward()
        optimizer.step()
    return weight.detach().float()


def adamw(parameters: Any) -> BFloat16AdamW:
    return BFloat16AdamW(parameters, lr=1e-4, weight_decay=0.01)


def test_float32_weights_are_updated_as_torch_does_it() -> None:
    ours = solve(adamw, torch.float32, steps=30)
    true = solve(lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01), torch.float32, steps=30)
    torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-7)


def test_small_updates_add_up_where_rounding_to_the_nearest_loses_them() -> None:
    true = solve(lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01), torch.float32).mean()
    ours = solve(adamw, torch.bfloat16).mean()
    nearest = solve(lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01), torch.bfloat16).mean()
    assert abs(float(nearest) - 1.0) < 1e-6, "an update of 1e-4 is below half a bit of 1"
    assert float(ours) == pytest.approx(float(true), abs=1.5e-3)


def test_a_second_moment_grows_in_bfloat16() -> None:
    weight = nn.Parameter(torch.ones(256, 16, dtype=torch.bfloat16))
    optimizer = adamw([weight])
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moment = optimizer.state[weight]["exp_avg_sq"]
    assert moment.dtype == torch.bfloat16
    assert float(moment.float().mean()) == pytest.approx(1 - 0.999**300, rel=0.01)


def test_chunks_change_nothing_that_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve(adamw, torch.float32, steps=5)
    monkeypatch.setattr(low_precision, "CHUNK", 100)
    assert torch.equal(solve(adamw, torch.float32, steps=5), whole)


def test_the_same_seed_and_step_round_alike_and_a_resumed_run_goes_on_as_it_would_have() -> None:
    def run(split: int | None) -> Tensor:
        weight = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
        optimizer = adamw([weight])
        for step in range(6):
            if step == split:
                state = optimizer.state_dict()
                optimizer = adamw([weight])
                optimizer.load_state_dict(state)
            weight.grad = torch.linspace(-1, 1, 256).view(16, 16).bfloat16()
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(None), run(3))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_bitsandbytes_optimizers_round_stochastically_too(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = getattr(bitsandbytes.optim, name)
    wide = solve(lambda p: base(p, lr=1e-4, weight_decay=0.01), torch.float32, steps=200)
    ours = solve(lambda p: rounded(base, 0)(p, lr=1e-4, weight_decay=0.01), torch.bfloat16, steps=200)
    assert float(ours.mean()) == pytest.approx(float(wide.mean()), abs=2e-3)
    assert float(wide.mean()) > 1.01
