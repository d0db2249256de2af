"""The embedded default: a corpus whose truth is known, a model trained on the spot, and what unlearning does to it."""

from u2a_fast.demo.run import run

__all__ = ["run"]
