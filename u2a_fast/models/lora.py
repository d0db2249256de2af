"""LoRA layers with short passes, put in place of PEFT's own while a model is scored.

PEFT computes W x + s B(A x) with a pass over memory for the scale and one for the sum, forward and backward, each over
the layer's output; here the scale goes over A x, which is as narrow as the rank, and the sum into W x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast.models.parameters import replaced_forwards
from u2a_fast.models.tangents import has_tangent

__all__ = ["short_lora"]


class _AddProduct(torch.autograd.Function):
    """out + h W^T in place, value and tangent each by one product that adds."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_forward(h, weight)
        out.view(-1, out.shape[-1]).addmm_(h.flatten(0, -2), weight.T)
        return out

    @staticmethod
    def jvp(ctx: Any, dout: Tensor, dh: Tensor, dweight: Tensor | None) -> Tensor:
        h, weight = ctx.saved_tensors
        rows = dout.view(-1, dout.shape[-1]).addmm_(dh.flatten(0, -2), weight.T)
        if dweight is not None:
            rows.addmm_(h.flatten(0, -2), dweight.T)
        return dout


def _forward(module: Any, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    if args or kwargs or x.dtype != down.weight.dtype:
        return type(module).forward(module, x, *args, **kwargs)
    out = module.base_layer(x)
    thin = down(module.lora_dropout[adapter](x)) * module.scaling[adapter]
    if not _may_change(module.base_layer):
        return out + up(thin)
    if has_tangent(out) and has_tangent(thin) and _may_change(up):
        return _AddProduct.apply(out, thin, up.weight)
    return out.add_(up(thin))


def _may_change(layer: nn.Module) -> bool:
    """Whether this is a plain linear layer whose output nothing else holds or changes."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return not hooks and type(layer).forward is nn.Linear.forward


@torch.no_grad()
def _adapter(module: Any) -> str | None:
    """The one adapter of a LoRA layer that computes W x + s B(A x), None where random inputs show otherwise."""
    if not type(module).__module__.startswith("peft.tuners.lora") or "forward" in vars(module):
        return None
    names: list[str] = list(getattr(module, "active_adapters", ()))
    if len(names) != 1 or names[0] not in getattr(module, "lora_A", {}) or module.disable_adapters or module.merged:
        return None
    if names[0] in getattr(module, "lora_variant", {}):  # DoRA, say, which is the same function at first
        return None
    down, up = module.lora_A[names[0]], module.lora_B[names[0]]
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)) or up.bias is not None:
        return None
    if module.base_layer.weight.is_floating_point() and module.base_layer.weight.dtype != down.weight.dtype:
        return None  # PEFT adds in the wider of the two
    x = torch.randn(4, down.in_features, generator=torch.Generator().manual_seed(0)).to(down.weight)
    want, got = type(module).forward(module, x), _forward(module, names[0], x)
    # a sum of two products, rounded otherwise
    size = want.abs().max() + module.base_layer(x).abs().max()
    return names[0] if (got - want).abs().max() <= 16 * torch.finfo(x.dtype).eps * size else None


@contextmanager
def short_lora(model: nn.Module) -> Iterator[None]:
    """Use ``_forward`` in every LoRA layer of ``model`` that computes it, for the duration of the block.

    Dropout must be off, and adapters must not be switched in the block.
    """
    adapters = ((module, _adapter(module)) for module in model.modules())
    with replaced_forwards((module, partial(_forward, module, name)) for module, name in adapters if name is not None):
        yield
