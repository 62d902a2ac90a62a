"""Where TRL 1.16 and dpoctl differ, and by how much; each test says which of the two does what."""

from typing import Any

import pytest
from datasets import Dataset
from parity.test_losses import assert_alike
from parity.two_programs import BATCH, Course, World, in_order_of_the_plan, labelled_rows, pair_rows

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def show(mine: Course, theirs: Course, *names: str) -> None:
    for name in ("loss", "grad_norm", *names):
        print(name, "ours", mine[name], "theirs", theirs[name])


def test_show_all(world: World) -> None:
    rows = pair_rows()
    print("SMOOTH")
    show(world.ours({"type": "sigmoid", "label_smoothing": 0.2}, rows), world.theirs("dpo", rows, label_smoothing=0.2))
    print("BCO")
    show(world.ours({"type": "bco_pair"}, rows), world.theirs("dpo", rows, loss_type=["bco_pair"]))
    print("WPO")
    show(world.ours({"type": "wpo", "beta": 0.1}, rows), world.theirs("dpo", rows, use_weighting=True))
    print("AOT GA")
    show(world.ours({"type": "aot", "beta": 0.1}, rows), world.theirs("dpo", rows, loss_type=["aot"], micro_batches=2))
    print("AOTU GA")
    show(
        world.ours({"type": "aot_unpaired", "beta": 0.1}, rows),
        world.theirs("dpo", rows, loss_type=["aot_unpaired"], micro_batches=2),
    )
    print("SIG GA")
    show(world.ours({"type": "sigmoid", "beta": 0.1}, rows), world.theirs("dpo", rows, micro_batches=2))
    print("RPO GA")
    show(
        world.ours({"type": "sigmoid", "sft_weight": 1.0}, rows),
        world.theirs("dpo", rows, loss_type=["sigmoid", "sft"], micro_batches=2),
    )
    print("CPO GA")
    show(world.ours({"type": "cpo"}, rows), world.theirs("cpo", rows, micro_batches=2))
    print("ORPO")
    show(world.ours({"type": "orpo"}, rows), world.theirs("orpo", rows))
    r = rows[:19]
    print("UNEVEN")
    show(world.ours({"type": "hinge"}, r), world.theirs("dpo", r, loss_type=["hinge"], micro_batches=2))
    k = labelled_rows()
    print("KTO")
    show(world.ours({"type": "kto", "desirable_weight": 1.3}, k), world.theirs("kto", k, desirable_weight=1.3), "kl")
    print("IPO sum")
    show(world.ours({"type": "ipo", "average": False}, rows), world.theirs("dpo", rows, loss_type=["ipo"]))
