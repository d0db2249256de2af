"""Selections on disk: selection.parquet with id, score and weight, highest score first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from u2a_fast.store.files import write_atomically
from u2a_fast.store.scores import read_table

__all__ = ["read_selection", "write_selection"]

SCHEMA = pa.schema([("id", pa.string()), ("score", pa.float64()), ("weight", pa.float64())])


def write_selection(path: Path, selection: Any, *, before_rename: Callable[[], object] | None = None) -> None:
    """Write the arrays id, score and weight of ``selection``, as ``write_atomically`` does."""
    table = pa.table(
        [pa.array([str(i) for i in selection.id], pa.string()), pa.array(selection.score), pa.array(selection.weight)],
        schema=SCHEMA,
    )
    write_atomically(path, lambda temporary: pq.write_table(table, temporary), before_rename=before_rename)


def read_selection(path: Path | str) -> dict[str, np.ndarray]:
    """The columns of a selection as arrays. ``path`` is the file or the folder that holds ``selection.parquet``."""
    return read_table(path, "selection.parquet", SCHEMA)
