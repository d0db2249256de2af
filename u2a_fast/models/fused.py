"""One pass over memory for what lies between a decoder's products, in place of the model's own while tangents are
carried: RMS norms, gated linear units, rotary embeddings.

PyTorch answers every elementary operation of theirs with several passes for the tangent; in bfloat16 on CPU that is
half of a forward-mode pass (benchmarks/LOG.md). Each is used where random inputs show that it computes what the model
computes, and where there is a tangent to carry; float64 models, which are there to be exact, keep their own.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models.gated import gated_form
from u2a_fast.models.norms import rms_norm_form
from u2a_fast.models.parameters import replaced_forwards
from u2a_fast.models.probe import agree, noise
from u2a_fast.models.tangents import has_tangent

__all__ = ["fused_op", "fused_tangents"]

_ROTARY = "apply_rotary_pos_emb"


def _rms_norm(module: Any, offset: float, eps: float, hidden_states: Tensor) -> Tensor:
    pair = forward_ad.unpack_dual(hidden_states)
    if pair.tangent is None:
        return type(module).forward(module, hidden_states)
    x, dx = (t.flatten(0, -2) for t in pair)
    scale = forward_ad.unpack_dual(module.weight.float() + offset)
    y, dy = ops.rms_norm_jvp(x, dx, scale.primal, scale.tangent, eps)
    shape = hidden_states.shape
    return forward_ad.make_dual(y.view(shape), dy.view(shape))


def _gated(module: Any, gelu: bool, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    gates, ups = forward_ad.unpack_dual(gate), forward_ad.unpack_dual(up)
    if gates.tangent is None or ups.tangent is None:
        return module.down_proj(module.act_fn(gate) * up)
    rows = [t.flatten(0, -2) for t in (gates.primal, ups.primal, gates.tangent, ups.tangent)]
    y, dy = ops.glu_jvp(rows[0], rows[1], rows[2], rows[3], gelu)
    return module.down_proj(forward_ad.make_dual(y.view(gate.shape), dy.view(gate.shape)))


def _rotate(plain: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    whole = q.shape[0] == 1 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]  # some models turn a part of a head
    if not (whole and has_tangent(q) and has_tangent(k)):
        return plain(q, k, cos, sin)
    out = []
    for x in (q, k):
        pair = forward_ad.unpack_dual(x)
        turned = [ops.rotary(t[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for t in pair]
        out.append(forward_ad.make_dual(turned[0], turned[1]))
    return tuple(out)


@torch.no_grad()
def _rotary_function(namespace: Any, like: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The namespace's rotary function through ``rotary``, None where it computes something else."""
    plain = getattr(namespace, _ROTARY, None)
    if plain is None:
        return None
    q, angles = noise(1, 2, 5, 8, like=like), noise(1, 5, 4, like=like)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    try:
        want = plain(q, q, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError):  # another signature
        return None
    got = ops.rotary(q[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None]
    if want.shape != got.shape or not agree(got, want):
        return None
    return partial(_rotate, plain)


def fused_op(module: nn.Module) -> str | None:
    """The op that carries this module's tangent inside ``fused_tangents``, None where it is PyTorch's own rules."""
    forward = vars(module).get("forward")
    names = {_rms_norm: "rms_norm_jvp", _gated: "glu_jvp"}
    return names.get(forward.func) if isinstance(forward, partial) else None


@contextmanager
def fused_tangents(model: nn.Module) -> Iterator[None]:
    """Carry tangents through norms, gated units and rotary embeddings in one pass each, for the duration of the block.

    Weights must not change in the block. Modules whose forward was replaced already are left alone.
    """
    with _fused_rotaries(model), replaced_forwards(_forwards(model)):
        yield


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Modules that may be replaced, each with one of its parameters."""
    for module in model.modules():
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        if like is not None and like.dtype != torch.float64 and "forward" not in vars(module):
            yield module, like


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        form = rms_norm_form(module)
        gelu = gated_form(module) if form is None else None
        if form is not None:
            yield module, partial(_rms_norm, module, *form)
        elif gelu is not None:
            yield module, partial(_gated, module, gelu)


@contextmanager
def _fused_rotaries(model: nn.Module) -> Iterator[None]:
    plain: dict[Any, Any] = {}
    try:
        for module, like in _candidates(model):
            namespace = sys.modules.get(type(module).__module__)
            if hasattr(namespace, _ROTARY) and namespace not in plain:
                plain[namespace] = getattr(namespace, _ROTARY)
                setattr(namespace, _ROTARY, _rotary_function(namespace, like) or plain[namespace])
        yield
    finally:
        for namespace, function in plain.items():
            setattr(namespace, _ROTARY, function)
