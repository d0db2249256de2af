"""What a run that ranks all negatives at once has done, for the run that goes on after an interruption.

Such a run looks at negatives in stages: a sample, all of them roughly, the best exactly. Which ones follows from the
results before alone, so a rerun asks for the same windows in the same order, and finds those that were finished.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from u2a_fast.store.budget import read_budget, write_budget
from u2a_fast.store.files import read_json, write_atomically, write_text
from u2a_fast.store.scores import check_target, claim_parts, read_part

__all__ = ["Journal"]

_POSITION = "position"


class Journal:
    """Finished windows of a run's stages in ``<out>/parts``, one Parquet file each, until ``remove``.

    The folder comes with the first window: a run that ends before has nothing to guard.

    Args:
        out_dir: the run's folder.
        fingerprint: what determines the results, as ``check_target`` takes it.
        window: negatives a file.

    Attributes:
        resumed_rows: rows, of all stages, that were read and not computed.

    Raises:
        FileExistsError: as ``check_target`` does.
        ValueError: the window is below 1.
    """

    def __init__(
        self, out_dir: Path | str, fingerprint: Mapping[str, Any] | None = None, *, window: int = 2048
    ) -> None:
        if window < 1:
            raise ValueError(f"[score] expected a window of at least 1, got {window}")
        self.window, self.resumed_rows = window, 0
        self._out, self._fingerprint = Path(out_dir), fingerprint or {}
        check_target(self._out, self._fingerprint, window=window)
        self._parts = self._out / "parts"
        self._claimed = False
        self._asked: Counter[str] = Counter()
        self._budget: dict[str, int] = {}

    def follow(self, budget: dict[str, int]) -> None:
        """Take up the tokens a batch that an interrupted run found to fit, and keep what this one finds.

        ``budget``: by kind of loop; it is written to, and read before every window is.
        """
        self._budget = budget
        budget.update(read_budget(self._parts))

    def rows(
        self, stage: str, positions: np.ndarray, compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """The columns (n) of the next window of ``stage``, the negatives at ``positions`` (n): read, else computed.

        Raises FileExistsError where other negatives were there.
        """
        file = self._parts / f"{_slug(stage)}-{self._asked[stage]:06d}.parquet"
        self._asked[stage] += 1
        if file.exists():
            table = read_part(file)
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
            if not np.array_equal(columns.pop(_POSITION), positions):
                raise FileExistsError(f"[score] {file} holds scores of other negatives: pass overwrite to start anew")
            self.resumed_rows += len(positions)
            return columns
        columns = dict(compute())
        self._claim()
        table = pa.table({_POSITION: positions, **columns})
        write_atomically(file, lambda temporary: pq.write_table(table, temporary))
        return columns

    def value(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Values by name that JSON can hold: read, else computed."""
        file = self._parts / f"{_slug(name)}.json"
        if file.exists():
            return read_json(file)
        found = compute()
        self._claim()
        write_text(file, json.dumps(found, indent=2))
        return found

    def remove(self) -> None:
        """Forget everything, once the results are on disk."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _claim(self) -> None:
        if not self._claimed:
            claim_parts(self._out, self._fingerprint, self.window)
            self._claimed = True
        write_budget(self._parts, self._budget)


def _slug(name: str) -> str:
    return name.replace(" ", "-")
