"""Ops on what lies between a decoder's matrix products: argument checks, then ``torch.ops.u2a_fast.<op>``."""

import math

import torch
from torch import Tensor

from u2a_fast._check import Shapes, check_dtypes

__all__ = ["glu_jvp", "rms_norm_jvp", "rotary"]


def glu_jvp(
    gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor | None = None, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """A gated linear unit f(gate) * up and its tangent f'(gate) dgate up + f(gate) dup in one pass over memory.

    f is SiLU (SwiGLU; Shazeer 2020, arXiv:2002.05202) or the tanh approximation of GELU (GeGLU). Not differentiable.
    The backward pass of f(gate) * up is the same op: ``glu_jvp(gate, grad, up)`` gives the gradients in up and in gate.

    Args:
        gate: (N, I).
        up: (N, I).
        dgate: tangent of gate, (N, I).
        dup: tangent of up, (N, I), or None for zero.
        gelu: GELU by tanh instead of SiLU.

    Returns:
        Value and tangent, (N, I) in gate's dtype.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("glu_jvp")
    named = [("gate", gate), ("up", up), ("dgate", dgate), ("dup", dup)]
    for name, x in named:
        if x is not None:
            shapes.bind(name, x, "N I")
    check_dtypes("glu_jvp", named)
    return torch.ops.u2a_fast.glu_jvp(gate, up, dgate, dup, gelu)


def rms_norm_jvp(
    x: Tensor, dx: Tensor, scale: Tensor, dscale: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """An RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467) and its tangent in one pass over memory.

    y = n * scale with n = x / sqrt(mean(x^2) + eps); dy = (dx - n mean(n dx)) / sqrt(mean(x^2) + eps) * scale + n *
    dscale. Not differentiable.

    Args:
        x: (N, D).
        dx: tangent of x, (N, D).
        scale: (D) in the accumulation dtype (float32, or float64 for float64 x).
        dscale: tangent of scale, (D), or None for zero.
        eps: finite, >= 0.

    Returns:
        Value and tangent, (N, D) in x's dtype.

    Raises:
        ValueError: a shape, a device or eps does not fit.
        TypeError: a dtype does not fit.
    """
    op = "rms_norm_jvp"
    shapes = Shapes(op)
    for name, tensor, letters in (("x", x, "N D"), ("dx", dx, "N D"), ("scale", scale, "D"), ("dscale", dscale, "D")):
        if tensor is not None:
            shapes.bind(name, tensor, letters)
    check_dtypes(op, [("x", x), ("dx", dx)])
    accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("scale", scale), ("dscale", dscale)):
        if tensor is not None and tensor.dtype != accumulation:
            raise TypeError(f"[{op}] expected {name} of dtype {accumulation} (for x of {x.dtype}), got {tensor.dtype}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"[{op}] expected eps finite and >= 0, got {eps}")
    return torch.ops.u2a_fast.rms_norm_jvp(x, dx, scale, dscale, eps)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding in the half-split form of transformers (Su et al. 2021, arXiv:2104.09864).

    x * cosine + rotate(x) * sine with rotate((a, b)) = (-b, a); linear in x, so it is its own tangent. Not
    differentiable.

    Args:
        x: queries or keys, (N, H, E) with E even.
        cosine: (N, E).
        sine: (N, E).

    Returns:
        (N, H, E) in x's dtype.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("rotary")
    named = [("x", x, "N H E"), ("cosine", cosine, "N E"), ("sine", sine, "N E")]
    for name, tensor, letters in named:
        shapes.bind(name, tensor, letters)
    if x.shape[-1] % 2:
        raise ValueError(f"[rotary] expected x of an even number of features, got {x.shape[-1]}")
    check_dtypes("rotary", [(name, tensor) for name, tensor, _ in named])
    return torch.ops.u2a_fast.rotary(x, cosine, sine)
