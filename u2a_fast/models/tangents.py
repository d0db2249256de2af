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
from u2a_fast.models.parameters import parameter_names

__all__ = ["DualParameters", "has_tangent", "split_dual"]


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


class DualParameters:
    """A direction prepared once as the tangents of a model's parameters, for many passes.

    The tangent of an embedding's padding row is zero, as its gradient is. Linear layers without a replaced forward run
    through ``_Linear``.

    Args:
        model: left as it was found.
        direction: parameter names of ``model`` -> tangents of the parameters' shapes and dtypes.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self.direction = direction
        self._sites: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
        self._linears = [module for module in model.modules() if type(module).forward is nn.Linear.forward]
        names = parameter_names(model)
        for module in model.modules():
            padding = getattr(module, "padding_idx", None) if kind_of(module) is Kind.EMBEDDING else None
            for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
                tangent = direction.get(names[id(p)])
                if tangent is None:
                    continue
                if padding is not None:
                    tangent = tangent.index_fill(0, torch.tensor([padding], device=tangent.device), 0)
                self._sites.append((module, key, p, tangent))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The parameters carry their tangents for the duration of the block."""
        shortened = [module for module in self._linears if "forward" not in vars(module)]
        try:
            with forward_ad.dual_level():
                for module, key, p, tangent in self._sites:
                    dual: Any = forward_ad.make_dual(p.detach(), tangent)
                    module._parameters[key] = dual
                for module in shortened:
                    module.forward = _linear_forward(module)
                yield
        finally:
            for module, key, p, _ in self._sites:
                module._parameters[key] = p
            for module in shortened:
                module.__dict__.pop("forward", None)


def split_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's value and its tangent, None where nothing with a direction led to it."""
    pair = forward_ad.unpack_dual(x)
    return pair.primal, pair.tangent


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` carries a tangent."""
    return forward_ad.unpack_dual(x).tangent is not None
