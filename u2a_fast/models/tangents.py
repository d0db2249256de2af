"""Parameters with tangents: a model's own forward pass then carries its directional derivative along.

Forward-mode differentiation (Wengert 1964; Pearlmutter 1994) by PyTorch's dual tensors: every operation of the model
answers with its value and its tangent, and nothing is kept for later.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from u2a_fast.models.kinds import Kind, kind_of

__all__ = ["dual_parameters", "has_tangent", "split_dual"]


class _Linear(torch.autograd.Function):
    """A linear layer whose two tangent products add up in place; PyTorch's own rule adds them in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_forward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        shape = (*x.shape[:-1], weight.shape[0])
        if dweight is None:
            dy = nn.functional.linear(dx, weight) if dx is not None else x.new_zeros(shape)
        else:
            dy = nn.functional.linear(x, dweight, dbias)
            if dx is not None:
                dy.view(-1, shape[-1]).addmm_(dx.flatten(0, -2), weight.T)
            return dy
        return dy if dbias is None else dy + dbias


def _linear_forward(module: nn.Module) -> Any:
    return lambda input: _Linear.apply(input, module.weight, module.bias)


@contextmanager
def dual_parameters(model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[None]:
    """Give every parameter named in ``direction`` that entry as its tangent, for the duration of the block.

    The tangent of an embedding's padding row is zero, as its gradient is. Linear layers without a replaced forward run
    through ``_Linear``.

    Args:
        model: left as it was found.
        direction: parameter names of ``model`` -> tangents of the parameters' shapes and dtypes.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    shortened: list[nn.Module] = []
    try:
        with forward_ad.dual_level():
            for module in list(model.modules()):
                for key, p in list(module._parameters.items()):
                    tangent = direction.get(names[id(p)]) if p is not None else None
                    if p is None or tangent is None:
                        continue
                    padding = getattr(module, "padding_idx", None)
                    if kind_of(module) is Kind.EMBEDDING and padding is not None:
                        tangent = tangent.index_fill(0, torch.tensor([padding], device=tangent.device), 0)
                    replaced.append((module, key, p))
                    dual: Any = forward_ad.make_dual(p.detach(), tangent)
                    module._parameters[key] = dual
                if type(module).forward is nn.Linear.forward and "forward" not in vars(module):
                    module.forward = _linear_forward(module)
                    shortened.append(module)
            yield
    finally:
        for module, key, p in replaced:
            module._parameters[key] = p
        for module in shortened:
            del module.forward


def split_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's value and its tangent, None where nothing with a direction led to it."""
    pair = forward_ad.unpack_dual(x)
    return pair.primal, pair.tangent


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` carries a tangent."""
    return forward_ad.unpack_dual(x).tangent is not None
