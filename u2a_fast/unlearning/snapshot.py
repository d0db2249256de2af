"""theta_0: one copy of the trainable parameters, for the proximal term and as the reference model.

A reference model differs from the model in its trainable parameters alone, so their copy, swapped in for a moment, is
the reference. For a PEFT model that copy is as small as its adapters, and right also where they start from trained
values (disabling them would give the base model instead).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from u2a_fast.models.parameters import selected_parameters

__all__ = ["ParameterSnapshot", "restore", "save_trainable", "without_dropout"]


class _SquaredDistance(torch.autograd.Function):
    """||p - p_0||^2, which keeps no difference for its backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(p, start)
        accumulate = torch.promote_types(p.dtype, torch.float32)
        return (p.to(accumulate) - start.to(accumulate)).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, start = ctx.saved_tensors
        return ((p.to(grad.dtype) - start.to(grad.dtype)) * (2 * grad)).to(p.dtype), None


class ParameterSnapshot:
    """A copy of the parameters of ``model`` that require gradients, by name.

    Attributes:
        values: name -> tensor, in the parameters' own precision and place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in selected_parameters(model).items()}

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        named = dict(model.named_parameters())
        if missing := [name for name in self.values if name not in named]:
            raise ValueError(f"[snapshot] expected the model that it was taken of, got one without {missing[:3]}")
        return {name: named[name] for name in self.values}

    def squared_distance(self, model: nn.Module) -> Tensor:
        """||theta - theta_0||^2, differentiable in ``model``; float32, or float64 for a float64 model."""
        return torch.stack(
            [_SquaredDistance.apply(p, self.values[name]) for name, p in self._parameters(model).items()]
        ).sum()

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Make ``model`` the reference for the duration of the block; nothing is copied."""
        parameters = self._parameters(model)
        current = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self.values[name]
            yield
        finally:
            for name, p in parameters.items():
                p.data = current[name]

    def to(self, device: torch.device) -> None:
        """Move the copy to where the model computes."""
        self.values = {name: value.to(device) for name, value in self.values.items()}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def save_trainable(model: nn.Module, path: Path) -> None:
    """Write the trainable parameters of ``model`` as safetensors."""
    save_file({name: p.detach().contiguous().cpu() for name, p in selected_parameters(model).items()}, path)


def restore(model: nn.Module, values: Mapping[str, Tensor] | Path) -> None:
    """Copy values (or the safetensors file of ``save_trainable``) into the parameters of ``model``."""
    stored = load_file(values) if isinstance(values, Path) else values
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in stored.items():
            named[name].copy_(value)
