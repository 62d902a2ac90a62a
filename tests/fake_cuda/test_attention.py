"""What attention of 8B shape dispatches to on a GPU: one kernel call a layer, in half precision, on shared heads."""

from typing import Any

import pytest

LLAMA = ("full", "full, recomputed", "lora", "lora, recomputed", "4bit", "8bit")
OTHERS = tuple(f"{family} {kind}" for family in ("qwen3", "mistral", "gemma3_text") for kind in ("full", "lora"))
WINDOW, NO_WINDOW = [127, 0], [-1, 0]


@pytest.fixture(params=[*LLAMA, *OTHERS])
def one(request: pytest.FixtureRequest, traced: Any) -> dict[str, Any]:
    """A trace in which every layer can take the kernel."""
    found: dict[str, Any] = traced("depths" if request.param in LLAMA else "families")[request.param]
    assert found["error"] is None
    return found | {"name": request.param}


def test_each_layer_attends_in_one_call(one: dict[str, Any]) -> None:
    times = 2 if "recomputed" in one["name"] else 1
    assert (len(one["forward"]), len(one["backward"])) == (times * one["layers"], one["layers"])


def test_queries_keys_and_values_are_bfloat16_and_heads_are_shared(one: dict[str, Any]) -> None:
    for call in one["forward"] + one["backward"]:
        assert call["dtypes"] == ["bfloat16"] * 3
        query, key, value = call["shapes"]
        assert query[:2] == [one["rows"], one["heads"]]
        assert key[:2] == value[:2] == [one["keys"], one["key_heads"]]
    assert one["key_heads"] < one["heads"]


def test_no_tensor_has_rows_times_rows(one: dict[str, Any]) -> None:
    """Squares are weights and their gradients alone: no mask, no scores."""
    assert set(one["squares"]) <= {one["hidden"]}
    assert one["rows"] != one["hidden"] != one["keys"]


def test_windows_are_the_kernel_s_own(traced: Any) -> None:
    found = traced("families")
    for kind in ("full", "lora"):
        assert [call["window"] for call in found[f"mistral {kind}"]["forward"]] == [WINDOW] * 2
        assert [call["window"] for call in found[f"gemma3_text {kind}"]["forward"]] == [WINDOW, NO_WINDOW]
        assert found[f"mistral {kind}"]["longest_keys"] > WINDOW[0] + 1, "else the window would hide nothing"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_capped_scores_are_spelled_out_for_each_response(kind: str, traced: Any) -> None:
    """Gemma 2's soft cap is more than the kernel knows: scores of one response at a time, never of the whole batch."""
    one = traced("families")[f"gemma2 {kind}"]
    assert one["error"] is None
    assert one["forward"] == one["backward"] == []
    assert max(one["squares"]) == one["longest_keys"] < one["rows"] / 8
