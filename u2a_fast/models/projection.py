"""Random projections of linear layers' per-example weight gradients, and of directions in the same way.

A projection P with E <P x, P y> = <x, y> lets gradients be kept short: the derivative along a direction that is not
known yet is estimated from the projected gradient and the projected direction.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a_fast import ops

__all__ = ["Projection", "Sketch", "TwoSided", "two_sided"]


@dataclass(frozen=True)
class Sketch:
    """The sparse map of ``u2a_fast.sketch``: Var <S x, S y> <= 2 |x|^2 |y|^2 / dim; sketches of layers add up.

    Attributes:
        dim: entries.
        seed: one a layer.
    """

    dim: int
    seed: int

    def to(self, dtype: torch.dtype) -> "Sketch":
        """The same in every precision."""
        return self

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """S vec(G_i) of every example, (dim, B)."""
        return ops.grad_sketch(a, g, cu_seqlens, self.dim, self.seed).T

    def project(self, v: Tensor) -> Tensor:
        """S vec(V) of a direction (O, I), (dim): V is the gradient of one example whose inputs or outputs are units."""
        rows, columns = v.shape
        eye = torch.eye(min(v.shape), dtype=v.dtype, device=v.device)
        a, g = (v, eye) if rows <= columns else (eye, v.mT)
        cu_seqlens = torch.tensor([0, len(eye)], dtype=torch.int32, device=v.device)
        return ops.grad_sketch(a.contiguous(), g.contiguous(), cu_seqlens, self.dim, self.seed)[0]


@dataclass(frozen=True)
class TwoSided:
    """P_out^T G P_in (LoGra, Choe et al. 2024, arXiv:2405.13954) with Gaussian P of variance 1/k in k columns.

    With A = P_out P_out^T and B = P_in P_in^T the estimate is tr(X^T A Y B), and E A = 1, E B = 1. Taking second
    moments of the Wishart matrices one after the other, A given B first,

        Var <P X, P Y> <= (4/k + 4/k^2) |X|^2 |Y|^2:

    per entry kept, k^2 of them, far more than a sketch's, in exchange for thin products instead of whole ones.

    Attributes:
        p_in: (I, k).
        p_out: (O, k).
    """

    p_in: Tensor
    p_out: Tensor

    @property
    def dim(self) -> int:
        """k^2."""
        return self.p_in.shape[1] * self.p_out.shape[1]

    def to(self, dtype: torch.dtype) -> "TwoSided":
        """The matrices as a contraction in ``dtype`` wants them."""
        return replace(self, p_in=self.p_in.to(dtype), p_out=self.p_out.to(dtype))

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """P_out^T G_i P_in of every example, flat, (k^2, B)."""
        return ops.grad_project(a, g, cu_seqlens, self.p_in, self.p_out).flatten(1).T

    def project(self, v: Tensor) -> Tensor:
        """P_out^T V P_in of a direction (O, I), flat, (k^2)."""
        return (self.p_out.to(v.dtype).mT @ v @ self.p_in.to(v.dtype)).flatten()


Projection = Sketch | TwoSided


def two_sided(out_features: int, in_features: int, k: int, seed: int, device: torch.device) -> TwoSided:
    """Gaussian matrices of k columns drawn on the CPU from ``seed``, so that they are the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    p_in, p_out = (torch.randn(n, k, generator=generator) / k**0.5 for n in (in_features, out_features))
    return TwoSided(p_in.to(device), p_out.to(device))
