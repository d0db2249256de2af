"""Unlearning to Align, fast: score, select and unlearn negatives so that preference performance rises."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from u2a_fast import ops
from u2a_fast.influence.breakdown import module_derivatives, token_derivatives
from u2a_fast.influence.index import GradientIndex
from u2a_fast.influence.objectives import DPO, SFT, Reward
from u2a_fast.influence.routes import DirectionalDerivatives, directional_derivatives
from u2a_fast.influence.scorer import InfluenceScorer, Scores
from u2a_fast.influence.selftest import selftest
from u2a_fast.influence.signal import signal_check

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "SFT",
    "DirectionalDerivatives",
    "GradientIndex",
    "InfluenceScorer",
    "Reward",
    "Scores",
    "align",
    "directional_derivatives",
    "module_derivatives",
    "ops",
    "select",
    "selftest",
    "signal_check",
    "token_derivatives",
    "unlearn",
]

if TYPE_CHECKING:
    from u2a_fast.selection import select
    from u2a_fast.unlearning import align, unlearn

_LAZY = {"select": "u2a_fast.selection", "unlearn": "u2a_fast.unlearning", "align": "u2a_fast.unlearning"}


def __getattr__(name: str) -> Any:
    # the Trainer behind unlearn and align takes seconds to import, which scoring alone need not pay
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
