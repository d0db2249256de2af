"""Gated linear units, down(act(gate x) * up x): which a model has, and a short backward pass for them.

Autograd answers the two elementary operations with three passes over fresh memory and keeps the activation for them:
on a small model with one direction, that costs a tenth of a forward pass (benchmarks/LOG.md). Here both gradients take
one pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models.parameters import replaced_forwards
from u2a_fast.models.probe import agree, noise

__all__ = ["gated_form", "short_gated_units"]


class _GatedUnit(torch.autograd.Function):
    """y = act(gate) up, with act GELU by tanh or SiLU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activation(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        x, grad_y, u = (part.reshape(-1, gate.shape[-1]) for part in (gate, grad, up))
        grad_up, grad_gate = ops.glu_jvp(x, grad_y, u, gelu=ctx.gelu)  # its value and tangent
        return grad_gate.view_as(gate), grad_up.view_as(up), None


def _activation(gate: Tensor, gelu: bool) -> Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


def _apply(module: Any, gelu: bool, x: Tensor) -> Tensor:
    return module.down_proj(_GatedUnit.apply(module.gate_proj(x), module.up_proj(x), gelu))


@torch.no_grad()
def gated_form(module: Any) -> bool | None:
    """Whether a gated unit has GELU by tanh (True) or SiLU (False); None where random inputs show that it is neither.

    Modules whose forward was replaced, and those in float64, which are there to be exact, are neither.
    """
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    gate, up, down, activation = parts
    if "forward" in vars(module) or not all(isinstance(part, nn.Module) for part in parts):
        return None
    if type(activation).__module__ not in ("transformers.activations", "torch.nn.modules.activation"):
        return None
    if activation._forward_hooks or activation._forward_pre_hooks or "forward" in vars(activation):
        return None
    features = getattr(up, "in_features", None)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if not isinstance(features, int) or like is None or like.dtype == torch.float64:
        return None
    x = noise(4, features, like=like) * like.new_tensor([[1], [4], [16], [64]])  # some models clip what is large
    z, u = gate(x), up(x)
    own = type(module).forward(module, x)
    for gelu in (False, True):
        y = _activation(z, gelu) * u
        if agree(y, activation(z) * u) and agree(down(y), own):
            return gelu
    return None


@contextmanager
def short_gated_units(model: nn.Module) -> Iterator[None]:
    """Use ``_GatedUnit`` in every gated unit of ``model`` that computes it, for the duration of the block."""
    found = ((module, gated_form(module)) for module in model.modules())
    with replaced_forwards((module, partial(_apply, module, gelu)) for module, gelu in found if gelu is not None):
        yield
