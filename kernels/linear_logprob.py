"""log p(target) and the log-sum-exp of a linear head, streaming over the vocabulary with an online softmax.

Computes: lse_t = log sum_v exp c(h_t . w_v + b_v), logp_t = c(h_t . w_y + b_y) - lse_t, c the softcap.
Shapes:   h (N, D), weight (V, D), target (N), bias (V) -> (N), (N).
Cost:     2 N D V flops; logits live in registers; three floats per row and SPLIT_V columns pass through memory.
Numerics: fp32 logits and exponentials; the vocabulary is cut at fixed places and the cuts are joined in fixed order, so
          a row's result depends on that row alone. A target outside the vocabulary gives NaN.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference, operand
from ._tile import grouped_tile, matmul_rows, softcapped

__all__ = ["COMBINE_CONFIG", "CONFIGS", "combine", "combine_kernel", "linear_logprob", "linear_logprob_kernel"]


def _config(n: int, v: int, d: int, warps: int, stages: int, tma: bool = False) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "SPLIT_V": 1024, "GROUP": 8}, warps, stages, tma)


CONFIGS: Configs = {
    ("sm_80", 2): _config(128, 128, 32, 8, 4),
    ("sm_80", 4): _config(64, 64, 16, 4, 3),
    ("sm_90", 2): _config(128, 128, 64, 8, 4, tma=True),
    ("sm_90", 4): _config(64, 64, 16, 4, 3),
    ("sm_100", 2): _config(128, 128, 64, 8, 4),
    ("sm_100", 4): _config(64, 64, 16, 4, 3),
    ("gfx942", 2): _config(128, 128, 64, 8, 2),
    ("gfx942", 4): _config(64, 64, 32, 4, 2),
    (INTERPRETER, 2): Config({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32, "SPLIT_V": 64, "GROUP": 2}, 4, 1, tma=True),
    (INTERPRETER, 4): Config({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32, "SPLIT_V": 64, "GROUP": 2}, 4, 1),
}
# Where the epilogue has neither bias nor softcap, which need registers.
PLAIN_CONFIGS: Configs = {("sm_90", 2): _config(128, 256, 64, 8, 3, tma=True)}
COMBINE_CONFIG = Config({"BLOCK_N": 128}, num_warps=4, num_stages=1)


@triton.jit
def logits_tile(
    p_h, p_weight, p_bias, s_h, s_weight, softcap, start_n, start_v, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Capped logits of a tile and the cap's slope; columns outside the vocabulary hold c(0)."""
    b_z = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    b_z = matmul_rows(b_z, p_h, p_weight, start_n, start_v, s_h, s_weight, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D)
    return capped_logits(b_z, p_bias, softcap, start_v, V, CAPPED)


