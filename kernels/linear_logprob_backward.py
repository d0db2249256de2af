"""Gradients of log p(target) and its log-sum-exp in h, weight and bias, by blocks of rows.

Computes: dz = c'(z) (grad_logp e_y + (grad_lse - grad_logp) p); dh = dz W, dweight = dz^T h, dbias = sum_t dz_t.
Shapes:   grad_logp, grad_lse, lse, target (N), h (N, D), weight (V, D), bias (V) -> (N, D), (V, D), (V).
Cost:     2 N D V flops for the logits, once, and 2 N D V for each of dh and dweight; dz of one block of rows is stored.
Numerics: fp32 logits, probabilities and accumulation; dz is rounded to bfloat16 for bfloat16 inputs. float16 has too
          little range for probabilities: there dz is float32 and its products are TF32, which has float16's significand
          and float32's exponent, so that float16 values are exact in it. No atomics: fixed order throughout.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import ALIGNMENT, INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import grouped_tile, load_tile
from .linear_logprob import logits_tile

__all__ = ["DZ_CONFIGS", "MATMUL_CONFIGS", "dz_kernel", "linear_logprob_backward", "matmul_kernel"]

# dz of a block of rows: at most WORKSPACE elements, but enough rows that reading and writing dweight costs less than
# its products.
WORKSPACE = 2**27
LEAST_ROWS = 1024


def _dz(n: int, v: int, d: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "GROUP": 8}, warps, stages)


def _matmul(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)


DZ_CONFIGS: Configs = {
    ("sm_80", 2): _dz(128, 128, 32, 8, 4),
    ("sm_80", 4): _dz(64, 64, 16, 4, 3),
    ("sm_90", 2): _dz(128, 128, 64, 8, 4),
    ("sm_90", 4): _dz(64, 64, 16, 4, 3),
    ("sm_100", 2): _dz(128, 128, 64, 8, 4),
    ("sm_100", 4): _dz(64, 64, 16, 4, 3),
    ("gfx942", 2): _dz(128, 128, 64, 8, 2),
    ("gfx942", 4): _dz(64, 64, 32, 4, 2),
    (INTERPRETER, 2): _dz(32, 32, 32, 4, 1),
    (INTERPRETER, 4): _dz(32, 32, 32, 4, 1),
}

# Keyed by bytes an element of dz: 4 for float16 inputs.
MATMUL_CONFIGS: Configs = {
    ("sm_80", 2): _matmul(128, 128, 32, 8, 4),
    ("sm_80", 4): _matmul(64, 128, 16, 8, 3),
    ("sm_90", 2): _matmul(128, 256, 64, 8, 3),
    ("sm_90", 4): _matmul(64, 128, 16, 8, 3),
    ("sm_100", 2): _matmul(128, 128, 64, 8, 4),
    ("sm_100", 4): _matmul(64, 128, 16, 8, 3),
    ("gfx942", 2): _matmul(128, 128, 64, 8, 2),
    ("gfx942", 4): _matmul(64, 64, 32, 4, 2),
    (INTERPRETER, 2): _matmul(32, 32, 64, 4, 1),
    (INTERPRETER, 4): _matmul(32, 32, 64, 4, 1),
}


@triton.jit
def dz_kernel(
    p_grad_logp, p_grad_lse, p_h, p_weight, p_bias, p_target, p_lse, p_dz, p_sums, s_h, s_weight, s_dz, softcap,
    N, V, D,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz[n, v], zero from column V to s_dz, and where p_sums is given sums[n tile, v] over a tile's rows."""
    i_n, i_v = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    start_n = i_n * BLOCK_N
    start_v = i_v * BLOCK_V
    b_c, b_slope = logits_tile(
        p_h, p_weight, p_bias, s_h, s_weight, softcap, start_n, start_v, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, CAPPED
    )
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_v = start_v + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    m_v = o_v < V
    b_logp = tl.load(p_grad_logp + o_n, mask=m_n, other=0.0)
    b_lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    b_share = tl.load(p_grad_lse + o_n, mask=m_n, other=0.0) - b_logp
    b_dz = b_share[:, None] * tl.exp(b_c - b_lse[:, None])
    b_dz += tl.where(o_v[None, :] == b_target[:, None], b_logp[:, None], 0.0)
    b_dz = tl.where(m_n[:, None] & m_v[None, :], b_dz * b_slope, 0.0)
    p_dz += start_n.to(tl.int64) * s_dz + start_v
    o_tile = tl.arange(0, BLOCK_N)[:, None] * s_dz + tl.arange(0, BLOCK_V)[None, :]
    tl.store(p_dz + o_tile, b_dz.to(p_dz.dtype.element_ty), mask=m_n[:, None] & (o_v < s_dz)[None, :])
    if p_sums is not None:
        b_sums = tl.sum(b_dz, 0)
        tl.store(p_sums + i_n.to(tl.int64) * V + o_v, b_sums, mask=m_v)


