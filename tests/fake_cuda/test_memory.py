"""Peak bytes and FLOPs of steps of 8B shape as they were recorded, those of whole models with their optimizer.

The recorded figures are of the packages in constraints.txt; whoever changes them on purpose writes them down again with
`python tests/fake_cuda/traces.py --record`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

FIGURES: dict[str, Any] = json.loads(Path(__file__).with_name("figures.json").read_text(encoding="utf-8"))
NAMES = [(group, name) for group, figures in FIGURES.items() for name in figures]
PARAMETERS, ADAPTER = 8_030_261_248, 41_943_040


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_a_step_takes_the_memory_and_the_work_that_were_recorded(group: str, name: str, traced: Any) -> None:
    found, recorded = traced(group)[name], FIGURES[group][name]
    assert (found["error"], found["rows"]) == (None, recorded["rows"])
    for figure in ("start_bytes", "peak_bytes", "flops"):
        assert found[figure] == pytest.approx(recorded[figure], rel=0.02), figure


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_a_step_launches_no_more_than_was_recorded(group: str, name: str, traced: Any) -> None:
    launches, recorded = traced(group)[name]["launches"], FIGURES[group][name]["launches"]
    assert launches.keys() == recorded.keys()
    for phase, count in recorded.items():
        assert launches[phase] <= 1.02 * count, phase


@pytest.mark.parametrize("group", FIGURES)
def test_every_trace_has_its_figures(group: str, traced: Any) -> None:
    assert FIGURES[group].keys() == traced(group).keys()


def test_whole_models_are_whole(traced: Any) -> None:
    assert {found["layers"] for found in traced("depths").values()} == {32}


def test_what_stands_before_a_step_is_what_the_arithmetic_says(traced: Any) -> None:
    """Weights and two moments in float32; half precision and an adapter; four bits and a little for the scales."""
    found, adapter, ends = traced("depths"), 12 * ADAPTER, 2 * 128_256 * 4096
    assert found["full"]["start_bytes"] == pytest.approx(12 * PARAMETERS, rel=1e-3)
    assert found["lora"]["start_bytes"] == pytest.approx(2 * PARAMETERS + adapter, rel=1e-3)
    packed = 0.516 * (PARAMETERS - ends)
    assert found["4bit"]["start_bytes"] == pytest.approx(2 * ends + packed + adapter, rel=5e-3)
    assert found["8bit"]["start_bytes"] == pytest.approx(2 * ends + PARAMETERS - ends + adapter, rel=5e-3)


@pytest.mark.parametrize(
    ("group", "name", "a_layer"),
    [
        *(("depths", name, 3) for name in ("full", "lora", "4bit", "8bit")),
        *(("families", f"mistral {kind}", 3) for kind in ("full", "lora")),
        # Norms of queries and keys too.
        *(("families", f"qwen3 {kind}", 5) for kind in ("full", "lora")),
    ],
)
def test_norms_and_gated_mlps_are_fused(group: str, name: str, a_layer: int, traced: Any) -> None:
    found = traced(group)[name]
    assert found["fused"] == a_layer * found["layers"] + 1


def test_of_eight_ranks_each_holds_an_eighth_of_what_stands_before_a_step(traced: Any) -> None:
    """The scales of 4-bit weights alone are whole on every rank: a byte for 64 weights, and four for 256 of these."""
    found = traced("sharded")
    assert found["8B full"]["start_bytes"] == pytest.approx(12 * PARAMETERS / 8, rel=1e-3)
    layer, ends = 855_638_016, 2 * 128_256 * 8192
    for depth in (12, 16):
        scales = depth * layer * (1 / 64 + 4 / 64 / 256)
        adapter = 16 * depth * (4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
        state = (depth * layer / 2 + 2 * ends + 12 * adapter) / 8 + scales
        assert found[f"70B 4bit, {depth} layers"]["start_bytes"] == pytest.approx(state, rel=0.01)


def test_eight_ranks_of_60_gb_train_all_weights_of_8b_and_an_adapter_of_70b_in_4_bits(traced: Any) -> None:
    found = traced("sharded")
    assert found["8B full"]["peak_bytes"] < 60e9
    few, more = (found[f"70B 4bit, {depth} layers"]["peak_bytes"] for depth in (12, 16))
    assert more + (80 - 16) / (16 - 12) * (more - few) == pytest.approx(21.2e9, rel=0.02)
