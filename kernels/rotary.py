"""Rotary position embedding, one token a program.

Computes: y = x cosine + rotate(x) sine, rotate((a, b)) = (-b, a) for the halves of a head.
Shapes:   x (N, H, E), cosine and sine (N, E) -> (N, H, E).
Cost:     two tensors of N H E elements read or written once; a token's angles stay in registers for all its heads.
Numerics: fp32, rounded once.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import FAMILIES, INTERPRETER, Config, Configs, device_family, inner_contiguous, launch, needs_reference

__all__ = ["CONFIGS", "rotary", "rotary_kernel"]

CONFIGS: Configs = {
    (family, size): Config({"BLOCK_H": 16, "BLOCK_E": 64}, num_warps=4, num_stages=1)
    for family in (*FAMILIES, INTERPRETER)
    for size in (2, 4)
}


@triton.jit
def rotary_kernel(
    p_x, p_cosine, p_sine, p_y, s_x, s_head, s_cosine, s_sine, HEADS, HALF,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All heads of one token, BLOCK_E features of either half at a time."""
    i_n = tl.program_id(0).to(tl.int64)
    p_x += i_n * s_x
    p_y += i_n * HEADS * HALF * 2
    p_cosine += i_n * s_cosine
    p_sine += i_n * s_sine
    for start in range(0, HALF, BLOCK_E):
        o_e = start + tl.arange(0, BLOCK_E)[None, :]
        m_e = o_e < HALF
        b_cosine_low = tl.load(p_cosine + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_cosine_high = tl.load(p_cosine + HALF + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_sine_low = tl.load(p_sine + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_sine_high = tl.load(p_sine + HALF + o_e, mask=m_e, other=0.0).to(tl.float32)
        for first in range(0, HEADS, BLOCK_H):
            o_h = first + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
            mask = (o_h < HEADS) & m_e
            b_low = tl.load(p_x + o_h * s_head + o_e, mask=mask, other=0.0).to(tl.float32)
            b_high = tl.load(p_x + o_h * s_head + HALF + o_e, mask=mask, other=0.0).to(tl.float32)
            b_first = b_low * b_cosine_low - b_high * b_sine_low
            b_second = b_high * b_cosine_high + b_low * b_sine_high
            o_y = o_h * HALF * 2 + o_e
            tl.store(p_y + o_y, b_first.to(p_y.dtype.element_ty), mask=mask)
            tl.store(p_y + HALF + o_y, b_second.to(p_y.dtype.element_ty), mask=mask)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding; see ``reference.rotary``."""
    if needs_reference(x):
        return reference.rotary(x, cosine, sine)
    x, cosine, sine = (inner_contiguous(tensor) for tensor in (x, cosine, sine))
    n, heads, e = x.shape
    config = CONFIGS[device_family(x.device), x.element_size()]
    y = torch.empty(n, heads, e, dtype=x.dtype, device=x.device)
    launch(
        rotary_kernel, (n,), config,
        p_x=x, p_cosine=cosine, p_sine=sine, p_y=y, s_x=x.stride(0), s_head=x.stride(1), s_cosine=cosine.stride(0),
        s_sine=sine.stride(0), HEADS=heads, HALF=e // 2,
    )  # fmt: skip
    return y
