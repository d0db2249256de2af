"""How stacks of directions lie in memory, so that ``ghost_dot`` reads them as they are."""

import torch
from torch import Tensor

__all__ = ["readable", "stack"]

SIDE_BY_SIDE = 16  # directions at least: kLeastSideBySide in csrc/kernels.h


def _side_by_side(count: int, axes: int, device: torch.device) -> bool:
    return count >= SIDE_BY_SIDE and axes == 2 and device.type == "cpu"


def stack(rows: list[Tensor]) -> Tensor:
    """K tensors of one shape as (K, *shape).

    On the CPU many directions of a matrix lie side by side, entry by entry: ghost_dot's tile form then reads memory in
    order, and is up to a fifth faster (benchmarks/LOG.md).
    """
    if _side_by_side(len(rows), rows[0].dim(), rows[0].device):
        return torch.stack(rows, -1).movedim(-1, 0)
    return torch.stack(rows)


def readable(v: Tensor) -> Tensor:
    """``v`` (K, O, I) as ``ghost_dot`` reads it without a copy at every call."""
    if _side_by_side(len(v), v.dim() - 1, v.device):
        return v.movedim(0, -1).contiguous().movedim(-1, 0)  # a transposed stack too is read in order
    return v.contiguous()
