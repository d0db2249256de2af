"""Causal attention over packed examples, plugged into transformers as an attention implementation of its own.

It is the op ``attention`` where that has a kernel. Elsewhere, and under dropout, the library's fused attention serves,
which knows no packed examples. Right padding needs no mask under causal attention (a real token never looks at what
lies behind it), so there packed tokens are laid out as (B, T), one call attends, and the real rows are taken back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from u2a_fast._register import implementations
from u2a_fast.data.packing import Packed
from u2a_fast.models.attend import attend, refuse_what_is_not_understood
from u2a_fast.models.tangents import has_tangent

_NAME = "u2a_fast_packed"


@dataclass(frozen=True)
class _Grid:
    """Where each packed token lies in a (B, T) grid, and back; None where the packed order is the grid already."""

    batch: int
    longest: int
    to_grid: Tensor | None  # (B * T) packed position of each cell; padding cells repeat their example's first token
    from_grid: Tensor | None  # (N) cell of each packed token


class _Layout:
    """The packed batch that is running, and its grid where one is asked for."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    @cached_property
    def grid(self) -> _Grid:
        return _make_grid(self.packed)


_layout: ContextVar[_Layout | None] = ContextVar("u2a_fast_layout", default=None)


def _make_grid(packed: Packed) -> _Grid:
    longest = max(packed.lengths, default=0)
    batch = len(packed.lengths)
    if all(length == longest for length in packed.lengths):
        return _Grid(batch, longest, None, None)
    lengths = torch.tensor(packed.lengths)
    starts = packed.cu_seqlens[:-1].to("cpu", torch.int64)
    steps = torch.arange(longest)
    real = steps < lengths[:, None]
    to_grid = torch.where(real, starts[:, None] + steps, starts[:, None]).flatten()
    from_grid = real.flatten().nonzero()[:, 0]
    device = packed.input_ids.device
    return _Grid(batch, longest, to_grid.to(device), from_grid.to(device))


class _Regrid(torch.autograd.Function):
    """Gather along the token axis whose adjoint is a gather too: padding cells carry no gradient, so none adds up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, padding: bool) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.padding = padding
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        if ctx.padding:
            return grad.index_select(0, inverse), None, None, None
        out = grad.new_zeros(inverse.shape[0], *grad.shape[1:])
        return out.index_copy_(0, index, grad), None, None, None


def _to_grid(x: Tensor, grid: _Grid) -> Tensor:
    """(1, H, N, E) packed -> (B, H, T, E)."""
    tokens = x[0].transpose(0, 1)
    if grid.to_grid is not None:
        tokens = _Regrid.apply(tokens, grid.to_grid, grid.from_grid, True)
    return tokens.unflatten(0, (grid.batch, grid.longest)).transpose(1, 2)


def _from_grid(x: Tensor, grid: _Grid) -> Tensor:
    """(B, H, T, E) -> (1, N, H, E) packed."""
    tokens = x.transpose(1, 2).flatten(0, 1)
    if grid.from_grid is not None:
        tokens = _Regrid.apply(tokens, grid.from_grid, grid.to_grid, False)
    return tokens[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where query t sees key s: t - window < s <= t."""
    t = torch.arange(length, device=device)
    distance = t[:, None] - t[None, :]
    return (distance >= 0) & (distance < window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1, dtype=accumulate).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v


def _check_window(module: nn.Module, options: dict[str, Any], longest: int) -> int | None:
    config = getattr(module, "config", None)
    if "sliding_window" in options:
        return options["sliding_window"]
    for limit in ("sliding_window", "attention_chunk_size", "window_size"):
        size = getattr(config, limit, None)
        if isinstance(size, int) and longest > size and getattr(config, "use_sliding_window", True):
            raise NotImplementedError(
                f"[packed attention] {type(module).__name__} does not say whether it uses config.{limit} = {size}, "
                f"and an example has {longest} tokens; shorten the examples to at most {size} tokens"
            )
    return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal grouped-query attention of each packed example with itself (transformers' attention signature).

    Shapes: query (1, H, N, E), key and value (1, G, N, E), G dividing H -> (1, N, H, E).
    """
    layout = _layout.get()
    if layout is None:
        raise RuntimeError("[packed attention] called outside of packed_layout")
    refuse_what_is_not_understood(module, options)
    packed = layout.packed
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = _check_window(module, options, packed.longest)
    softcap = options.get("softcap")
    carried = packed.parent is not None or any(has_tangent(x) for x in (query, key, value))
    if carried or (not dropout and query.device.type in implementations("attention")):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend(q, k, v, packed.cu_seqlens, packed.parent, scale, window or 0, softcap or 0.0)[None], None
    grid = layout.grid
    q, k, v = (_to_grid(x, grid) for x in (query, key, value))
    banded = window is not None and window < grid.longest
    if softcap is not None:
        mask = _band(grid.longest, window or grid.longest, q.device)
        out = _softcapped(q, k, v, scale, softcap, mask, dropout)
    else:
        out = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(grid.longest, window or 0, q.device) if banded else None,
            dropout_p=dropout,
            is_causal=not banded,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return _from_grid(out, grid), None


AttentionInterface.register(_NAME, packed_attention)


@contextmanager
def packed_layout(model: nn.Module, packed: Packed) -> Iterator[None]:
    """Make every attention module of ``model`` attend within the examples of ``packed``, for the duration of the block.

    The mask machinery of transformers builds no mask for an implementation that it has no mask function for.
    """
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _layout.set(_Layout(packed))
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _layout.reset(token)
