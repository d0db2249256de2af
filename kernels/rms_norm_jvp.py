"""An RMS norm and its tangent, one block of rows a program.

Computes: y = n scale, dy = (dx - n mean(n dx)) / rms scale + n dscale; rms = sqrt(mean(x^2) + eps), n = x / rms.
Shapes:   x and dx (N, D), scale and dscale (D) -> (N, D), (N, D).
Cost:     four matrices of N D elements read or written once; the second look at a row finds it in the cache.
Numerics: fp32, rounded once; the sums of a row in an order that depends on D alone.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import FAMILIES, INTERPRETER, Config, Configs, device_family, inner_contiguous, launch, needs_reference

__all__ = ["NARROW_CONFIGS", "WIDE_CONFIGS", "rms_norm_jvp", "rms_norm_jvp_kernel"]


def _configs(n: int, d: int) -> Configs:
    config = Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=4, num_stages=1)
    return {(family, size): config for family in (*FAMILIES, INTERPRETER) for size in (2, 4)}


NARROW_CONFIGS = _configs(8, 128)  # the norms of heads
WIDE_CONFIGS = _configs(1, 1024)


@triton.jit
def rms_norm_jvp_kernel(
    p_x, p_dx, p_scale, p_dscale, p_y, p_dy, s_x, s_dx, eps, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_N rows of y and dy."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n[:, None] < N
    p_x += o_n[:, None] * s_x
    p_dx += o_n[:, None] * s_dx
    b_squares = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_products = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)[None, :]
        b_x = tl.load(p_x + o_d, mask=m_n & (o_d < D), other=0.0).to(tl.float32)
        b_dx = tl.load(p_dx + o_d, mask=m_n & (o_d < D), other=0.0).to(tl.float32)
        b_squares += b_x * b_x
        b_products += b_x * b_dx
    b_inverse = 1 / tl.sqrt(tl.sum(b_squares, 1) / D + eps)[:, None]
    b_along = tl.sum(b_products, 1)[:, None] * b_inverse * b_inverse / D
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)[None, :]
        m_d = o_d < D
        b_x = tl.load(p_x + o_d, mask=m_n & m_d, other=0.0).to(tl.float32)
        b_dx = tl.load(p_dx + o_d, mask=m_n & m_d, other=0.0).to(tl.float32)
        b_factor = tl.load(p_scale + o_d, mask=m_d, other=0.0) * b_inverse
        b_dy = (b_dx - b_x * b_along) * b_factor
        if p_dscale is not None:
            b_dy += b_x * b_inverse * tl.load(p_dscale + o_d, mask=m_d, other=0.0)
        o_y = o_n[:, None] * D + o_d
        tl.store(p_y + o_y, (b_x * b_factor).to(p_y.dtype.element_ty), mask=m_n & m_d)
        tl.store(p_dy + o_y, b_dy.to(p_dy.dtype.element_ty), mask=m_n & m_d)


def rms_norm_jvp(
    x: Tensor, dx: Tensor, scale: Tensor, dscale: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """An RMS norm and its tangent; see ``reference.rms_norm_jvp``."""
    if needs_reference(x):
        return reference.rms_norm_jvp(x, dx, scale, dscale, eps)
    x, dx = inner_contiguous(x), inner_contiguous(dx)
    n, d = x.shape
    key = device_family(x.device), x.element_size()
    config = (NARROW_CONFIGS if d <= NARROW_CONFIGS[key].blocks["BLOCK_D"] else WIDE_CONFIGS)[key]
    y, dy = (torch.empty(n, d, dtype=x.dtype, device=x.device) for _ in range(2))
    launch(
        rms_norm_jvp_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]),), config,
        p_x=x, p_dx=dx, p_scale=scale.contiguous(), p_dscale=None if dscale is None else dscale.contiguous(), p_y=y,
        p_dy=dy, s_x=x.stride(0), s_dx=dx.stride(0), eps=float(eps), N=n, D=d,
    )  # fmt: skip
    return y, dy
