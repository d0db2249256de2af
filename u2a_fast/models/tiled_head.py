"""The LM head's own part of many directions: gradients of its weight in tiles, contracted with all at once."""

import torch
from torch import Tensor

from u2a_fast import ops
from u2a_fast.models.decoder import Head

__all__ = ["TiledHead", "tiled_head_is_cheaper"]


def _block_columns(device: torch.device) -> int:
    # A block of d NLL / d logits stays in the caches of a core, or fills a GPU.
    return 512 if device.type == "cpu" else 8192


def tiled_head_is_cheaper(head: Head, directions: int, dtype: torch.dtype) -> bool:
    """Whether K directions cost less here, about 3 products of the head's size, than the 1 + K of their tangents.

    On the CPU 16-bit logits are recomputed in float32, at a quarter of the rate (u2a_fast docs/design.md, section 2).
    """
    slow = head.weight.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return directions >= (6 if slow else 2)


class TiledHead:
    """The head's own part of K directions, from its backward pass, block of the vocabulary by block.

    With dz = d NLL / d logits, G_i = sum_t dz_t h_t^T, whose contraction with K directions is ``ghost_dot``: for long
    examples one product of the head's size for all K, where ``linear_logprob_jvp`` takes one each.

    Attributes:
        rule: what contracts the head's gradients, in words.

    Args:
        head: the plain linear head.
        dweight: (K, V, D) of its weight, or None.
        dbias: (K, V) of its bias, or None.
    """

    rule = "ghost_dot, block of the vocabulary by block"

    def __init__(self, head: Head, dweight: Tensor | None, dbias: Tensor | None) -> None:
        self.head, self.dweight, self.dbias = head, dweight, dbias
        self._blocks: dict[torch.dtype, list[Tensor]] = {}

    def _directions(self, dtype: torch.dtype, step: int) -> list[Tensor]:
        """The directions of every block's weight, each contiguous; made once."""
        if dtype not in self._blocks:
            blocks = self.dweight.split(step, 1) if self.dweight is not None else ()
            self._blocks[dtype] = [block.to(dtype).contiguous() for block in blocks]
        return self._blocks[dtype]

    def backward(
        self, upstream: Tensor, h: Tensor, target: Tensor, lse: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient in h (M, D) and directional derivatives (K, B) of sum_t upstream_t log p(target_t).

        Args:
            upstream: (M), negative.
            h: what the weight multiplies, (M, D).
            target: token ids, (M).
            lse: log-sum-exps of the logits, (M).
            cu_seqlens: of the examples' scored tokens, (B + 1).
        """
        weight = self.head.weight.detach()
        step = _block_columns(weight.device)
        directions = self._directions(h.dtype, step)
        dh = torch.zeros(h.shape, dtype=lse.dtype, device=h.device)
        sums = []
        shift = (lse - (-upstream).log())[:, None]
        for i, first in enumerate(range(0, len(weight), step)):
            columns = slice(first, min(first + step, len(weight)))
            dz = self._logit_gradients(h, weight[columns], columns, shift, upstream, target)
            if dh.dtype == h.dtype:
                dh.addmm_(dz, weight[columns])
            else:
                dz = dz.to(h.dtype)
                dh += dz @ weight[columns]
            if directions:
                sums.append(ops.ghost_dot(h, dz, cu_seqlens, directions[i]))
            if self.dbias is not None:
                dbias = self.dbias[:, columns, None].to(dz.dtype).contiguous()
                sums.append(ops.ghost_dot(dz.new_ones(len(dz), 1), dz, cu_seqlens, dbias))
        return dh, torch.stack(sums).sum(0)

    def _logit_gradients(
        self, h: Tensor, weight: Tensor, columns: slice, shift: Tensor, upstream: Tensor, target: Tensor
    ) -> Tensor:
        """upstream (e_target - softmax) c'(z) of some columns, (M, columns), float32 or float64.

        -upstream is part of the exponent: ``shift`` is the log-sum-exp less its logarithm.
        """
        softcap, bias = self.head.softcap, self.head.bias
        z = _product(h, weight, shift.dtype)
        if bias is not None:
            z += bias.detach()[columns]
        slopes = None
        if softcap:
            z = torch.tanh(z / softcap)
            slopes = 1 - z.square()
            z *= softcap
        dz = z.sub_(shift).exp_()
        inside = ((target >= columns.start) & (target < columns.stop)).nonzero()[:, 0]
        dz[inside, target[inside] - columns.start] += upstream[inside]
        return dz if slopes is None else dz.mul_(slopes)


def _product(h: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """h W^T in ``dtype``: logits rounded to 16 bits would be off by their spread's hundredth."""
    if h.dtype == dtype:
        return h @ weight.T
    if h.is_cuda:
        return torch.mm(h, weight.T, out_dtype=dtype)
    return h.to(dtype) @ weight.to(dtype).T
