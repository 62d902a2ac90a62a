import random

import numpy as np
import torch

from dpoctl.runs import rng
from dpoctl.runs.tree import read_tree, write_tree


def draw():
    return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)


def test_the_draws_after_a_restore_are_those_after_the_capture(tmp_path):
    np.random.normal()  # leaves a cached second value behind, and so does gauss
    random.gauss(0, 1)
    write_tree(tmp_path, "rng", rng.capture())
    expected = draw()
    draw()
    rng.restore(read_tree(tmp_path, "rng"))
    assert draw() == expected


def test_states_of_devices_that_are_gone_are_passed_over():
    state = {**rng.capture(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 99}
    if torch.cuda.device_count() == 0:
        rng.restore(state)