@triton.jit
def matmul_kernel(
    p_x, p_y, p_out, s_x, s_y, s_out, M, N, K,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (+)= X Y, or X^T Y where TRANSPOSED: X is (M, K) or (K, M), Y (K, N); Y is widened to X's dtype.

    Every row of X has s_x columns, of which those past M or K are zero: reading them keeps the loads wide.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    start_m = i_m * BLOCK_M
    start_n = i_n * BLOCK_N
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N - start_n
    p_out += start_m.to(tl.int64) * s_out + start_n
    o_out = o_m[:, None] * s_out + o_n[None, :]
    m_out = (o_m < M - start_m)[:, None] & m_n[None, :]
    b_out = tl.load(p_out + o_out, mask=m_out, other=0.0) if ADD else tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if TRANSPOSED:
        p_x += start_m
    else:
        p_x += start_m.to(tl.int64) * s_x
    p_y += start_n
    for start in range(0, K, BLOCK_K):
        if TRANSPOSED:
            m_x = (o_m < s_x - start_m)[:, None] & (o_k < K - start)[None, :]
            b_x = load_tile(p_x + (o_k[None, :] * s_x + o_m[:, None]), m_x)
            p_x += BLOCK_K * tl.cast(s_x, tl.int64)
        else:
            m_x = (o_m < M - start_m)[:, None] & (o_k < s_x - start)[None, :]
            b_x = load_tile(p_x + (o_m[:, None] * s_x + o_k[None, :]), m_x)
            p_x += BLOCK_K
        b_y = load_tile(p_y + (o_k[:, None] * s_y + o_n[None, :]), (o_k < K - start)[:, None] & m_n[None, :])
        b_out = tl.dot(b_x, b_y.to(b_x.dtype), b_out, input_precision=PRECISION)
        p_y += BLOCK_K * tl.cast(s_y, tl.int64)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def _matmul_into(out: Tensor, x: Tensor, y: Tensor, *, transposed: bool = False, add: bool = False) -> None:
    """out (M, N) = x y, or x^T y where ``transposed``; added to what is there where ``add``."""
    (m, n), k = out.shape, y.shape[0]
    config = MATMUL_CONFIGS[device_family(x.device), x.element_size()]
    tiles = triton.cdiv(m, config.blocks["BLOCK_M"]) * triton.cdiv(n, config.blocks["BLOCK_N"])
    launch(
        matmul_kernel, (tiles,), config,
        p_x=x, p_y=y, p_out=out, s_x=x.stride(0), s_y=y.stride(0), s_out=out.stride(0), M=m, N=n, K=k,
        TRANSPOSED=transposed, ADD=add, PRECISION="tf32" if y.dtype == torch.float16 else "ieee",
    )  # fmt: skip


def _dz_of_rows(
    rows: slice, grad_logp: Tensor, grad_lse: Tensor, h: Tensor, weight: Tensor, target: Tensor, lse: Tensor,
    bias: Tensor | None, softcap: float, need_sum: bool, workspace: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dz (rows, V), in ``workspace``, and its sum over the rows (V) if needed."""
    config = DZ_CONFIGS[device_family(h.device), h.element_size()]
    h, v = h[rows], weight.shape[0]
    n, d = h.shape
    tiles_n = triton.cdiv(n, config.blocks["BLOCK_N"])
    sums = torch.empty(tiles_n, v, dtype=torch.float32, device=h.device) if need_sum else None
    launch(
        dz_kernel, (tiles_n * triton.cdiv(v, config.blocks["BLOCK_V"]),), config,
        p_grad_logp=grad_logp[rows], p_grad_lse=grad_lse[rows], p_h=h, p_weight=weight, p_bias=bias,
        p_target=target[rows], p_lse=lse[rows], p_dz=workspace, p_sums=sums, s_h=h.stride(0), s_weight=weight.stride(0),
        s_dz=workspace.stride(0), softcap=float(softcap), N=n, V=v, D=d, CAPPED=softcap != 0.0,
    )  # fmt: skip
    return workspace[:n, :v], None if sums is None else sums.sum(0)


def linear_logprob_backward(
    grad_logp: Tensor,
    grad_lse: Tensor,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    need_h: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in h, weight and bias; see ``reference.linear_logprob_backward``."""
    if needs_reference(h):
        arguments = (grad_logp, grad_lse, h, weight, target, lse, bias, softcap, need_h, need_weight)
        return reference.linear_logprob_backward(*arguments)
    width, h, weight = h.shape[1], aligned(h), aligned(weight)
    grad_logp, grad_lse, target, lse = (x.contiguous() for x in (grad_logp, grad_lse, target, lse))
    bias = None if bias is None else bias.contiguous()
    (n, d), v = h.shape, weight.shape[0]
    grad_h = h.new_empty(n if need_h else 0, d)
    grad_weight = torch.zeros(v if need_weight else 0, d, dtype=torch.float32, device=h.device)
    grad_bias = torch.zeros(v if need_weight else 0, dtype=torch.float32, device=h.device)
    step = min(n, max(LEAST_ROWS, WORKSPACE // max(v, 1)))
    dtype = torch.float32 if h.dtype == torch.float16 else h.dtype
    workspace = torch.empty(step, triton.cdiv(v, ALIGNMENT) * ALIGNMENT, dtype=dtype, device=h.device)
    for first in range(0, n, max(step, 1)):
        rows = slice(first, min(first + step, n))
        dz, total = _dz_of_rows(
            rows, grad_logp, grad_lse, h, weight, target, lse, bias, softcap, need_weight, workspace
        )
        if need_h:
            _matmul_into(grad_h[rows], dz, weight)
        if total is not None:
            _matmul_into(grad_weight, dz, h[rows], transposed=True, add=first > 0)
            grad_bias += total
    return grad_h[:, :width].contiguous(), grad_weight[:, :width].contiguous(), grad_bias