@triton.jit
def capped_logits(b_z, p_bias, softcap, start_v, V, CAPPED: tl.constexpr):
    """c(z + bias) and c' of a tile of products."""
    if p_bias is not None:
        o_v = start_v + tl.arange(0, b_z.shape[1])
        b_z += tl.load(p_bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    return softcapped(b_z, softcap, CAPPED)


@triton.jit
def online_softmax(b_c, b_max, b_sum, start_v, V, BRANCH: tl.constexpr):
    """One step of the online softmax: exp(c - new max), the factor that the older sums need, the new max and sum.

    BRANCH: compare the tile's columns with V only where some lie beyond it, which spares registers beside descriptors
    and costs some beside pointers.
    """
    if not BRANCH or start_v + b_c.shape[1] > V:
        o_v = start_v + tl.arange(0, b_c.shape[1])
        b_c = tl.where((o_v < V)[None, :], b_c, -float("inf"))
    b_top = tl.maximum(b_max, tl.max(b_c, 1))
    # A bias of -inf may cover a whole tile; -inf - -inf would be NaN.
    b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_exp = tl.exp(b_c - b_shift[:, None])
    b_factor = tl.exp(b_max - b_shift)
    return b_exp, b_factor, b_top, b_sum * b_factor + tl.sum(b_exp, 1)


@triton.jit
def linear_logprob_kernel(
    p_h, p_weight, p_bias, p_target, p_parts, s_h, s_weight, softcap, N, V, D,
    CAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """parts[:, split, n] = (max, sum of exp(c - max), target's logit or 0); a program per (n tile, split of V)."""
    splits = tl.cdiv(V, SPLIT_V)
    i_n, i_s = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP)
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    b_max = tl.full([BLOCK_N], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_hit = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(i_s * SPLIT_V, tl.minimum((i_s + 1) * SPLIT_V, V), BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        b_c, _ = logits_tile(
            p_h, p_weight, p_bias, s_h, s_weight, softcap, start_n, start, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, CAPPED
        )
        b_hit += tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_c, 0.0), 1)
        _, _, b_max, b_sum = online_softmax(b_c, b_max, b_sum, start, V, isinstance(p_h, tl.tensor_descriptor))
    p_parts += i_s.to(tl.int64) * N + o_n
    part = splits.to(tl.int64) * N
    tl.store(p_parts, b_max, mask=m_n)
    tl.store(p_parts + part, b_sum, mask=m_n)
    tl.store(p_parts + 2 * part, b_hit, mask=m_n)


@triton.jit
def combine_kernel(p_parts, p_target, p_logp, p_lse, SPLITS, N, V, BLOCK_N: tl.constexpr):
    """Join the splits of V in order: log p(target) and the log-sum-exp of BLOCK_N rows."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_max = tl.full([BLOCK_N], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_hit = tl.zeros([BLOCK_N], dtype=tl.float32)
    part = tl.cast(SPLITS, tl.int64) * N
    for i_s in range(0, SPLITS):
        p_split = p_parts + tl.cast(i_s, tl.int64) * N + o_n
        b_part_max = tl.load(p_split, mask=m_n, other=0.0)
        b_top = tl.maximum(b_max, b_part_max)
        b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_part_sum = tl.load(p_split + part, mask=m_n, other=1.0)
        b_sum = b_sum * tl.exp(b_max - b_shift) + b_part_sum * tl.exp(b_part_max - b_shift)
        b_hit += tl.load(p_split + 2 * part, mask=m_n, other=0.0)
        b_max = b_top
    b_lse = b_max + tl.log(b_sum)
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    b_hit = tl.where((b_target >= 0) & (b_target < V), b_hit, float("nan"))
    tl.store(p_lse + o_n, b_lse, mask=m_n)
    tl.store(p_logp + o_n, b_hit - b_lse, mask=m_n)


def combine(parts: Tensor, target: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """Partial (max, sum, target's logit), parts (3, splits, N), to log p(target) (N) and lse (N)."""
    _, splits, n = parts.shape
    logp, lse = parts.new_empty(2, n).unbind(0)
    launch(
        combine_kernel, (triton.cdiv(n, COMBINE_CONFIG.blocks["BLOCK_N"]),), COMBINE_CONFIG,
        p_parts=parts, p_target=target, p_logp=logp, p_lse=lse, SPLITS=splits, N=n, V=v,
    )  # fmt: skip
    return logp, lse


def linear_logprob(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """log p(target_t) and its log-sum-exp; see ``reference.linear_logprob``."""
    if needs_reference(h):
        return reference.linear_logprob(h, weight, target, bias, softcap)
    h, weight, target = aligned(h), aligned(weight), target.contiguous()
    (n, d), v = h.shape, weight.shape[0]
    key = device_family(h.device), h.element_size()
    config = PLAIN_CONFIGS[key] if bias is None and softcap == 0.0 and key in PLAIN_CONFIGS else CONFIGS[key]
    splits = triton.cdiv(v, config.blocks["SPLIT_V"])
    parts = torch.empty(3, splits, n, dtype=torch.float32, device=h.device)
    launch(
        linear_logprob_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]) * splits,), config,
        p_h=operand(h, config, "BLOCK_N", "BLOCK_D"), p_weight=operand(weight, config, "BLOCK_V", "BLOCK_D"),
        p_bias=None if bias is None else bias.contiguous(), p_target=target, p_parts=parts,
        s_h=h.stride(0), s_weight=weight.stride(0), softcap=float(softcap), N=n, V=v, D=d, CAPPED=softcap != 0.0,
    )  # fmt: skip
    return combine(parts, target, v)
