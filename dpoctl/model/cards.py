"""GPUs that a plan can be made for: their memory, and their rate by the data sheet."""

from dataclasses import dataclass

import torch

from dpoctl.errors import UsageError

CONTEXT = 600 << 20
"""Bytes of a GPU that the driver, its context and the libraries take."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as it is given to `--gpu`.
        memory: bytes.
        rate: products of bfloat16 matrices, dense, in operations a second, by the data sheet.
    """

    name: str
    memory: int
    rate: float


def _card(name: str, gibibytes: float, teraflops: float) -> Card:
    return Card(name, int(gibibytes * (1 << 30)), teraflops * 1e12)


# Memory as the driver reports it, a little less than the name says.
CARDS = {
    card.name: card
    for card in (
        _card("rtx3090", 23.6, 71),
        _card("rtx4090", 23.5, 165),
        _card("rtx5090", 31.4, 210),
        _card("a10g", 22.1, 70),
        _card("l4", 22.0, 121),
        _card("l40s", 44.4, 362),
        _card("a6000", 47.5, 155),
        _card("rtx6000ada", 47.5, 182),
        _card("a100-40gb", 39.4, 312),
        _card("a100-80gb", 79.2, 312),
        _card("h100-80gb", 79.1, 989),
        _card("h200-141gb", 139.8, 989),
        _card("b200-180gb", 178.4, 2250),
    )
}


def find_card(name: str) -> Card:
    """Return a card by its name, or the GPU of this machine for `auto`.

    Raises:
        UsageError: there is no such card.
    """
    if name != "auto":
        if name not in CARDS:
            raise UsageError(f"--gpu {name}: not a known GPU", hint=f"give one of {', '.join(CARDS)}, or auto")
        return CARDS[name]
    properties = torch.cuda.get_device_properties(0)
    title = properties.name.lower().replace(" ", "").replace("-", "")
    known = [card for card in CARDS.values() if card.name.split("-")[0] in title]
    rate = known[0].rate if known else 100e12
    return Card(str(properties.name), int(properties.total_memory), rate)
