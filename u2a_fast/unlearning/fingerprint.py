"""What a run on disk was made of, in one hash, so that nothing resumes a run of something else."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from u2a_fast.store import fingerprint, write_text
from u2a_fast.store.fingerprint import hash_model, hash_plain
from u2a_fast.unlearning.measure import example_of

__all__ = ["check_fingerprint", "hash_examples", "hash_model", "hash_plain"]


def hash_examples(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of token examples (or rows with an ``example``), their order and their ids."""
    return fingerprint.hash_examples({**example_of(row), "id": row.get("id", "")} for row in rows)


def check_fingerprint(path: Path, parts: Mapping[str, str]) -> None:
    """Write ``parts`` to ``path``, or check that an earlier run wrote the same.

    Raises:
        ValueError: an earlier run there had other settings, data or another model.
    """
    if path.exists():
        earlier = json.loads(path.read_text())
        if changed := sorted(key for key in parts if earlier.get(key) != parts[key]):
            raise ValueError(
                f"[resume] {path.parent} holds a run of another {', '.join(changed)}: choose another folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(parts), indent=2) + "\n")
