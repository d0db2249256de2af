"""Which batches were found to fit in memory, for the run that goes on: the same batches give the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path

from u2a_fast.store.files import read_json, write_text

__all__ = ["read_budget", "write_budget"]

FILE = "budget.json"


def read_budget(folder: Path) -> dict[str, int]:
    """Tokens a batch by kind of loop, as an unfinished run in ``folder`` found them; empty where none did."""
    path = folder / FILE
    return read_json(path) if path.exists() else {}


def write_budget(folder: Path, found: Mapping[str, int]) -> None:
    """Keep ``found`` in ``folder``, before any result that was made with it."""
    if read_budget(folder) != dict(found):
        write_text(folder / FILE, json.dumps(dict(found), indent=2) + "\n")
