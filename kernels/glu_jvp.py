"""A gated linear unit and its tangent, one stretch of one row a program.

Computes: y = f(gate) up, dy = f'(gate) dgate up + f(gate) dup; f is SiLU, or GELU by tanh.
Shapes:   gate, up, dgate and, if given, dup (N, I) -> (N, I), (N, I).
Cost:     six matrices of N I elements read or written once, five without dup; bound by memory.
Numerics: fp32, rounded once; sigmoids on both sides of 0 to full relative precision.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import FAMILIES, INTERPRETER, Config, Configs, device_family, inner_contiguous, launch, needs_reference

__all__ = ["CONFIGS", "glu_jvp", "glu_jvp_kernel"]

# 8 elements a thread: one load of 16 bytes each, or two.
CONFIGS: Configs = {
    (family, size): Config({"BLOCK_I": 1024}, num_warps=4, num_stages=1)
    for family in (*FAMILIES, INTERPRETER)
    for size in (2, 4)
}

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh z) / 2 is sigmoid(2 z)
CUBIC = tl.constexpr(0.044715)
BOUND = tl.constexpr(64.0)  # where the sigmoid is 0 or 1 to every digit, far from where the cube overflows


@triton.jit
def glu_jvp_kernel(
    p_gate, p_up, p_dgate, p_dup, p_y, p_dy, s_gate, s_up, s_dgate, s_dup, COLUMNS,
    GELU: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """BLOCK_I columns of one row of y and dy."""
    blocks = tl.cdiv(COLUMNS, BLOCK_I)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < COLUMNS
    b_x = tl.load(p_gate + i_n * s_gate + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_u = tl.load(p_up + i_n * s_up + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_dx = tl.load(p_dgate + i_n * s_dgate + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_z = b_x
    b_inner = b_x
    b_dinner = tl.full([BLOCK_I], 1.0, dtype=tl.float32)
    if GELU:
        b_z = tl.where(b_x > BOUND, BOUND, tl.where(b_x < -BOUND, -BOUND, b_x))
        b_inner = TWICE_ROOT * b_z * (1 + CUBIC * b_z * b_z)
        b_dinner = TWICE_ROOT * (1 + 3 * CUBIC * b_z * b_z)
    b_e = tl.exp(-tl.abs(b_inner))
    b_near = 1 / (1 + b_e)
    b_far = b_e * b_near
    b_there = tl.where(b_inner < 0, b_far, b_near)
    b_back = tl.where(b_inner < 0, b_near, b_far)
    b_value = b_x * b_there
    b_slope = b_there * (1 + b_z * b_back * b_dinner)
    tl.store(p_y + i_n * COLUMNS + o_i, (b_value * b_u).to(p_y.dtype.element_ty), mask=m_i)
    b_dy = b_slope * b_dx * b_u
    if p_dup is not None:
        b_dy += b_value * tl.load(p_dup + i_n * s_dup + o_i, mask=m_i, other=0.0).to(tl.float32)
    tl.store(p_dy + i_n * COLUMNS + o_i, b_dy.to(p_dy.dtype.element_ty), mask=m_i)


def glu_jvp(
    gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor | None = None, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """A gated linear unit and its tangent; see ``reference.glu_jvp``."""
    if needs_reference(gate):
        return reference.glu_jvp(gate, up, dgate, dup, gelu)
    gate, up, dgate = (inner_contiguous(x) for x in (gate, up, dgate))
    dup = None if dup is None else inner_contiguous(dup)
    n, i = gate.shape
    config = CONFIGS[device_family(gate.device), gate.element_size()]
    y, dy = (torch.empty(n, i, dtype=gate.dtype, device=gate.device) for _ in range(2))
    launch(
        glu_jvp_kernel, (n * triton.cdiv(i, config.blocks["BLOCK_I"]),), config,
        p_gate=gate, p_up=up, p_dgate=dgate, p_dup=dup, p_y=y, p_dy=dy, s_gate=gate.stride(0), s_up=up.stride(0),
        s_dgate=dgate.stride(0), s_dup=0 if dup is None else dup.stride(0), COLUMNS=i, GELU=gelu,
    )  # fmt: skip
    return y, dy
