"""P_out^T G_i P_in without per-example gradients: two thin products, then their outer product, all in registers.

Computes: out[i] = sum over the tokens t of example i of (P_out^T g_t) (P_in^T a_t)^T.
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1), p_in (I, P), p_out (O, Q) -> (B, Q, P).
Cost:     2 N (I P + O Q + P Q) flops up to 64 x 64, beyond it the thin products once a tile of the result; one partial
          result per BLOCK_T tokens of an example passes through memory, so that few long examples fill a device too.
Numerics: fp32 accumulation, no atomics: an example's partials are added in fixed order. The outer products of fp32
          values take three TF32 products on NVIDIA GPUs (Ootomo and Yokota 2022, arXiv:2203.03341), as exact as fp32.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import matmul_columns

__all__ = ["CONFIGS", "grad_project", "part_sum_kernel", "project_kernel"]

PART_SUM_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def _config(t: int, depth: int, side: int, warps: int, stages: int) -> Config:
    """``side``: most rows and columns of a tile of the result."""
    return Config({"BLOCK_T": t, "BLOCK_DEPTH": depth, "SIDE": side}, warps, stages)


CONFIGS: Configs = {
    ("sm_80", 2): _config(64, 64, 64, 4, 3),
    ("sm_80", 4): _config(32, 16, 64, 4, 3),
    ("sm_90", 2): _config(64, 64, 64, 4, 4),
    ("sm_90", 4): _config(32, 16, 64, 4, 3),
    ("sm_100", 2): _config(128, 64, 64, 8, 4),
    ("sm_100", 4): _config(32, 16, 64, 4, 3),
    ("gfx942", 2): _config(64, 32, 64, 4, 2),
    ("gfx942", 4): _config(32, 16, 64, 4, 2),
    (INTERPRETER, 2): _config(32, 64, 64, 4, 1),
    (INTERPRETER, 4): _config(32, 64, 64, 4, 1),
}


@triton.jit
def project_kernel(
    p_a, p_g, p_in, p_out, p_cu_seqlens, p_example, p_first, p_parts, s_a, s_g, s_in, s_out, B, OUT, IN, P, Q,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_DEPTH: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """parts[part] = sum over the part's tokens of (P_out^T g_t) (P_in^T a_t)^T; a program per part and tile of it."""
    i_part = tl.program_id(0)
    i_b = tl.load(p_example + i_part)
    if i_b >= B:  # the grid covers the most parts that N tokens of B examples can have
        return
    start_p = tl.program_id(1) * BLOCK_P
    start_q = tl.program_id(2) * BLOCK_Q
    begin = tl.load(p_cu_seqlens + i_b) + (i_part - tl.load(p_first + i_b)) * BLOCK_T
    end = tl.load(p_cu_seqlens + i_b + 1)
    o_p = start_p + tl.arange(0, BLOCK_P)
    o_q = start_q + tl.arange(0, BLOCK_Q)
    b_x = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.float32)
    b_x = matmul_columns(b_x, p_a, p_in, o_p, o_p < P, begin, s_a, s_in, end, IN, BLOCK_T, BLOCK_DEPTH)
    b_y = tl.zeros([BLOCK_T, BLOCK_Q], dtype=tl.float32)
    b_y = matmul_columns(b_y, p_g, p_out, o_q, o_q < Q, begin, s_g, s_out, end, OUT, BLOCK_T, BLOCK_DEPTH)
    b_part = tl.dot(tl.trans(b_y), b_x, input_precision=OUTER)
    place = i_part.to(tl.int64) * Q * P + (o_q[:, None] * P + o_p[None, :])
    tl.store(p_parts + place, b_part, mask=(o_q < Q)[:, None] & (o_p < P)[None, :])


@triton.jit
def part_sum_kernel(p_parts, p_first, p_out, SIZE, BLOCK: tl.constexpr):
    """out[i] = sum of the parts of example i, in order; a program per example and BLOCK entries."""
    i_b = tl.program_id(0)
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for i_part in range(tl.load(p_first + i_b), tl.load(p_first + i_b + 1)):
        acc += tl.load(p_parts + tl.cast(i_part, tl.int64) * SIZE + o_e, mask=o_e < SIZE, other=0.0)
    tl.store(p_out + i_b.to(tl.int64) * SIZE + o_e, acc, mask=o_e < SIZE)


def grad_project(a: Tensor, g: Tensor, cu_seqlens: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    """P_out^T G_i P_in for every example i; see ``reference.grad_project``."""
    if needs_reference(a):
        return reference.grad_project(a, g, cu_seqlens, p_in, p_out)
    (n, b), (i, p), (o, q) = (a.shape[0], cu_seqlens.shape[0] - 1), p_in.shape, p_out.shape
    a, g, p_in, p_out = aligned(a), aligned(g), aligned(p_in), aligned(p_out)
    family = device_family(a.device)
    config = CONFIGS[family, a.element_size()]
    # Without a matrix unit for fp32 the operands of a product this deep do not fit the registers.
    outer = "tf32x3" if family.startswith("sm") else "ieee"
    block_t, side = config.blocks["BLOCK_T"], config.blocks["SIDE"]
    block_p, block_q = (max(16, min(side, triton.next_power_of_2(x))) for x in (p, q))
    # Parts start at the example's own first token: a result does not depend on its place in the batch.
    first = torch.nn.functional.pad(((cu_seqlens.diff() + block_t - 1) // block_t).cumsum(0), (1, 0)).to(torch.int32)
    parts = n // block_t + b
    example = torch.bucketize(torch.arange(parts, device=a.device), first[1:], right=True, out_int32=True)
    partial = torch.empty(parts, q, p, dtype=torch.float32, device=a.device)
    out = torch.empty(b, q, p, dtype=torch.float32, device=a.device)
    launch(
        project_kernel, (parts, triton.cdiv(p, block_p), triton.cdiv(q, block_q)), config,
        p_a=a, p_g=g, p_in=p_in, p_out=p_out, p_cu_seqlens=cu_seqlens.contiguous(), p_example=example, p_first=first,
        p_parts=partial, s_a=a.stride(0), s_g=g.stride(0), s_in=p_in.stride(0), s_out=p_out.stride(0),
        B=b, OUT=o, IN=i, P=p, Q=q, BLOCK_P=block_p, BLOCK_Q=block_q, OUTER=outer,
    )  # fmt: skip
    launch(
        part_sum_kernel, (b, triton.cdiv(q * p, PART_SUM_CONFIG.blocks["BLOCK"])), PART_SUM_CONFIG,
        p_parts=partial, p_first=first, p_out=out, SIZE=q * p,
    )  # fmt: skip
    return out
