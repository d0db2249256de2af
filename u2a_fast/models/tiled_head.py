"""The LM head's own part of many directions: gradients of its weight in tiles, contracted with all at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from u2a_fast import ops
from u2a_fast.models.decoder import Head
from u2a_fast.models.stacks import readable

__all__ = ["TiledHead", "tiled_head_is_cheaper"]


KEPT_BYTES = 256 << 20  # of logits, which are otherwise made twice


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
        self._by_block: dict[torch.dtype, list[Tensor]] = {}
        self._room: Tensor | None = None

    def _directions(self, dtype: torch.dtype, blocks: Sequence[slice]) -> list[Tensor]:
        """The directions of every block's weight as ``ghost_dot`` reads them; made once."""
        if dtype not in self._by_block:
            parts = [self.dweight[:, columns] for columns in blocks] if self.dweight is not None else []
            self._by_block[dtype] = [readable(part.to(dtype)) for part in parts]
        return self._by_block[dtype]

    def propagate(
        self, upstream: Tensor, h: Tensor, target: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of sum_t upstream_t log p(target_t): log-probabilities (M), gradient in h (M, D), derivatives (K, B).

        Args:
            upstream: (M), negative.
            h: what the weight multiplies, (M, D).
            target: token ids, (M).
            cu_seqlens: of the examples' scored tokens, (B + 1).
        """
        weight = self.head.weight.detach()
        blocks = _blocks(len(weight), weight.device)
        directions = self._directions(h.dtype, blocks)
        kept = self._kept(h, target, blocks)
        if kept:
            logp, lse = self._streamed(kept, h, target, blocks)
        else:
            logp, lse = ops.linear_logprob(h, weight, target, self.head.bias, self.head.softcap)
        # -upstream is part of the softmax's exponent.
        shift = (lse - (-upstream).log())[:, None]
        dh = torch.zeros(h.shape, dtype=lse.dtype, device=h.device)
        sums = []
        for i, columns in enumerate(blocks):
            z = kept[i] if kept else self._logits(h, columns, lse.new_empty(len(h), _width(columns)))
            dz = self._logit_gradients(z, columns, shift, upstream, target)
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
        return logp, dh, torch.stack(sums).sum(0)

    def _kept(self, h: Tensor, target: Tensor, blocks: Sequence[slice]) -> list[Tensor]:
        """Room for the logits of every block, (M, block) each, the same from batch to batch; none where they are many.

        Fresh memory would cost as much as the product that is saved.
        """
        dtype = torch.promote_types(h.dtype, torch.float32)
        entries = len(target) * blocks[-1].stop
        if entries * dtype.itemsize > KEPT_BYTES:
            return []
        if self._room is None or len(self._room) < entries or self._room.dtype != dtype:
            self._room = torch.empty(entries, dtype=dtype, device=h.device)
        sizes = [len(target) * _width(columns) for columns in blocks]
        return [part.view(len(target), -1) for part in self._room[:entries].split(sizes)] if entries else []

    def _streamed(
        self, kept: Sequence[Tensor], h: Tensor, target: Tensor, blocks: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exps (M) of the logits, which are written into ``kept``."""
        top = kept[0].new_full((len(target),), -torch.inf)
        total, chosen = torch.zeros_like(top), torch.zeros_like(top)
        for z, columns in zip(kept, blocks, strict=True):
            self._logits(h, columns, z)
            higher = torch.maximum(top, z.amax(1))
            total.mul_((top - higher).exp_()).add_((z - higher[:, None]).exp_().sum(1))
            top = higher
            inside = _inside(target, columns)
            chosen[inside] = z[inside, target[inside] - columns.start]
        lse = top + total.log()
        return chosen - lse, lse

    def _logits(self, h: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of some columns in ``out``, (M, columns), float32 or float64."""
        _product(h, self.head.weight.detach()[columns], out)
        if self.head.bias is not None:
            out += self.head.bias.detach()[columns]
        if self.head.softcap:
            out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return out

    def _logit_gradients(self, z: Tensor, columns: slice, shift: Tensor, upstream: Tensor, target: Tensor) -> Tensor:
        """upstream (e_target - softmax) c'(z) of some columns from their logits, in place of these."""
        slopes = 1 - (z / self.head.softcap).square_() if self.head.softcap else None
        dz = z.sub_(shift).exp_()
        inside = _inside(target, columns)
        dz[inside, target[inside] - columns.start] += upstream[inside]
        return dz if slopes is None else dz.mul_(slopes)


def _blocks(vocabulary: int, device: torch.device) -> list[slice]:
    # A block of d NLL / d logits stays in the caches of a core, or fills a GPU.
    step = 512 if device.type == "cpu" else 8192
    return [slice(first, min(first + step, vocabulary)) for first in range(0, vocabulary, step)]


def _width(columns: slice) -> int:
    return columns.stop - columns.start


def _inside(target: Tensor, columns: slice) -> Tensor:
    return ((target >= columns.start) & (target < columns.stop)).nonzero()[:, 0]


def _product(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """h W^T in ``out``'s dtype: logits rounded to 16 bits would be off by their spread's hundredth."""
    if h.dtype == out.dtype:
        torch.mm(h, weight.T, out=out)
    elif h.is_cuda:
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(h.to(out.dtype), weight.to(out.dtype).T, out=out)
