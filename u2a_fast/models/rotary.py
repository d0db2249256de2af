"""Rotary embeddings through one op, in place of a model's own function, and their short backward pass."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models.probe import agree, noise
from u2a_fast.models.tangents import has_tangent

__all__ = ["Rotate", "is_whole", "replaced_rotaries", "short_rotaries", "turned"]

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_NAME = "apply_rotary_pos_emb"


class _Rotary(torch.autograd.Function):
    """``rotary`` of x (1, H, N, E)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The transpose of x cos + rotate(x) sin turns back, each half by the sine of the other.
        return turned(grad, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotary`` of x (1, H, N, E), with cos and sin (1, N, E), as models lay them out."""
    return ops.rotary(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None]


def is_whole(q: Tensor, cos: Tensor) -> bool:
    """Whether whole heads of one packed sequence are turned: some models turn a part of a head."""
    return q.shape[0] == 1 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype


def _rotate(plain: Rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    differentiated = q.requires_grad and k.requires_grad and not (has_tangent(q) or has_tangent(k))
    if not (differentiated and is_whole(q, cos)):
        return plain(q, k, cos, sin)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


@torch.no_grad()
def _is_rotary(plain: Rotate, like: Tensor) -> bool:
    """Whether random inputs show that a model's function computes what the op does."""
    q, angles = noise(1, 2, 5, 8, like=like), noise(1, 5, 4, like=like)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    try:
        want = plain(q, q, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError):  # another signature
        return False
    got = turned(q, cos, sin)
    return want.shape == got.shape and agree(got, want)


@contextmanager
def replaced_rotaries(model: nn.Module, rotate: Callable[..., Any]) -> Iterator[None]:
    """``rotate(plain, q, k, cos, sin)`` in place of the rotary function of the model's code inside the block.

    Other models of the same code see it too. float64 models, which are there to be exact, keep their own.
    """
    replaced: dict[Any, Rotate] = {}
    try:
        for module in model.modules():
            namespace = sys.modules.get(type(module).__module__)
            plain = getattr(namespace, _NAME, None)
            like = next((p for p in module.parameters() if p.is_floating_point()), None)
            if plain is None or like is None or like.dtype == torch.float64 or namespace in replaced:
                continue
            if _is_rotary(plain, like):
                replaced[namespace] = plain
                setattr(namespace, _NAME, partial(rotate, plain))
        yield
    finally:
        for namespace, plain in replaced.items():
            setattr(namespace, _NAME, plain)


def short_rotaries(model: nn.Module) -> Any:
    """Turn queries and keys that need gradients by the op, there and back, for the duration of the block."""
    return replaced_rotaries(model, _rotate)
