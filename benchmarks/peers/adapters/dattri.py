"""dattri: its TracIn attributor, without projection and with its default one.

The target function is linear in the parameters, so that its gradient is the direction itself: the cheapest query that
the attributor accepts.
"""

from collections.abc import Sequence

import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from benchmarks.peers.task import BATCH, Example, Scorer, Task, batches, mean_nll


def _tracin(task: Task, projected: bool) -> Scorer:
    model, direction = task.model, task.direction

    # user code: unprojected projected
    def loss(weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        ids, labels = (x[None] for x in data)
        return mean_nll(functional_call(model, weights, (ids,), {"use_cache": False}).logits, labels)[0]

    def target(weights: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        return sum((weights[name] * v).sum() for name, v in direction.items())

    job = AttributionTask(loss, model, model.state_dict(), target_func=target)
    attributor = TracInAttributor(job, torch.ones(1), normalized_grad=False)
    if not projected:
        attributor.projector_kwargs = None  # given to the constructor, None means its default projection
    query = DataLoader([(torch.zeros(1), torch.zeros(1))], batch_size=1)

    def score(examples: Sequence[Example]) -> Tensor:
        out = torch.empty(len(examples))
        for positions, ids, labels in batches(examples):
            loader = DataLoader(list(zip(ids, labels, strict=True)), batch_size=BATCH)
            out[positions] = attributor.attribute(loader, query)[:, 0]
        return out

    # end
    return score


def unprojected(task: Task) -> Scorer:
    """Per-example gradients of all parameters by vmap."""
    return _tracin(task, projected=False)


def projected(task: Task) -> Scorer:
    """The same projected to 512 dimensions, as it does by default."""
    return _tracin(task, projected=True)
