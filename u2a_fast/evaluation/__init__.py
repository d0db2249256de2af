"""Evaluation: preference, forgetting and utility of a model, with intervals."""

from u2a_fast.evaluation.metrics import evaluate, mean_nll

__all__ = ["evaluate", "mean_nll"]
