"""Weighted unlearning, and the loop of scoring and unlearning."""

from u2a_fast.unlearning.batches import WeightedNegatives
from u2a_fast.unlearning.config import AlignConfig, UnlearnConfig
from u2a_fast.unlearning.loop import AlignResult, align
from u2a_fast.unlearning.run import UnlearnResult, unlearn
from u2a_fast.unlearning.trainer import UnlearnTrainer

__all__ = [
    "AlignConfig",
    "AlignResult",
    "UnlearnConfig",
    "UnlearnResult",
    "UnlearnTrainer",
    "WeightedNegatives",
    "align",
    "unlearn",
]
