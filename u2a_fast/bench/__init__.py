"""Correctness-gated timings of the ops on this machine: cases, contestants, result rows."""
