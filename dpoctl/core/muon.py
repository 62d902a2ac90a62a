"""Muon for the matrices of the hidden layers, with AdamW for all other parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's `Muon` and `AdamW` as one optimizer, whose groups and state are those of the two, in this order.

    Args:
        matrices: groups of 2-D parameters for Muon.
        others: groups of parameters for AdamW.
        muon: arguments of Muon.
        adamw: arguments of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        muon: dict[str, Any],
        adamw: dict[str, Any],
    ) -> None:
        kinds: list[tuple[Any, Sequence[dict[str, Any]], dict[str, Any]]] = [(Muon, matrices, muon)]
        kinds += [(AdamW, others, adamw | {"fused": True})]
        self._parts: list[Optimizer] = [kind(groups, **arguments) for kind, groups, arguments in kinds if groups]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on the groups and on the state of the whole."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, as `state_dict` returned them."""
        super().load_state_dict(state_dict)
        self._share()
