"""Readers from files and datasets to token examples, and packing of token examples."""

from u2a_fast.data.readers import (
    Negatives,
    Rows,
    read_negatives,
    read_positives,
    read_preferences,
    read_rewards,
)
from u2a_fast.data.rows import BadRow, BadRowsError, ReadReport

__all__ = [
    "BadRow",
    "BadRowsError",
    "Negatives",
    "ReadReport",
    "Rows",
    "read_negatives",
    "read_positives",
    "read_preferences",
    "read_rewards",
]
