"""traker: its BasicProjector on per-example gradients, which the user computes by vmap(grad); 64 dimensions."""

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from trak.projectors import BasicProjector, ProjectionType

from benchmarks.peers.task import Scorer, Task, mean_nll, ordered

DIMENSION = 64  # its time is in proportion


def basic_projector(task: Task) -> Scorer:
    """Every projection of a batch generates its whole random matrix anew, so batches are large."""
    model, direction = task.model, task.direction
    # user code: basic_projector
    weights = {name: p.detach() for name, p in model.named_parameters()}
    size = sum(p.numel() for p in weights.values())
    projector = BasicProjector(size, DIMENSION, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=16)
    wanted = projector.project({name: direction[name][None] for name in weights}, 0)[0] / DIMENSION

    def nll(w: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return mean_nll(functional_call(model, w, (ids[None],), {"use_cache": False}).logits, labels[None])[0]

    def derivatives(ids: Tensor, labels: Tensor) -> Tensor:
        return projector.project(vmap(grad(nll), in_dims=(None, 0, 0))(weights, ids, labels), 0) @ wanted

    # end
    return lambda examples: ordered(task, examples, derivatives, size=16)
