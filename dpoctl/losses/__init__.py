"""The losses: each a frozen dataclass whose fields are its recipe keys and whose call is the paper's equation.

A loss returns values whose sum the loop divides by the step's count of its item, and never divides itself. It is
written in tensor methods alone and imports no torch, so that checking a recipe does not wait for torch.

docs/architecture.md says how to add one.
"""

from dpoctl.losses.base import (
    Item,
    Loss,
    Memory,
    Need,
    Outline,
    PreferenceLoss,
    Rows,
    Scores,
    SequenceNLL,
    TargetNLL,
    Term,
    TokenNLL,
    terms_of,
)
from dpoctl.losses.listwise import SDPO, PlackettLuce
from dpoctl.losses.stepwise import AOT, BASES, AOTUnpaired, BCOPair, BetaDPO
from dpoctl.losses.unpaired import KTO

__all__ = [
    "LOSSES",
    "Item",
    "Loss",
    "Memory",
    "Need",
    "Outline",
    "PreferenceLoss",
    "Rows",
    "Scores",
    "SequenceNLL",
    "TargetNLL",
    "Term",
    "TokenNLL",
    "terms_of",
]

LOSSES: dict[str, type[PreferenceLoss]] = BASES | {
    "beta_dpo": BetaDPO,
    "kto": KTO,
    "plackett_luce": PlackettLuce,
    "bco_pair": BCOPair,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "s_dpo": SDPO,
}
"""The losses, by the name that `dpo.loss.type` gives them."""
