"""What a run on disk was made of, in one hash, so that nothing resumes a run of something else."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from u2a_fast.data.packing import Example
from u2a_fast.store import write_text
from u2a_fast.unlearning.measure import example_of

__all__ = ["check_fingerprint", "hash_examples", "hash_model", "hash_plain"]

_SAMPLE = 1024  # values of each parameter that are hashed: enough to tell models apart, and free for large ones


def hash_plain(value: Any) -> str:
    """SHA-256 of plain values, through JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_examples(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of token examples (or rows with an ``example``), their order and their ids."""
    digest = hashlib.sha256()
    for row in rows:
        example: Example = example_of(row)
        digest.update(str(row.get("id", "")).encode() + b"\0")
        for key in ("input_ids", "labels"):
            values = torch.as_tensor(example[key]).to("cpu", torch.int64)
            digest.update(len(values).to_bytes(8, "little") + values.numpy().tobytes())
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, shape, precision and first values."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
        if p.is_floating_point():
            digest.update(p.detach().flatten()[:_SAMPLE].double().cpu().numpy().tobytes())
    return digest.hexdigest()


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
