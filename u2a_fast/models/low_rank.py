"""Low-rank directions of linear layers: V = L diag(s) R^T + E, and how far E can move an inner product.

With L (O, r) and R (I, r) orthonormal, P = 1 - L L^T and Q = 1 - R R^T, what truncation leaves out is
E = P V Q + (V - L diag(s) R^T - P V Q), whose second part vanishes for exact singular vectors. Hence for one example

    |<E, G_i>| = |sum_t g_t^T E a_t| <= ||P V Q||_2 sum_t ||P g_t|| ||Q a_t|| + leak sum_t ||g_t|| ||a_t||

with leak its Frobenius norm, and ||P g||^2 = ||g||^2 - ||L^T g||^2 comes from the thin products that the score needs
anyway. Nothing is assumed of how L and R were found, so the bound holds for a randomized decomposition too.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a_fast import ops
from u2a_fast.models.decoder import Head, segment_sum

__all__ = ["BoundedLowRank", "LowRank", "LowRankHead", "Spectrum"]


@dataclass(frozen=True)
class LowRank:
    """K directions of one (O, I) weight, truncated: L_k diag(s_k) R_k^T.

    Attributes:
        left: (K, O, r), orthonormal columns.
        right: (K, I, r), orthonormal columns.
        singular: (K, r).
    """

    left: Tensor
    right: Tensor
    singular: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.singular.shape[-1]

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The factors as a contraction in ``dtype`` wants them."""
        left = (self.left * self.singular[:, None]).to(dtype).contiguous()
        return replace(self, left=left, right=self.right.to(dtype).contiguous())

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """<L_k diag(s_k) R_k^T, G_i>, (K, B); of factors that went through ``to``."""
        return ops.ghost_dot_lowrank(a, g, cu_seqlens, self.left, self.right)


@dataclass(frozen=True)
class BoundedLowRank(LowRank):
    """The same, with a bound on what was left out, for float32 and float64.

    Attributes:
        tail: (K), at least ||P_k V_k Q_k||_2.
        leak: (K), at least ||V_k - L_k diag(s_k) R_k^T - P_k V_k Q_k||_F.
        norm: (K), ||V_k||_F.
        defect: (K), at least ||L_k^T L_k - 1||_F and ||R_k^T R_k - 1||_F.
    """

    tail: Tensor
    leak: Tensor
    norm: Tensor
    defect: Tensor

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The factors in ``dtype``; the bound was made for factors of that precision."""
        values = {name: value.to(dtype).contiguous() for name, value in vars(self).items()}
        return replace(self, **values)

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Inner products (K, B), then bounds of |<E_k, G_i>| (K, B): (2K, B).

        The bounds allow for the rounding of this and of the exact contraction. With unit roundoff u an inner product
        of n terms is off by at most n u ||x|| ||y|| (Higham 2002, section 3.1), so ||L^T g||^2 by 2 sqrt(r) O u
        ||g||^2, and both contractions by (1 + sqrt(r)) (O + I + r) u ||V||_F sum_t ||g_t|| ||a_t||.
        """
        unit = torch.finfo(g.dtype).eps / 2
        root = 1 + self.rank**0.5
        x, y = a @ self.right, g @ self.left
        values = (x * self.singular[:, None] * y).sum(-1)
        length_a, length_g = a.square().sum(-1), g.square().sum(-1)
        outside_a = self._outside(length_a, x, 2 * root * a.shape[1] * unit)
        outside_g = self._outside(length_g, y, 2 * root * g.shape[1] * unit)
        rounding = root * (a.shape[1] + g.shape[1] + self.rank) * unit * self.norm
        bounds = self.tail[:, None] * outside_a * outside_g
        bounds = bounds + (self.leak + rounding)[:, None] * (length_a * length_g).sqrt()
        # sums of positive terms are off by less than this, relatively, and so are the square roots
        bounds = bounds * (1 + (a.shape[0] + a.shape[1] + g.shape[1]) * unit)
        return segment_sum(torch.cat([values, bounds]), cu_seqlens)

    def _outside(self, squared: Tensor, thin: Tensor, rounding: float) -> Tensor:
        """Upper bound of the length of vectors' parts outside of the factors' span, (K, N)."""
        inside = thin.square().sum(-1)
        return ((squared - inside).clamp(min=0) + (rounding + self.defect)[:, None] * squared).sqrt()


