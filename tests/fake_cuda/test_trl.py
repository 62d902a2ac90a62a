"""A step beside TRL's at 8B shape, two layers deep: the table in docs/benchmarks.md is of all of them."""

from typing import Any

import pytest


@pytest.mark.parametrize("recomputed", ["", ", layers recomputed"])
@pytest.mark.parametrize("head", ["head as on a GPU", "head without Triton"])
def test_the_same_pairs_take_a_third_of_the_work_and_of_the_activations(
    head: str, recomputed: str, traced: Any
) -> None:
    found = traced("trl")
    ours, theirs = found[f"dpoctl{recomputed}"], found[f"TRL, {head}{recomputed}"]
    assert ours["error"] is None
    # Prompts once and no padding, against both answers after a prompt of their own and rows as long as the longest.
    assert theirs["rows"] / ours["rows"] > 3
    assert theirs["flops"] / ours["flops"] > 2.5
    assert theirs["peak_bytes"] - ours["start_bytes"] > 2 * (ours["peak_bytes"] - ours["start_bytes"])
