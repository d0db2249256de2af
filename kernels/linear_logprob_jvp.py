"""log p(target), its log-sum-exp and K directional derivatives of log p(target), in one pass over the vocabulary.

Computes: jvp[k, t] = dc_k[t, y] - sum_v p_tv dc_k[t, v], dc_k = c'(z) (dh_k W^T + h dW_k^T + db_k).
Shapes:   h (N, D), weight (V, D), target (N), dh (K, N, D), dweight (K, V, D), bias (V), dbias (K, V)
          -> (N), (N), (K, N).
Cost:     2 N D V flops for each group of directions, 2 K N D V more for each of dh and dweight; logits and tangents
          live in registers; 3 + 2 K floats per row and SPLIT_V columns pass through memory.
Numerics: fp32 logits, tangents and exponentials; fixed cuts of V joined in fixed order: a row depends on itself alone.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

from collections.abc import Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference, operand
from ._tile import grouped_tile, matmul_rows, matmul_rows_with_tangent
from .linear_logprob import COMBINE_CONFIG, capped_logits, combine, logits_tile, online_softmax

__all__ = ["CONFIGS", "combine_tangents_kernel", "linear_logprob_jvp", "linear_logprob_jvp_kernel"]

# Directions that share one pass over the logits; their row sums stay in registers.
GROUP_OF_DIRECTIONS = 8


def _config(n: int, v: int, d: int, warps: int, stages: int, tma: bool = False) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "SPLIT_V": 1024, "GROUP": 8}, warps, stages, tma)


CONFIGS: Configs = {
    ("sm_80", 2): _config(64, 128, 32, 8, 3),
    ("sm_80", 4): _config(16, 64, 16, 4, 3),
    ("sm_90", 2): _config(64, 128, 64, 8, 4),
    ("sm_90", 4): _config(32, 32, 32, 4, 3),
    ("sm_100", 2): _config(128, 64, 64, 8, 4),
    ("sm_100", 4): _config(32, 32, 32, 4, 3),
    ("gfx942", 2): _config(64, 128, 64, 8, 2),
    ("gfx942", 4): _config(32, 32, 32, 4, 2),
    (INTERPRETER, 2): Config({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32, "SPLIT_V": 64, "GROUP": 2}, 4, 1),
    (INTERPRETER, 4): Config({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32, "SPLIT_V": 64, "GROUP": 2}, 4, 1),
}

# For one direction: the tiles of all its products come once, for two sums in registers. Keyed as CONFIGS and by whether
# the head has a bias or a softcap, which need registers too.
_INTERPRETED = Config({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32, "SPLIT_V": 64, "GROUP": 2}, 4, 1, tma=True)
ONE_DIRECTION_CONFIGS: Mapping[tuple[str, int, bool], Config] = {
    ("sm_90", 2, False): _config(128, 128, 64, 8, 3, tma=True),
    ("sm_90", 2, True): _config(128, 64, 64, 8, 4, tma=True),
    (INTERPRETER, 2, False): _INTERPRETED,
    (INTERPRETER, 2, True): _INTERPRETED,
}


@triton.jit
def linear_logprob_jvp_kernel(
    p_h, p_weight, p_bias, p_target, p_dh, p_dweight, p_dbias, p_parts, p_tangents,
    s_h, s_weight, s_dhk, s_dh, s_dweightk, s_dweight, s_dbiask, softcap, N, V, D, K,
    CAPPED: tl.constexpr, ONE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """ONE: the operands are descriptors, with at most one direction.

    parts as ``linear_logprob_kernel``; tangents[:, k, split, n] = (sum of exp(c - max) dc_k, the target's or 0)."""
    splits = tl.cdiv(V, SPLIT_V)
    i_n, i_s = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP)
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    b_max = tl.full([BLOCK_N], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_hit = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_mean = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    b_dhit = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(i_s * SPLIT_V, tl.minimum((i_s + 1) * SPLIT_V, V), BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_dc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        if ONE:
            b_z, b_dc = matmul_rows_with_tangent(b_dc, b_dc, p_h, p_dh, p_weight, p_dweight, start_n, start, D, BLOCK_D)
            b_c, b_slope = capped_logits(b_z, p_bias, softcap, start, V, CAPPED)
        else:
            b_c, b_slope = logits_tile(
                p_h, p_weight, p_bias, s_h, s_weight, softcap, start_n, start, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D,
                CAPPED,
            )  # fmt: skip
        b_hit += tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_c, 0.0), 1)
        b_exp, b_factor, b_max, b_sum = online_softmax(b_c, b_max, b_sum, start, V, ONE)
        b_mean *= b_factor[:, None]
        for i_k in range(0, K):
            k = tl.cast(i_k, tl.int64)
            if not ONE:
                b_dc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
                if p_dh is not None:
                    p_dh_k = p_dh + k * s_dhk
                    b_dc = matmul_rows(
                        b_dc, p_dh_k, p_weight, start_n, start, s_dh, s_weight, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D
                    )
                if p_dweight is not None:
                    p_dweight_k = p_dweight + k * s_dweightk
                    b_dc = matmul_rows(
                        b_dc, p_h, p_dweight_k, start_n, start, s_h, s_dweight, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D
                    )
            if p_dbias is not None:
                b_dc += tl.load(p_dbias + k * s_dbiask + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
            b_dc *= b_slope
            m_k = o_k[None, :] == i_k
            b_mean += tl.where(m_k, tl.sum(b_exp * b_dc, 1)[:, None], 0.0)
            b_at = tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_dc, 0.0), 1)
            b_dhit += tl.where(m_k, b_at[:, None], 0.0)
    part = splits.to(tl.int64) * N
    p_parts += i_s.to(tl.int64) * N + o_n
    tl.store(p_parts, b_max, mask=m_n)
    tl.store(p_parts + part, b_sum, mask=m_n)
    tl.store(p_parts + 2 * part, b_hit, mask=m_n)
    p_tangents += o_k.to(tl.int64)[None, :] * part + (i_s.to(tl.int64) * N + o_n)[:, None]
    m_tangents = m_n[:, None] & (o_k < K)[None, :]
    tl.store(p_tangents, b_mean, mask=m_tangents)
    tl.store(p_tangents + K * part, b_dhit, mask=m_tangents)


