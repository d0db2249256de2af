"""Ops on per-example weight gradients of linear layers: argument checks, then ``torch.ops.u2a_fast.<op>``."""

import torch
from torch import Tensor

from u2a_fast._check import Shapes, check_cu_seqlens, check_dtypes, check_sketch

__all__ = ["ghost_dot", "ghost_dot_lowrank", "ghost_norm", "grad_project", "grad_sketch"]


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """Inner products <V_k, G_i> of K directions with the weight gradients of B examples, none of which is formed.

    For a linear layer y_t = W a_t with output gradients g_t, G_i = sum_{t in i} g_t a_t^T, so that
    <V_k, G_i> = sum_{t in i} g_t^T V_k a_t. Cost: 2 K N I O flops. Differentiable in a, g and v.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        v: directions in weight space, (K, O, I). On the CPU 16 and more are fastest side by side: v.stride(0) == 1.

    Returns:
        (K, B); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("ghost_dot")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    shapes.bind("v", v, "K O I")
    check_dtypes("ghost_dot", [("a", a), ("g", g), ("v", v)])
    return torch.ops.u2a_fast.ghost_dot(a, g, cu_seqlens, v)


def ghost_dot_lowrank(a: Tensor, g: Tensor, cu_seqlens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Inner products <L_k R_k^T, G_i> of K directions of rank R with the weight gradients of B examples.

    <L R^T, sum_{t in i} g_t a_t^T> = sum_{t in i} (L^T g_t) . (R^T a_t): neither the directions nor the gradients are
    formed. Cost: 2 K N R (I + O) flops, against 2 K N I O of :func:`ghost_dot`. Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        left: factors on the output side, (K, O, R).
        right: factors on the input side, (K, I, R).

    Returns:
        (K, B); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    op = "ghost_dot_lowrank"
    shapes = Shapes(op)
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    shapes.bind("left", left, "K O R")
    shapes.bind("right", right, "K I R")
    check_dtypes(op, [("a", a), ("g", g), ("left", left), ("right", right)])
    return torch.ops.u2a_fast.ghost_dot_lowrank(a, g, cu_seqlens, left, right)


def ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Squared Frobenius norms of the weight gradients of B examples, none of which is stored.

    ||G_i||^2 = sum_{t,s in i} (a_t . a_s)(g_t . g_s), or the squared entries of G_i tile by tile, whichever is cheaper
    (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679). Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.

    Returns:
        (B); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("ghost_norm")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    check_dtypes("ghost_norm", [("a", a), ("g", g)])
    return torch.ops.u2a_fast.ghost_norm(a, g, cu_seqlens)


def grad_project(a: Tensor, g: Tensor, cu_seqlens: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    """Weight gradients of B examples projected on both sides, P_out^T G_i P_in, without a gradient in memory.

    P_out^T (sum_{t in i} g_t a_t^T) P_in = sum_{t in i} (P_out^T g_t) (P_in^T a_t)^T, the projection of LoGra (Choe et
    al. 2024, arXiv:2405.13954). Cost: 2 N (I P + O Q + P Q) flops. Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        p_in: projection of the inputs, (I, P).
        p_out: projection of the outputs, (O, Q).

    Returns:
        (B, Q, P); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    op = "grad_project"
    shapes = Shapes(op)
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    shapes.bind("p_in", p_in, "I P")
    shapes.bind("p_out", p_out, "O Q")
    check_dtypes(op, [("a", a), ("g", g), ("p_in", p_in), ("p_out", p_out)])
    return torch.ops.u2a_fast.grad_project(a, g, cu_seqlens, p_in, p_out)


def grad_sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, seed: int) -> Tensor:
    """Sketches S vec(G_i) of the weight gradients of B examples, none of which is stored, S drawn from ``seed``.

    E <Sx, Sy> = <x, y>, Var <Sx, Sy> <= 2 |x|^2 |y|^2 / dim (:mod:`u2a_fast.sketch`). Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        dim: entries M of a sketch, from 32 to 8192.
        seed: from 0 to 2^63 - 1; layers whose sketches are added need one each.

    Returns:
        (B, M); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device, ``dim``, ``seed`` or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("grad_sketch")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    check_dtypes("grad_sketch", [("a", a), ("g", g)])
    check_sketch("grad_sketch", dim, seed)
    return torch.ops.u2a_fast.grad_sketch(a, g, cu_seqlens, dim, seed)
