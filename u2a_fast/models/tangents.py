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
from u2a_fast.models.parameters import parameter_names, replaced_forwards
from u2a_fast.models.quantized import is_dequantizable, is_quantized

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


class _Quantized(torch.autograd.Function):
    """A layer confirmed to be y = W x + b whose weight is stored as integers and fixed: its tangent is W dx + db."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module, ctx.bias = module, bias
        y = type(module).forward(module, x)
        ctx.shape = y.shape
        return y

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dbias: Tensor | None, _: None) -> Tensor:
        if dx is None:
            assert dbias is not None, "one of the two has a tangent"
            return dbias.expand(ctx.shape).clone()
        dy = type(ctx.module).forward(ctx.module, dx)
        dy = dy if ctx.bias is None else dy - ctx.bias
        return dy if dbias is None else dy + dbias


def _quantized_forward(module: nn.Module) -> Any:
    """The layer with its tangent, where random inputs confirm that it has one; else NotImplementedError."""
    _confirm_linear(module)
    return lambda x: _Quantized.apply(x, getattr(module, "bias", None), module)


@torch.no_grad()
def _confirm_linear(module: Any) -> None:
    """Raise NotImplementedError for a layer that is not W x + b: one that rounds its input, say."""
    dtypes = [t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, module.in_features, generator=generator).to(module.weight.device, next(iter(dtypes), None))
    own, bias = type(module).forward, getattr(module, "bias", None)
    first, second, both = (own(module, rows[None]) for rows in (*x, x.sum(0)))
    size = first.abs().max() + second.abs().max()
    error = (first + second - both - (0 if bias is None else bias)).abs().max()
    # rounding of the inputs' sum and of three products' sums
    if not error <= 16 * torch.finfo(x.dtype).eps * size:
        raise NotImplementedError(
            f"[forward] expected quantized layers that are linear in their input, got a {type(module).__name__} "
            f"(off by {float(error / size):.1e}): one that rounds its input is a step function"
        )


def _linear_forward(module: nn.Module) -> Any:
    return lambda input: _Linear.apply(input, module.weight, module.bias)


class DualParameters:
    """A direction prepared once as the tangents of a model's parameters, for many passes.

    The tangent of an embedding's padding row is zero, as its gradient is. Linear layers without a replaced forward run
    through ``_Linear``, those of integer weights, which no direction changes, through ``_Quantized`` (bitsandbytes' own
    have a tangent of theirs, ``models/quantized.py``).

    Args:
        model: left as it was found.
        direction: parameter names of ``model`` -> tangents of the parameters' shapes and dtypes.

    Raises:
        NotImplementedError: a quantized layer is not linear in its input.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self.direction = direction
        self._sites: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
        self._linears = [(m, _linear_forward(m)) for m in model.modules() if type(m).forward is nn.Linear.forward]
        unknown = (m for m in model.modules() if is_quantized(m) and not is_dequantizable(m))
        self._linears += [(m, _quantized_forward(m)) for m in unknown]
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

    @property
    def modules(self) -> list[nn.Module]:
        """Modules that hold a parameter with a tangent, each once."""
        return list(dict.fromkeys(module for module, *_ in self._sites))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The parameters carry their tangents for the duration of the block."""
        shortened = [pair for pair in self._linears if "forward" not in vars(pair[0])]
        try:
            with forward_ad.dual_level(), replaced_forwards(shortened):
                for module, key, p, tangent in self._sites:
                    dual: Any = forward_ad.make_dual(p.detach(), tangent)
                    module._parameters[key] = dual
                yield
        finally:
            for module, key, p, _ in self._sites:
                module._parameters[key] = p


def split_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor's value and its tangent, None where nothing with a direction led to it."""
    pair = forward_ad.unpack_dual(x)
    return pair.primal, pair.tangent


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` carries a tangent."""
    return forward_ad.unpack_dual(x).tangent is not None