@triton.jit
def combine_tangents_kernel(p_parts, p_tangents, p_lse, p_jvp, SPLITS, N, K, BLOCK_N: tl.constexpr):
    """jvp[k, n] = dc_k at the target - sum_v p_v dc_k over the splits of V in order; a program per (n block, k)."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_k = tl.program_id(1).to(tl.int64)
    m_n = o_n < N
    b_lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    b_jvp = tl.zeros([BLOCK_N], dtype=tl.float32)
    part = tl.cast(SPLITS, tl.int64) * N
    for i_s in range(0, SPLITS):
        o_split = tl.cast(i_s, tl.int64) * N + o_n
        b_scale = tl.exp(tl.load(p_parts + o_split, mask=m_n, other=0.0) - b_lse)
        p_tangent = p_tangents + i_k * part + o_split
        b_jvp += tl.load(p_tangent + K * part, mask=m_n, other=0.0)
        b_jvp -= b_scale * tl.load(p_tangent, mask=m_n, other=0.0)
    tl.store(p_jvp + i_k * N + o_n, b_jvp, mask=m_n)


def _one_group(
    h: Tensor, weight: Tensor, target: Tensor, dh: Tensor | None, dweight: Tensor | None, bias: Tensor | None,
    dbias: Tensor | None, softcap: float, k: int, jvp: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """At most GROUP_OF_DIRECTIONS directions: fills jvp (k, N), returns log p(target) and lse."""
    (n, d), v = h.shape, weight.shape[0]
    key = device_family(h.device), h.element_size()
    one_key = *key, bias is not None or softcap != 0.0
    described = k == 1 and one_key in ONE_DIRECTION_CONFIGS and h.numel() > 0 and weight.numel() > 0
    config = ONE_DIRECTION_CONFIGS[one_key] if described else CONFIGS[key]
    splits = triton.cdiv(v, config.blocks["SPLIT_V"])
    parts = torch.empty(3, splits, n, dtype=torch.float32, device=h.device)
    tangents = torch.empty(2, k, splits, n, dtype=torch.float32, device=h.device)
    rows = partial(operand, config=config, rows="BLOCK_N", columns="BLOCK_D")
    columns = partial(operand, config=config, rows="BLOCK_V", columns="BLOCK_D")
    p_dh, p_dweight = dh, dweight
    if described:
        p_dh, p_dweight = None if dh is None else rows(dh[0]), None if dweight is None else columns(dweight[0])
    launch(
        linear_logprob_jvp_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]) * splits,), config,
        p_h=rows(h), p_weight=columns(weight), p_bias=bias, p_target=target, p_dh=p_dh, p_dweight=p_dweight,
        p_dbias=dbias, p_parts=parts, p_tangents=tangents, s_h=h.stride(0), s_weight=weight.stride(0),
        s_dhk=0 if dh is None else dh.stride(0), s_dh=0 if dh is None else dh.stride(1),
        s_dweightk=0 if dweight is None else dweight.stride(0), s_dweight=0 if dweight is None else dweight.stride(1),
        s_dbiask=0 if dbias is None else dbias.stride(0), softcap=float(softcap), N=n, V=v, D=d, K=k,
        CAPPED=softcap != 0.0, ONE=described, BLOCK_K=1 if k == 1 else GROUP_OF_DIRECTIONS,
    )  # fmt: skip
    logp, lse = combine(parts, target, v)
    launch(
        combine_tangents_kernel, (triton.cdiv(n, COMBINE_CONFIG.blocks["BLOCK_N"]), k), COMBINE_CONFIG,
        p_parts=parts, p_tangents=tangents, p_lse=lse, p_jvp=jvp, SPLITS=splits, N=n, K=k,
    )  # fmt: skip
    return logp, lse


def linear_logprob_jvp(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    dh: Tensor | None = None,
    dweight: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target_t), its log-sum-exp and K directional derivatives; see ``reference.linear_logprob_jvp``."""
    if needs_reference(h):
        return reference.linear_logprob_jvp(h, weight, target, dh, dweight, bias, dbias, softcap)
    h, weight, target = aligned(h), aligned(weight), target.contiguous()
    dh, dweight = (None if x is None else aligned(x) for x in (dh, dweight))
    bias, dbias = (None if x is None else x.contiguous() for x in (bias, dbias))
    given = dh if dh is not None else dweight
    assert given is not None
    k = given.shape[0]
    jvp = torch.empty(k, h.shape[0], dtype=torch.float32, device=h.device)
    # K = 0 still owes log p and lse: one group without directions.
    for first in range(0, max(k, 1), GROUP_OF_DIRECTIONS):
        group = slice(first, min(first + GROUP_OF_DIRECTIONS, k))
        tangents = (None if x is None else x[group] for x in (dh, dweight, dbias))
        dh_k, dweight_k, dbias_k = tangents
        logp, lse = _one_group(
            h, weight, target, dh_k, dweight_k, bias, dbias_k, softcap, jvp[group].shape[0], jvp[group]
        )
    return logp, lse, jvp
