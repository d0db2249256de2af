"""Random inputs that show what a module computes, before something shorter is put in its place."""

import torch
from torch import Tensor

__all__ = ["agree", "noise"]


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether every row is within the rounding of a few operations, which ``got`` may round once."""
    error, size = (got - want).abs().amax(-1), want.abs().amax(-1)
    return bool((error <= 8 * torch.finfo(want.dtype).eps * size).all())


def noise(*shape: int, like: Tensor) -> Tensor:
    """The same normal draws every time, as ``like`` is placed and typed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
