"""What scores should be, by per-example autograd in a higher precision, and how far a contestant's are from it."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines import norm_error, score_error
from benchmarks.peers.contestants import Contestant
from benchmarks.peers.task import Task, linears, mean_nll
from u2a_fast.statistics import spearman

__all__ = ["AGREEMENT", "HALF_AGREEMENT", "judge", "truths"]

AGREEMENT = 1e-4  # float32 scores, of each exact score, or of their median magnitude where one is smaller
HALF_AGREEMENT = 6e-2  # scores of a model in half precision, of their norm


def truths(task: Task, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Derivatives over "all" parameters and over the "linears", and squared gradient "norms" over the linears, (N).

    By autograd in ``dtype`` on the task's device; the values are float64, on the CPU.
    """
    model = copy.deepcopy(task.model).to(dtype).requires_grad_(True)
    weights = dict(model.named_parameters())
    tracked = {f"{name}.weight" for name in linears(model)}
    found: dict[str, list[Tensor]] = {"all": [], "linears": [], "norms": []}
    for example in task.examples:
        ids, labels = (torch.tensor([example[key]], device=task.device) for key in ("input_ids", "labels"))
        loss = mean_nll(model(ids, use_cache=False).logits, labels)[0]
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        parts = {name: (g * task.direction[name]).sum().double() for name, g in gradients.items()}
        found["all"].append(torch.stack(list(parts.values())).sum())
        found["linears"].append(torch.stack([part for name, part in parts.items() if name in tracked]).sum())
        found["norms"].append(
            torch.stack([g.square().sum().double() for name, g in gradients.items() if name in tracked]).sum()
        )
    return {what: torch.stack(values).cpu() for what, values in found.items()}


def judge(contestant: Contestant, scores: Sequence[float], truth: dict[str, Tensor]) -> dict[str, Any]:
    """Pearson and Spearman correlation with what it may be compared with, and its error against its own truth."""
    if not contestant.truth:
        return {}
    found = torch.tensor(scores, dtype=torch.float64)
    names = ["norms"] if contestant.truth == "norms" else ["all", "linears"]
    exact = {name: truth[name][: len(found)] for name in names}
    if not bool(found.isfinite().all()):
        raise ValueError("its scores are not finite")
    return {
        "truth": contestant.truth,
        "relative_error": score_error(found, exact[contestant.truth]),
        "norm_error": norm_error(found, exact[contestant.truth]),
        "pearson": {name: float(np.corrcoef(found, values)[0, 1]) for name, values in exact.items()},
        "spearman": {name: spearman(found.numpy(), values.numpy()) for name, values in exact.items()},
    }
