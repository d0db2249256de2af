"""Two-sided projections of the linears' gradients, re-expressed from the papers: LoGra and factorised GraSS.

LoGra (arXiv:2405.13954) projects inputs and output gradients by random matrices before their outer product. FactGraSS
(arXiv:2505.18976) keeps random coordinates of both instead, and sketches the outer product by a sparse
Johnson-Lindenstrauss transform. Either way the direction is projected alike, and the inner product of the projections
estimates that of the gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers.task import Scorer, Task, linears, mean_nll, ordered

RANK = 64
SKETCH = 1024

Side = Callable[[Tensor], Tensor]  # (..., width) -> (..., RANK)


def _projected(task: Task, sides: Callable[[nn.Linear], tuple[Side, Side]], sketches: Callable[[int], Side]) -> Scorer:
    model = task.model.requires_grad_(False)
    # user code: logra grass grass_sjlt
    parts: list[Tensor] = []

    def watch(layer: nn.Linear, v: Tensor) -> None:
        left, right = sides(layer)
        kept = right(left(v.T).T).flatten()
        sketch = sketches(len(kept))
        wanted = sketch(kept)

        def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
            x = right(inputs[0].detach())
            out.register_hook(lambda g: parts.append(sketch((left(g).mT @ x).flatten(1)) @ wanted))

        layer.register_forward_hook(hook)

    for name, layer in linears(model).items():
        watch(layer, task.direction[f"{name}.weight"])
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())

    def scores(ids: Tensor, labels: Tensor) -> Tensor:
        parts.clear()
        mean_nll(model(ids, use_cache=False).logits, labels).sum().backward()
        return torch.stack(parts).sum(0)

    # end
    return lambda examples: ordered(task, examples, scores)


def logra(task: Task) -> Scorer:
    """Gaussian matrices on both sides, no sketch."""

    # user code: logra
    def sides(layer: nn.Linear) -> tuple[Side, Side]:
        out, inside = ((torch.randn(width, RANK) / RANK**0.5).to(layer.weight) for width in layer.weight.shape)
        return (lambda g: g @ out), (lambda x: x @ inside)

    return _projected(task, sides, lambda size: lambda flat: flat)
    # end


# user code: grass grass_sjlt
def _coordinates(layer: nn.Linear) -> tuple[Side, Side]:
    out, inside = (torch.randperm(width)[:RANK].to(layer.weight.device) for width in layer.weight.shape)
    return (lambda g: g[..., out]), (lambda x: x[..., inside])


# end
def grass(task: Task) -> Scorer:
    """Random coordinates on both sides, then a sparse sketch with one entry a column, in PyTorch."""

    # user code: grass
    def sketches(size: int) -> Side:
        row, sign = torch.randint(SKETCH, (size,)).to(task.device), torch.randint(2, (size,)) * 2.0 - 1
        sign = sign.to(task.model.get_input_embeddings().weight)
        return lambda flat: flat.new_zeros(*flat.shape[:-1], SKETCH).index_add_(-1, row, flat * sign)

    return _projected(task, _coordinates, sketches)
    # end


def grass_sjlt(task: Task) -> Scorer:
    """The same with the sketch of the authors' CUDA package."""
    # user code: grass_sjlt
    from sjlt import SJLTProjection  # in this contestant's environment only

    def sketches(size: int) -> Side:
        sketch = SJLTProjection(size, SKETCH, 1)
        return lambda flat: sketch(flat.reshape(-1, size)).reshape(*flat.shape[:-1], SKETCH)

    return _projected(task, _coordinates, sketches)
    # end
