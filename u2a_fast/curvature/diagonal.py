"""Preconditioners that stand for (H + mu I)^-1: the identity, and the diagonal of the Fisher information."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Protocol

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Example
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.models.parameters import evaluation_mode

__all__ = ["Curvature", "DiagonalFisher", "Identity", "check_damping"]


class Curvature(Protocol):
    """The one thing that scoring asks of a curvature."""

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(H + mu I)^-1 gradient, by parameter name."""
        ...


class Identity:
    """H + mu I = I: exact where the inner problem is proximal only, up to its scale."""

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient itself."""
        return dict(gradient)


def check_damping(damping: float) -> None:
    """Raise ValueError for a damping that makes the diagonal no preconditioner."""
    if not 0 < damping < inf:
        raise ValueError(f"[DiagonalFisher] expected a finite damping > 0, got {damping}")


class DiagonalFisher:
    """The diagonal of the empirical Fisher, F = mean_i (grad NLL_i)^2, with damping mu = damping * mean(F).

    What a few steps of Adam do to a gradient, up to a square root (its denominator is the root of this average), and
    the diagonal that elastic weight consolidation uses (Kirkpatrick et al. 2017, arXiv 1612.00796) with the data's
    own labels.

    Args:
        model: a transformers causal LM or a PEFT model around one.
        examples: token examples that the average runs over, one backward pass each (3 units: a few hundred serve);
            one that does not fit in memory is left out, with a warning.
        names: names of ``model.named_parameters()``.
        damping: mu over the mean of F, dimensionless.
        reduction: NLL_i is the ``"mean"`` or the ``"sum"`` over example i's scored tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        names: Sequence[str],
        *,
        damping: float = 0.1,
        reduction: str = "mean",
    ) -> None:
        check_damping(damping)
        if not examples:
            raise ValueError("[DiagonalFisher] expected at least one example, got none")
        parameters = dict(model.named_parameters())
        chosen = [parameters[name] for name in names]

        def gradients(_: list[int], alone: Sequence[Example]) -> Sequence[Tensor | None]:
            nll = -sequence_logprobs(model, alone, reduction=reduction)[0]
            return torch.autograd.grad(nll, chosen, allow_unused=True)

        def attempt(room: Room) -> list[Tensor]:
            squares = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in chosen]
            for _, grads in room.each([([i], [example]) for i, example in enumerate(examples)], gradients):
                for square, grad in zip(squares, grads or [None] * len(squares), strict=True):
                    if grad is not None:
                        square.addcmul_(grad.to(square.dtype), grad.to(square.dtype), value=1 / len(examples))
            if len(room.unfit) == len(examples):
                raise torch.OutOfMemoryError("[DiagonalFisher] none of the examples fits in memory, each alone")
            if room.unfit:
                torch._foreach_mul_(squares, len(examples) / (len(examples) - len(room.unfit)))
            return squares

        with evaluation_mode(model, chosen):
            squares = TokenBudget(1).fit("curvature", attempt, unfit="are left out of it")
        mean = sum(s.sum(dtype=torch.float64).item() for s in squares) / sum(s.numel() for s in squares)
        if not mean > 0:
            raise ValueError(
                f"[DiagonalFisher] expected gradients that are finite and not all zero, mean square is {mean}"
            )
        self.diagonal = dict(zip(names, squares, strict=True))
        self.mu = damping * mean

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """gradient / (F + mu), element by element."""
        return {name: g / (self.diagonal[name] + self.mu) for name, g in gradient.items()}
