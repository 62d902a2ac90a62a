"""TRL 1.16 and dpoctl train alike: each loss that both have, five steps, all weights or an adapter."""

from typing import Any

import pytest
from parity.labels import labelled_rows, labelled_store, mismatched_like, train_on_labels
from parity.two_programs import World, alike, pair_rows

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "sigmoid": ({"type": "sigmoid"}, {}),
    "robust": ({"type": "robust", "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "hinge": ({"type": "hinge"}, {}),
    "ipo": ({"type": "ipo"}, {}),
    "sigmoid_norm": ({"type": "sigmoid_norm", "beta": 5.0}, {"beta": 5.0}),
    "exo_pair": ({"type": "exo_pair", "label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    "nca_pair": ({"type": "nca_pair", "beta": 0.1}, {}),
    "bco_pair": ({"type": "bco_pair", "running_mean": False}, {}),
    "sppo_hard": ({"type": "sppo_hard", "beta": 0.01}, {"beta": 0.01}),
    "aot": ({"type": "aot", "beta": 0.1}, {}),
    "aot_unpaired": ({"type": "aot_unpaired", "beta": 0.1}, {}),
    "apo_zero": ({"type": "apo_zero"}, {}),
    "apo_down": ({"type": "apo_down"}, {}),
    "discopop": ({"type": "discopop", "beta": 0.05}, {"beta": 0.05}),
}
"""By TRL's `loss_type`: the recipe's loss, and TRL's options; beta is 0.1 unless they say otherwise."""

NAMED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "length-desensitised": ({"type": "ld_dpo", "alpha": 0.3}, "dpo", {"ld_alpha": 0.3}),
    "weighted": ({"type": "wpo", "beta": 0.1, "clamp": False}, "dpo", {"use_weighting": True}),
    "forward KL": ({"type": "f_dpo", "divergence": "forward_kl"}, "dpo", {"f_divergence_type": "forward_kl"}),
    "Jensen-Shannon": ({"type": "f_dpo", "divergence": "js"}, "dpo", {"f_divergence_type": "js_divergence"}),
    "alpha divergence": (
        {"type": "f_dpo", "divergence": "alpha", "alpha": 0.3},
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "with likelihood (RPO)": (
        {"type": "sigmoid", "sft_weight": 0.5},
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    "mixture (MPO)": (
        [
            {"type": "sigmoid", "weight": 0.8},
            {"type": "bco_pair", "weight": 0.2, "running_mean": False},
            {"type": "sft", "weight": 1.0},
        ],
        "dpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "coupled mixture": (
        [{"type": "aot", "beta": 0.1}, {"type": "apo_zero", "weight": 0.5}],
        "dpo",
        {"loss_type": ["aot", "apo_zero"], "loss_weights": [1.0, 0.5]},
    ),
    "CPO": ({"type": "cpo"}, "cpo", {}),
    "CPO, half the likelihood": ({"type": "cpo", "sft_weight": 0.5}, "cpo", {"cpo_alpha": 0.5}),
    "SimPO": (
        {"type": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.4},
        "cpo",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "CPO-SimPO": (
        {"type": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.4, "sft_weight": 1.0},
        "cpo",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.0},
    ),
    "reference-free, smoothed (CPO without likelihood)": (
        {"type": "sigmoid", "reference_free": True, "label_smoothing": 0.1},
        "cpo",
        {"cpo_alpha": 0.0, "label_smoothing": 0.1},
    ),
}
"""What TRL has under other names: the recipe's loss, TRL's trainer, and its options."""

CASES = {name: (loss, "dpo", {"loss_type": [name], **options}) for name, (loss, options) in SAME.items()} | NAMED


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trl_s_at_every_step(name: str, lora: bool, world: World) -> None:
    loss, trainer, options = CASES[name]
    theirs = world.theirs(trainer, pair_rows(), lora=lora, **options)
    assert alike(world.ours(loss, pair_rows(), lora=lora), theirs)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_within_the_step_is_trl_s(name: str, world: World) -> None:
    """Large updates, so that policy and reference put the pairs in different orders."""
    rows, fast = pair_rows(), {"learning_rate": 3e-3}
    mine = world.ours({"type": name, "beta": 0.1}, rows, **fast)
    assert alike(mine, world.theirs("dpo", rows, loss_type=[name], **fast))
    assert not alike(mine, world.ours({"type": "sigmoid"}, rows, **fast))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_orpo_is_trl_s_where_prompts_are_one_token(lora: bool, world: World) -> None:
    """TRL's likelihood is over prompt and answer; a prompt of one token, which nothing predicts, adds none to it."""
    rows = pair_rows(one_token_prompts=True)
    mine = world.ours({"type": "orpo", "beta": 0.25}, rows, lora=lora)
    assert alike(mine, world.theirs("orpo", rows, lora=lora, beta=0.25))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kto_is_trl_s_with_the_same_mismatched_answers(lora: bool, world: World) -> None:
    store = labelled_store(labelled_rows(), world.tokenizer)
    mine = train_on_labels(world, {"type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.8}, store, lora=lora)
    theirs = world.theirs(
        "kto",
        labelled_rows(),
        lora=lora,
        edit=lambda dataset: mismatched_like(store, dataset),
        desirable_weight=1.3,
        undesirable_weight=0.8,
    )
    assert alike(mine, theirs)
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4, abs=1e-4)
    assert max(mine["kl"]) > 0


def test_rewards_and_likelihoods_are_logged_as_by_trl(world: World) -> None:
    mine, theirs = world.ours({"type": "sigmoid"}, pair_rows()), world.theirs("dpo", pair_rows())
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-4), name
    assert mine["rewards/accuracies"] == theirs["rewards/accuracies"]
