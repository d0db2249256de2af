"""From gains to a weighted set of negatives."""

from u2a_fast.selection.select import STRATEGIES, WEIGHTS, Selection, select
from u2a_fast.selection.weights import (
    TRANSFORMS,
    WeightUpdate,
    effective_sample_size,
    exponentiated_gradient,
    released_exponentiated_gradient,
)

__all__ = [
    "STRATEGIES",
    "TRANSFORMS",
    "WEIGHTS",
    "Selection",
    "WeightUpdate",
    "effective_sample_size",
    "exponentiated_gradient",
    "released_exponentiated_gradient",
    "select",
]
