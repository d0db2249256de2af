"""Attention that carries tangents and gradients, for any transformers model: ``attn_implementation="u2a_fast"``.

PyTorch's fused attention has neither forward-mode nor double-backward derivatives, so that ``torch.func.jvp`` of a
model needs ``"eager"`` and its T x T matrices; here the op's own tangent serves.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from u2a_fast import ops

__all__ = ["NAME", "attend", "refuse_what_is_not_understood"]

NAME = "u2a_fast"
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "alibi", "head_mask", "attention_bias", "relative_position")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """First output of ``ops.attention``, with a tangent where an input has one; shapes are those of that op."""
    options = (cu_seqlens, parent, scale, window, softcap)
    pairs = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    if all(pair.tangent is None for pair in pairs):
        return ops.attention(q, k, v, *options)[0]
    q, k, v = (pair.primal for pair in pairs)
    dq, dk, dv = (torch.zeros_like(pair.primal)[None] if pair.tangent is None else pair.tangent[None] for pair in pairs)
    out, _, dout = ops.attention_jvp(q, k, v, dq, dk, dv, *options)
    return forward_ad.make_dual(out, dout[0])


def refuse_what_is_not_understood(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise NotImplementedError for attention that is not causal softmax attention (biases, sinks, both ways)."""
    unsupported = [name for name in _UNSUPPORTED if options.get(name) is not None]
    causal = options.get("is_causal")
    if unsupported or not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f"[attention] {type(module).__name__} asks for {unsupported or 'no causality'}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention signature: query (B, H, T, E), key and value (B, G, T, E) -> (B, T, H, F).

    ``attention_mask`` is None or (B, T), true at real tokens: padding, on either side, attends to nothing and yields
    zeros.
    """
    refuse_what_is_not_understood(module, options)
    batch, _, length, size = query.shape
    if dropout:
        raise NotImplementedError(f"[attention] expected no dropout, got {dropout}: model.eval(), or another attention")
    if key.shape[2] != length:
        raise NotImplementedError(
            f"[attention] expected as many keys as queries ({length}), got {key.shape[2]}: pass use_cache=False, or "
            "use another attention to generate"
        )
    scale = size**-0.5 if scaling is None else scaling
    window, softcap = options.get("sliding_window") or 0, options.get("softcap") or 0.0
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if attention_mask is None:
        given = options.get("cu_seq_lens_q")  # batches that a collator has flattened to one row
        ends = torch.arange(0, batch * length + 1, max(length, 1), device=query.device) if given is None else given
        out = attend(q, k, v, ends.to(torch.int32), None, scale, window, softcap)
    else:
        real = attention_mask.bool()
        where = real.flatten().nonzero()[:, 0]
        counts = torch.cat([real.new_zeros(1, dtype=torch.int32), real.sum(1).cumsum(0, dtype=torch.int32)])
        found = attend(q[where], k[where], v[where], counts, None, scale, window, softcap)
        out = torch.zeros(batch * length, *found.shape[1:], dtype=found.dtype, device=found.device)
        out = out.index_add(0, where, found)
    return out.unflatten(0, (batch, length)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)
