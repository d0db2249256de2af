"""How stacks of directions lie in memory, so that ``ghost_dot`` reads them as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["readable", "stack"]

SIDE_BY_SIDE = 16  # directions at least: kLeastSideBySide in csrc/kernels.h


def stack(rows: Sequence[Tensor]) -> Tensor:
    """K tensors of one shape as (K, *shape).

    On the CPU many directions of a matrix lie side by side, entry by entry: ghost_dot's tile form then reads memory in
    order, and is up to a fifth faster (benchmarks/LOG.md).
    """
    if len(rows) >= SIDE_BY_SIDE and rows[0].dim() == 2 and rows[0].device.type == "cpu":
        return torch.stack(list(rows), -1).movedim(-1, 0)
    return torch.stack(list(rows))


def readable(v: Tensor) -> Tensor:
    """``v`` (K, O, I) as ``ghost_dot`` reads it without a copy at every call."""
    side_by_side = len(v) >= SIDE_BY_SIDE and v.device.type == "cpu" and v.stride(0) == 1 and v.stride(2) != 1
    return v if side_by_side else v.contiguous()