@dataclass(frozen=True)
class Spectrum:
    """One weight's leading singular vectors: how the bound falls with the rank, which ranks are planned by.

    Attributes:
        left: (O, R), right: (I, R), orthonormal columns.
        singular: (R + 1).
        ranks: G increasing ranks from 1 to R.
    """

    left: Tensor
    right: Tensor
    singular: Tensor
    ranks: tuple[int, ...]

    def to(self, dtype: torch.dtype) -> "Spectrum":
        """In the precision of a contraction."""
        left, right = self.left.to(dtype).contiguous(), self.right.to(dtype).contiguous()
        return replace(self, left=left, right=right, singular=self.singular.to(dtype))

    def contract(self, a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        """sigma_{r+1} sum_t ||P g_t|| ||Q a_t|| for every rank of ``ranks``: (G, B)."""
        rows = []
        x, y = (a @ self.right).square().cumsum(1), (g @ self.left).square().cumsum(1)
        length_a, length_g = a.square().sum(1), g.square().sum(1)
        for r in self.ranks:
            outside = (length_a - x[:, r - 1]).clamp(min=0) * (length_g - y[:, r - 1]).clamp(min=0)
            rows.append(self.singular[r] * outside.sqrt())
        return segment_sum(torch.stack(rows), cu_seqlens)


class LowRankHead:
    """The head's own part of a low-rank direction, from its backward pass.

    d NLL / d logits (M, V) never exists outside of ``linear_logprob_backward``, which gives its product with the
    weight. With r columns L beside the weight, and r zeros behind the hidden states so that logits stay as they are,
    the same pass gives its product with L too, and <L diag(s) R^T, G_i> = sum_t (R^T h_t) . diag(s) (L^T dz_t).

    Args:
        head: the plain linear head.
        direction: of its weight.
        dbias: (K, V) of its bias, or None.
    """

    def __init__(self, head: Head, direction: LowRank, dbias: Tensor | None) -> None:
        self.head, self.direction, self.dbias = head, direction, dbias
        self._beside: dict[torch.dtype, Tensor] = {}

    @property
    def rule(self) -> str:
        """What contracts the head's gradients, in words."""
        return f"beside its backward pass, rank {self.direction.rank}"

    def _weight(self) -> Tensor:
        weight = self.head.weight.detach()
        if weight.dtype not in self._beside:
            columns = [self.direction.left.permute(1, 0, 2).flatten(1)]
            if self.dbias is not None:
                columns.append(self.dbias.T)
            self._beside[weight.dtype] = torch.cat([weight, *(c.to(weight) for c in columns)], 1)
        return self._beside[weight.dtype]

    def propagate(
        self, upstream: Tensor, h: Tensor, target: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of sum_t upstream_t log p(target_t): log-probabilities (M), gradient in h (M, D), derivatives (K, B)."""
        logp, lse = ops.linear_logprob(h, self.head.weight.detach(), target, self.head.bias, self.head.softcap)
        weight, width = self._weight(), h.shape[1]
        padded = torch.nn.functional.pad(h, (0, weight.shape[1] - width))
        out, _, _ = torch.ops.u2a_fast.linear_logprob_backward(
            upstream,
            torch.zeros_like(upstream),
            padded,
            weight,
            target,
            lse,
            self.head.bias,
            self.head.softcap,
            True,
            False,
        )
        beside = out[:, width:].to(torch.promote_types(out.dtype, torch.float32))
        return logp, out[:, :width], segment_sum(self._own(h, beside), cu_seqlens)

    def _own(self, h: Tensor, beside: Tensor) -> Tensor:
        k, _, r = self.direction.left.shape
        thin = (h @ self.direction.right.to(h.dtype)) * self.direction.singular[:, None]  # (K, M, r)
        part = (thin * beside[:, : k * r].unflatten(1, (k, r)).movedim(1, 0)).sum(-1)
        return part if self.dbias is None else part + beside[:, k * r :].T
