"""One pass over memory for what lies between a decoder's products, in place of the model's own while tangents are
carried: RMS norms, gated linear units, rotary embeddings.

PyTorch answers every elementary operation of theirs with several passes for the tangent; in bfloat16 on CPU that is
half of a forward-mode pass (benchmarks/LOG.md). Each is used where random inputs show that it computes what the model
computes, and where there is a tangent to carry; float64 models, which are there to be exact, keep their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models.gated import gated_form
from u2a_fast.models.norms import rms_norm_form
from u2a_fast.models.parameters import replaced_forwards
from u2a_fast.models.rotary import Rotate, is_whole, replaced_rotaries, turned
from u2a_fast.models.tangents import has_tangent

__all__ = ["fused_op", "fused_tangents"]


def _rms_norm(module: Any, offset: float, eps: float, hidden_states: Tensor) -> Tensor:
    pair = forward_ad.unpack_dual(hidden_states)
    if pair.tangent is None:
        return type(module).forward(module, hidden_states)
    x, dx = (t.flatten(0, -2) for t in pair)
    weight, dweight = forward_ad.unpack_dual(module.weight)
    y, dy = ops.rms_norm_jvp(x, dx, weight.float() + offset, None if dweight is None else dweight.float(), eps)
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


def _rotate(plain: Rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    if not (is_whole(q, cos) and has_tangent(q) and has_tangent(k)):
        return plain(q, k, cos, sin)
    pairs = [[turned(t, cos, sin) for t in forward_ad.unpack_dual(x)] for x in (q, k)]
    return tuple(forward_ad.make_dual(primal, tangent) for primal, tangent in pairs)


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
    with replaced_rotaries(model, _rotate), replaced_forwards(_forwards(model)):
        yield


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        form = rms_norm_form(module)
        gelu = gated_form(module) if form is None else None
        if form is not None:
            yield module, partial(_rms_norm, module, *form)
        elif gelu is not None:
            yield module, partial(_gated, module, gelu)
