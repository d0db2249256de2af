"""u2a_fast by its public interface; a mode of the scorer is a contestant where this version has it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.task import Scorer, Task, linears, mean_nll, ordered
from u2a_fast import DirectionalDerivatives, ops
from u2a_fast.influence.routes import MODES


def modes() -> tuple[str, ...]:
    """Names that ``DirectionalDerivatives`` takes as its mode in this version."""
    return MODES


def _scorer(task: Task, **options: Any) -> Scorer:
    model, direction = task.model, task.direction
    # user code: reverse forward lowrank reverse_bf16 forward_bf16 lowrank_bf16
    score = DirectionalDerivatives(model, direction, **options)
    # end
    return score


reverse, forward, lowrank = (partial(_scorer, mode=mode) for mode in ("reverse", "forward", "lowrank"))
reverse_bf16, forward_bf16, lowrank_bf16 = (
    partial(_scorer, mode=mode, dtype=torch.bfloat16) for mode in ("reverse", "forward", "lowrank")
)


def ghost_norm(task: Task) -> Scorer:
    """Squared gradient norms over all linears by the op, on the same padded batches as its peer's."""
    model, layers = task.model.requires_grad_(False), list(linears(task.model).values())
    # user code: ghost_norm
    squares: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        x = inputs[0].flatten(0, 1)
        offsets = torch.arange(0, len(x) + 1, inputs[0].shape[1], dtype=torch.int32)
        out.register_hook(lambda g: squares.append(ops.ghost_norm(x.detach(), g.flatten(0, 1), offsets)))

    for layer in layers:
        layer.register_forward_hook(hook)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())

    def norms(ids: Tensor, labels: Tensor) -> Tensor:
        squares.clear()
        mean_nll(model(ids, use_cache=False).logits, labels).sum().backward()
        return torch.stack(squares).sum(0)

    # end
    return lambda examples: ordered(task, examples, norms)
