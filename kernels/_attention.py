"""What the attention kernels share: blocks of one segment, the keys that a block of queries sees, softmax in base 2.

A program owns rows of one segment and one head, and where its tiles start depends on that segment alone, so that a
segment's result does not depend on what it is packed with. Scores and maxima are in units of log 2, where an
exponential is one instruction. Prefixes as in ``_tile``; lengths of tiles are M (queries) and N (keys). The loops over
tiles hoist nothing: invariants kept in registers would spill.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, device_family
from ._launch import needs_reference as is_float64
from ._tile import load_tile, matmul_rows, softcapped

__all__ = [
    "LOG2_E",
    "HeadConfigs",
    "arguments_of_heads",
    "config_of_heads",
    "find_block",
    "head_strides",
    "hide",
    "key_plan",
    "key_tile",
    "load_rows",
    "needs_reference",
    "online_softmax",
    "rows_product",
    "scores",
    "store_rows",
    "weighted_rows",
]

# Keyed by device family, bytes an element and the padded head size: 64 (or less), 128 or 256.
HeadConfigs = Mapping[tuple[str, int, int], Config]

# By bytes an element. Exact float32 products have no matrix unit to run on: wider tiles are thousands of unrolled
# multiplications, which take minutes to compile, spill or abort LLVM (an assertion in its SLP vectorizer, on sm_100).
WIDEST_HEAD = {2: 256, 4: 64}
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_block(i, p_cu_seqlens, B, BLOCK: tl.constexpr):
    """(segment, its first row, its end, first row of block ``i``); no such block where that row is not before the end.

    Segment j's blocks begin with number cu_seqlens[j] // BLOCK + j, which leaves room for all that a segment needs.
    """
    low = 0
    high = B
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(p_cu_seqlens + middle) // BLOCK + middle <= i
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    begin = tl.load(p_cu_seqlens + low)
    return low, begin, tl.load(p_cu_seqlens + low + 1), begin + (i - begin // BLOCK - low) * BLOCK


@triton.jit
def key_plan(segment, begin, start, end, p_cu_seqlens, p_parent, window, BLOCK_N: tl.constexpr):
    """The key tiles of the queries from ``start`` to ``end``: first the parent's keys, then the segment's own.

    (tiles, (first key and end of the parent's, their tiles, the rows between parent and segment, first own key)).
    """
    own_low = begin if window is None else tl.maximum(begin, start - window + 1)
    tiles = tl.cdiv(end - own_low, BLOCK_N)
    if p_parent is None:
        return tiles, (0, 0, 0, 0, own_low)
    else:
        parent = tl.load(p_parent + segment)
        parent_begin = tl.load(p_cu_seqlens + parent, mask=parent >= 0, other=0)
        parent_end = tl.load(p_cu_seqlens + parent + 1, mask=parent >= 0, other=0)
        gap = begin - parent_end
        parent_low = parent_begin if window is None else tl.maximum(parent_begin, start - gap - window + 1)
        parent_tiles = tl.cdiv(tl.maximum(parent_end - parent_low, 0), BLOCK_N)
        return parent_tiles + tiles, (parent_low, parent_end, parent_tiles, gap, own_low)


@triton.jit
def key_tile(i, plan, own_end, PARENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key, end of the keys, rows between these keys' segment and the queries' that count for nothing)."""
    parent_low, parent_end, parent_tiles, gap, own_low = plan
    if PARENT:
        own = i >= parent_tiles
        start = tl.where(own, own_low + (i - parent_tiles) * BLOCK_N, parent_low + i * BLOCK_N)
        return start, tl.where(own, own_end, parent_end), tl.where(own, 0, gap)
    else:
        return own_low + i * BLOCK_N, own_end, 0


@triton.jit
def hide(
    b_x, fill: tl.constexpr, start_q, start_k, end_k, window, o_q, o_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``fill`` where a query (first row ``start_q`` less the gap, offsets ``o_q``) does not see a key."""
    # Most tiles are seen whole, and comparing every entry costs a tenth of a tile.
    cut = start_k + BLOCK_N > tl.minimum(end_k, start_q + 1)
    if window is not None:
        cut |= start_k <= start_q + BLOCK_M - 1 - window
    if cut:
        distance = (start_q + o_q) - (start_k + o_k)
        seen = (distance >= 0) & (start_k + o_k < end_k)
        if window is not None:
            seen &= distance < window
        b_x = tl.where(seen, b_x, fill)
    return b_x


@triton.jit
def load_rows(p_x, start, end, s_x, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr, PAD: tl.constexpr):
    """The rows of x from ``start``, zero from row ``end`` and column WIDTH on: (BLOCK_X, PAD).

    Rows are 64-bit here, unlike in ``matmul_rows``: offsets from the tile's corner would stay in registers all along
    the loop, which has none to spare.
    """
    o_x = start + tl.arange(0, BLOCK_X)
    o_d = tl.arange(0, PAD)
    mask = (o_x < end)[:, None] & (o_d < WIDTH)[None, :]
    return load_tile(p_x + (o_x.to(tl.int64) * s_x)[:, None] + o_d[None, :], mask)


@triton.jit
def store_rows(p_x, start, end, s_x, b_x, WIDTH: tl.constexpr):
    """Write a tile to the rows of x from ``start``, of which those before ``end`` and WIDTH columns exist."""
    o_x = start + tl.arange(0, b_x.shape[0])
    o_d = tl.arange(0, b_x.shape[1])
    mask = (o_x < end)[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_x + (o_x.to(tl.int64) * s_x)[:, None] + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def rows_product(
    acc, b_x, p_x, start_x, end_x, s_x, b_y, p_y, start_y, end_y, s_y, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """acc + x y^T for two tiles of ``load_rows``, each followed by what it was loaded from.

    Where BLOCK_D is less than their width, the tiles (then unused, so never loaded) are read by so many columns at a
    time: registers do not hold them whole.
    """
    if b_x.shape[1] > BLOCK_D:
        return matmul_rows(
            acc, p_x, p_y, start_x, start_y, s_x, s_y, end_x, end_y, WIDTH, b_x.shape[0], b_y.shape[0], BLOCK_D
        )
    else:
        return tl.dot(b_x, tl.trans(b_y), acc, input_precision="ieee")


@triton.jit
def weighted_rows(acc, b_w, b_x, WIDE: tl.constexpr):
    """acc + w x with w in x's dtype or, where WIDE, both in TF32 (see ``arguments_of_heads``)."""
    if WIDE:
        return tl.dot(b_w, b_x.to(tl.float32), acc, input_precision="tf32")
    else:
        return tl.dot(b_w.to(b_x.dtype), b_x, acc, input_precision="ieee")


@triton.jit
def scores(b_s, scale, softcap, CAPPED: tl.constexpr):
    """c(scale s) in units of log 2, and c'(scale s)."""
    if CAPPED:
        b_c, b_slope = softcapped(b_s * scale, softcap, CAPPED)
        return b_c * LOG2_E, b_slope
    else:
        return b_s * (scale * LOG2_E), 1.0


@triton.jit
def online_softmax(b_c, b_max, b_sum):
    """One step over a tile of keys: 2^(c - new max), the factor that older sums need, the new max and sum."""
    b_top = tl.maximum(b_max, tl.max(b_c, 1))
    # A window may hide all of a tile from a query; -inf - -inf would be NaN.
    b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_p = tl.exp2(b_c - b_shift[:, None])
    b_factor = tl.exp2(b_max - b_shift)
    return b_p, b_factor, b_top, b_sum * b_factor + tl.sum(b_p, 1)


def needs_reference(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels leave these inputs to the reference: float64, and heads wider than WIDEST_HEAD."""
    return is_float64(q) or max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD[q.element_size()]


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def config_of_heads(configs: HeadConfigs, q: Tensor, v: Tensor) -> Config:
    """The configuration for q's device and dtype and the wider of the two heads."""
    width = max(64, _padded(max(q.shape[-1], v.shape[-1])))
    return configs[device_family(q.device), q.element_size(), width]


def head_strides(**tensors: Tensor) -> dict[str, int]:
    """s_x (row), s_xh (head) and, of a tensor with tangents, s_xk (tangent) for each tensor x."""
    strides: dict[str, int] = {}
    for name, x in tensors.items():
        strides |= {f"s_{name}": x.stride(-3), f"s_{name}h": x.stride(-2)}
        strides |= {f"s_{name}k": x.stride(0)} if x.dim() == 4 else {}
    return strides


def arguments_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> dict[str, Any]:
    """Arguments that every attention kernel takes.

    WIDE is for float16, which has too little range for probabilities times gradients or tangents: their products are
    TF32 ones, which has float16's significand and float32's exponent, so that float16 values are exact in it.
    """
    n, heads, e = q.shape
    f = v.shape[2]
    return {
        "p_q": q, "p_k": k, "p_v": v, **head_strides(q=q, k=k, v=v),
        "p_cu_seqlens": cu_seqlens.contiguous(), "p_parent": None if parent is None else parent.contiguous(),
        "scale": float(scale), "softcap": float(softcap), "window": min(window, n) if 0 < window < n else None,
        "B": cu_seqlens.shape[0] - 1, "H": heads, "PER_GROUP": heads // k.shape[1], "E": e, "F": f,
        "PAD_E": _padded(e), "PAD_F": _padded(f), "CAPPED": softcap != 0.0, "WIDE": q.dtype == torch.float16,
    }  # fmt: skip
