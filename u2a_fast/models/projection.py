"""Projections of linear layers' per-example weight gradients, and of directions in the same way.

A projection lets gradients be kept short: the derivative along a direction that is not known yet is estimated from the
projected gradient and the projected direction. A random P with E <P x, P y> = <x, y> errs by chance, around the truth.
A P of orthonormal columns gives the inner product of what lies in its span and nothing of the rest: no variance, and a
bias that depends on how much of gradients and directions the span holds.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a_fast import ops

__all__ = ["Projection", "SecondMoments", "Sketch", "TwoSided", "identity_block", "two_sided"]

EXACT_SIDE = 1024  # of a matrix of second moments: cubic work beyond, and a head's would be as wide as the vocabulary
OVERSAMPLING = 8


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
    """P_out^T G P_in: thin products instead of whole ones (LoGra, Choe et al. 2024, arXiv:2405.13954).

    Which matrices: ``two_sided`` (random), ``SecondMoments.basis`` (principal components), ``identity_block``.

    Attributes:
        p_in: (I, P).
        p_out: (O, Q).
    """

    p_in: Tensor
    p_out: Tensor

    @property
    def dim(self) -> int:
        """Q P."""
        return self.p_in.shape[1] * self.p_out.shape[1]

    def to(self, dtype: torch.dtype) -> "TwoSided":
        """The matrices as a contraction in ``dtype`` wants them."""
        return replace(self, p_in=self.p_in.to(dtype), p_out=self.p_out.to(dtype))

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """P_out^T G_i P_in of every example, flat, (Q P, B)."""
        return ops.grad_project(a, g, cu_seqlens, self.p_in, self.p_out).flatten(1).T

    def project(self, v: Tensor) -> Tensor:
        """P_out^T V P_in of a direction (O, I), flat, (Q P)."""
        return (self.p_out.to(v.dtype).mT @ v @ self.p_in.to(v.dtype)).flatten()


Projection = Sketch | TwoSided


def two_sided(out_features: int, in_features: int, k: int, seed: int, device: torch.device) -> TwoSided:
    """Gaussian matrices of k columns and variance 1/k, unbiased.

    With A = P_out P_out^T and B = P_in P_in^T the estimate is tr(X^T A Y B), and E A = 1, E B = 1. Taking second
    moments of the Wishart matrices one after the other, A given B first,

        Var <P X, P Y> <= (4/k + 4/k^2) |X|^2 |Y|^2:

    per entry kept, k^2 of them, far more than a sketch's. They are drawn on the CPU from ``seed``, so that they are the
    same for every device.

    Returns:
        p_in (I, k) and p_out (O, k), float32.
    """
    generator = torch.Generator().manual_seed(seed)
    p_in, p_out = (torch.randn(n, k, generator=generator) / k**0.5 for n in (in_features, out_features))
    return TwoSided(p_in.to(device), p_out.to(device))


def identity_block(out_features: int, in_features: int, k: int, device: torch.device) -> TwoSided:
    """The leading blocks of the identity: of a gradient, its first min(k, O) rows and min(k, I) columns are kept.

    The trivial selection, which knows nothing of the layer: a baseline that any other projection must beat, and with k
    of the layer's size every entry as it is.

    Returns:
        p_in (I, min(k, I)) and p_out (O, min(k, O)), float32.
    """
    return TwoSided(*(torch.eye(n, min(k, n), device=device) for n in (in_features, out_features)))


class SecondMoments:
    """sum_t a_t a_t^T and sum_t g_t g_t^T of a linear layer's inputs and output gradients, for their principal axes.

    The covariances of K-FAC (Martens and Grosse 2015, arXiv:1503.05671), from which LoGra's PCA initialization takes
    its projections (Choe et al. 2024, arXiv:2405.13954). They are sums over tokens, not centred: a batch's is a product
    in float32 at least, and batches add up in float64. No gradient of an example is formed. The object stands in
    ``Capture`` where a projection stands, and contracts to nothing.

    Sides of more than 1024 are seen through C Omega alone, Omega random with 2 k + 8 columns, from which the leading
    eigenvectors of C are those of the Nystrom approximation C Omega (Omega^T C Omega)^+ (C Omega)^T (Tropp, Yurtsever,
    Udell and Cevher 2017, arXiv:1706.05736): an LM head's matrix would have as many rows as the vocabulary has words.

    Args:
        out_features, in_features: O and I.
        k: columns that a basis has at most.
        seed: of Omega.
        device: where the sums are kept.
    """

    def __init__(self, out_features: int, in_features: int, k: int, seed: int, device: torch.device) -> None:
        self._inputs = _Moment(in_features, min(k, in_features), 2 * seed, device)
        self._outputs = _Moment(out_features, min(k, out_features), 2 * seed + 1, device)

    def to(self, dtype: torch.dtype) -> "SecondMoments":
        """The same in every precision."""
        return self

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Add a batch's tokens, (N, I) and (N, O), except for those that are not finite; returns (0, B)."""
        finite = (a.isfinite().all(1) & g.isfinite().all(1))[:, None]
        for moment, x in ((self._inputs, a), (self._outputs, g)):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            moment.add(torch.where(finite, x, 0.0))
        return g.new_zeros(0, len(cu_seqlens) - 1)

    def basis(self, dtype: torch.dtype) -> TwoSided:
        """The leading eigenvectors, p_in (I, min(k, I)) and p_out (O, min(k, O)), orthonormal up to ``dtype``."""
        return TwoSided(self._inputs.leading().to(dtype), self._outputs.leading().to(dtype))


class _Moment:
    """sum_t x_t x_t^T (n, n), or its product with a random matrix (n, l); in memory from the first tokens on."""

    def __init__(self, size: int, k: int, seed: int, device: torch.device) -> None:
        self._size, self._k, self._seed, self._device = size, k, seed, device
        self._sum: Tensor | None = None
        self._probe: Tensor | None = None
        self._eps = 0.0  # of the products

    def add(self, x: Tensor) -> None:
        if self._sum is None:
            columns = 2 * self._k + OVERSAMPLING
            if self._size > max(EXACT_SIDE, columns):
                generator = torch.Generator().manual_seed(self._seed)
                self._probe = torch.randn(self._size, columns, generator=generator, dtype=x.dtype).to(self._device)
            width = self._size if self._probe is None else columns
            self._sum = torch.zeros(self._size, width, dtype=torch.float64, device=self._device)
            self._eps = torch.finfo(x.dtype).eps
        self._sum += x.mT @ (x if self._probe is None else x @ self._probe)

    def leading(self) -> Tensor:
        """(n, k), orthonormal, the largest eigenvalue first."""
        assert self._sum is not None, "there is nothing to decompose before the first batch"
        if self._probe is None:
            return torch.linalg.eigh(self._sum)[1][:, -self._k :].flip(1)
        core = self._probe.mT.double() @ self._sum
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        # Directions that the sample does not have are rounding, and their inverse roots would drown the others. They
        # become columns of zeros, which the decomposition completes to an orthonormal basis.
        small = values <= values[-1].clamp(min=0) * len(values) * self._eps
        scale = torch.where(small, 0.0, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt())
        return torch.linalg.svd(self._sum @ (vectors * scale), full_matrices=False)[0][:, : self._k]
