"""The losses: each a frozen dataclass whose fields are its recipe keys and whose call is the paper's equation.

A loss returns values whose sum the loop divides by the step's count of its item, and never divides itself.
It is written in tensor methods alone and imports no torch, so that a recipe is checked without that wait.

To add one: a dataclass in one of these modules, a line in `LOSSES`, and a row of hand-computed values in its test.
"""

from dpoctl.core.losses.coupled import AOT, AOTUnpaired, BCOPair
from dpoctl.core.losses.dynamic import BetaDPO
from dpoctl.core.losses.listwise import SDPO, PlackettLuce
from dpoctl.core.losses.pairwise import (
    DPOP,
    FDPO,
    IPO,
    LDDPO,
    RDPO,
    WPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    Robust,
    Sigmoid,
    SigmoidNorm,
)
from dpoctl.core.losses.reference_free import CPO, ORPO, SimPO
from dpoctl.core.losses.scores import Item, Loss, Memory, Need, PreferenceLoss, Rows, Scores, log_sigmoid
from dpoctl.core.losses.terms import SequenceNLL, TargetNLL, Term, TokenNLL, terms_of
from dpoctl.core.losses.unpaired import KTO, APODown, APOZero, NCAPair, SPPOHard

__all__ = [
    "AOT",
    "CPO",
    "DPOP",
    "FDPO",
    "IPO",
    "KTO",
    "LDDPO",
    "LOSSES",
    "ORPO",
    "RDPO",
    "SDPO",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCOPair",
    "BetaDPO",
    "DiscoPOP",
    "EXOPair",
    "Hinge",
    "Item",
    "Loss",
    "Memory",
    "NCAPair",
    "Need",
    "PlackettLuce",
    "PreferenceLoss",
    "Robust",
    "Rows",
    "SPPOHard",
    "Scores",
    "SequenceNLL",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "TargetNLL",
    "Term",
    "TokenNLL",
    "log_sigmoid",
    "terms_of",
]

LOSSES: dict[str, type[PreferenceLoss]] = {
    "sigmoid": Sigmoid,
    "robust": Robust,
    "ipo": IPO,
    "hinge": Hinge,
    "beta_dpo": BetaDPO,
    "sigmoid_norm": SigmoidNorm,
    "r_dpo": RDPO,
    "dpop": DPOP,
    "simpo": SimPO,
    "cpo": CPO,
    "orpo": ORPO,
    "kto": KTO,
    "plackett_luce": PlackettLuce,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "ld_dpo": LDDPO,
    "wpo": WPO,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "discopop": DiscoPOP,
    "f_dpo": FDPO,
    "s_dpo": SDPO,
}
"""By the name that a recipe's `dpo.loss.type` gives them."""
