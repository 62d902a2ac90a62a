import math

import pytest
import torch

from dpoctl.runs.serialization import read_tree, tree_bytes, write_tree


def test_plain_data_comes_back_with_its_types(tmp_path):
    tree = {
        "tuple": (1, (2.5, None)),
        "list": [True, False, "text", "\U0001f600\u2028"],
        3: {"int key": 10**30},
        ("a", 1): {},
        "$tensor": {"$float": "not ours"},
        "float": 0.1 + 0.2,
    }
    assert write_tree(tmp_path, "x", tree) == ["x.json"]
    back = read_tree(tmp_path, "x")
    assert back == tree
    assert isinstance(back["tuple"][1], tuple)
    assert isinstance(back["list"][0], bool)


def test_numbers_that_json_lacks_come_back(tmp_path):
    write_tree(tmp_path, "x", [math.inf, -math.inf, math.nan])
    plus, minus, nan = read_tree(tmp_path, "x")
    assert (plus, minus) == (math.inf, -math.inf)
    assert math.isnan(nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    values = torch.randn(3, 5).to(dtype)
    tensors = {"matrix": values, "scalar": values[0, 0], "empty": values[:0], "transposed": values.t()}
    write_tree(tmp_path, "x", tensors)
    for name, back in read_tree(tmp_path, "x").items():
        assert back.dtype == dtype
        assert back.shape == tensors[name].shape
        assert torch.equal(back, tensors[name])


def test_a_tensor_used_twice_is_written_once_and_comes_back_as_one(tmp_path):
    shared = torch.arange(1000.0)
    write_tree(tmp_path, "x", {"a": {"map": shared}, "b": {"map": shared}})
    back = read_tree(tmp_path, "x")
    assert back["a"]["map"] is back["b"]["map"]
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * shared.nbytes


def test_overlapping_views_and_colliding_names_are_kept_apart(tmp_path):
    base = torch.arange(12.0)
    tree = {"a/b": base[:8], "a": {"b": base[4:]}, "whole": base, "shape": base.view(3, 4)}
    write_tree(tmp_path, "x", tree)
    back = read_tree(tmp_path, "x")
    assert torch.equal(back["a/b"], base[:8])
    assert torch.equal(back["a"]["b"], base[4:])
    assert torch.equal(back["shape"], base.view(3, 4))


def test_what_was_read_does_not_depend_on_the_file(tmp_path):
    write_tree(tmp_path, "x", {"w": torch.ones(4)})
    back = read_tree(tmp_path, "x")["w"]
    (tmp_path / "x.safetensors").write_bytes(b"")
    back.add_(1)
    assert torch.equal(back, torch.full((4,), 2.0))


def test_what_needs_pickle_is_refused_by_its_place(tmp_path):
    with pytest.raises(TypeError, match="state/0: a object"):
        write_tree(tmp_path, "x", {"state": [object()]})


def test_size_counts_every_tensor():
    assert tree_bytes({"a": [torch.zeros(4), (torch.zeros(2, dtype=torch.uint8),)], "b": "text"}) == 18
