"""opacus: per-example gradient norms by ghost clipping, over all linear layers below the head."""

from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor

from benchmarks.peers.task import Scorer, Task, linears, mean_nll, ordered


def ghost_norm(task: Task) -> Scorer:
    """Squared norms; a tied embedding, which it refuses, is left out."""
    # user code: ghost_norm
    task.model.requires_grad_(False)
    for layer in linears(task.model).values():
        layer.weight.requires_grad_(True)
    wrapped = GradSampleModuleFastGradientClipping(task.model, loss_reduction="sum", strict=False)
    wrapped.train()

    def norms(ids: Tensor, labels: Tensor) -> Tensor:
        mean_nll(wrapped(ids, use_cache=False).logits, labels).sum().backward()
        found = wrapped.get_norm_sample().square()
        wrapped.zero_grad()
        return found

    # end
    return lambda examples: ordered(task, examples, norms)
