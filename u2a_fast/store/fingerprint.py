"""Hashes of what a result on disk was made of: plain values, token examples, models."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["hash_examples", "hash_model", "hash_plain"]

_SAMPLE = 1024  # values of each parameter that are hashed: enough to tell models apart, and free for large ones


def hash_plain(value: Any) -> str:
    """SHA-256 of plain values, through JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_examples(examples: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of token examples, their order and their ids."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(str(example.get("id", "")).encode() + b"\0")
        for key in ("input_ids", "labels"):
            values = torch.as_tensor(example[key]).to("cpu", torch.int64)
            digest.update(len(values).to_bytes(8, "little") + values.numpy().tobytes())
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, shape, precision and first values."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
        digest.update(p.detach().flatten()[:_SAMPLE].double().cpu().numpy().tobytes())
    return digest.hexdigest()
