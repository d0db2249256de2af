"""Correctness-gated timings of the ops, of scoring and of its memory; every result is a row under ``results/``."""
