"""Correctness-gated timings of the ops, of scoring and of its memory; every result is a row under ``results/``."""

from pathlib import Path

__all__ = ["ROOT"]

ROOT = Path(__file__).resolve().parents[1]
