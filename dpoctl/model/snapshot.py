"""What a policy has trained, as it was at some time, and still can be computed with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dpoctl.errors import RunError
from dpoctl.model.policy import Policy


class Snapshot:
    """A copy of a policy's trained tensors, which takes their place for a while.

    Frozen weights are not copied. Over an adapter it costs no more than that adapter, whatever it is put on.

    Args:
        policy: at the time of the snapshot.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tensors = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside it the policy's model computes with the snapshot; what is trained is put aside and comes back.

        Enter an autocast region of its own inside, never around: autocast keeps its casts of weights by their place.
        No backward may run inside.
        """
        parameters = dict(self._policy.trainable_parameters())
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._tensors[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Move towards the policy as it is at present: to alpha * policy + (1 - alpha) * snapshot, tensor by tensor."""
        for name, tensor in self._policy.trainable_state().items():
            self._tensors[name].lerp_(tensor, alpha)

    def state(self) -> dict[str, Tensor]:
        """Return its tensors by name; they share memory with it."""
        return self._tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the tensors of a checkpoint back in place.

        Raises:
            RunError: they are not those of this model.
        """
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in self._tensors.items()}:
            raise RunError("the checkpoint holds no reference of this model")
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])
