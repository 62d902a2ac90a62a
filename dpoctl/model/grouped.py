"""Grouped-query attention: heads of keys and values that several heads of queries share. Heads are dimension 1."""

from torch import Tensor


def for_all_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat keys or values for the queries that share them."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def of_each_head(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Add up what keys or values got from the queries that share them."""
    groups = gradient.shape[1] // tensor.shape[1]
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)
