"""Ops of the language-model head: argument checks, then ``torch.ops.u2a_fast.<op>``."""

import torch
from torch import Tensor

from u2a_fast._check import Shapes, check_dtypes, check_softcap, check_target

__all__ = ["linear_logprob", "linear_logprob_backward", "linear_logprob_jvp"]


def _bind_head(shapes: Shapes, h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float) -> None:
    shapes.bind("h", h, "N D")
    shapes.bind("weight", weight, "V D")
    check_target(shapes, target)
    if bias is not None:
        shapes.bind("bias", bias, "V")
    check_softcap(shapes.op, softcap)


def linear_logprob(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target tokens under a linear head, without its logits in memory.

    log p_t = c(z_t)[target_t] - lse_t with z_t = W h_t + b, lse_t = log sum_v exp c(z_t)[v] and the soft cap
    c(z) = softcap tanh(z / softcap) of Gemma 2 (0: no cap). Cost: 2 N D V flops in one pass over the vocabulary.
    Differentiable in h, weight and bias through both outputs.

    Args:
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        bias: head biases, (V), or None.
        softcap: finite, >= 0.

    Returns:
        log p(target) (N) and the log-sum-exp (N); float32, or float64 for float64 arguments.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    _bind_head(Shapes("linear_logprob"), h, weight, target, bias, softcap)
    check_dtypes("linear_logprob", [("h", h), ("weight", weight), ("bias", bias)])
    return torch.ops.u2a_fast.linear_logprob(h, weight, target, bias, softcap)


def linear_logprob_backward(
    grad_logp: Tensor,
    grad_lse: Tensor,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    need_h: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_t grad_logp_t log p_t + grad_lse_t lse_t, with the logits recomputed tile by tile.

    With p_t the softmax: dz_t = c'(z_t) (grad_logp_t e_target + (grad_lse_t - grad_logp_t) p_t), dh = dz W,
    dW = dz^T h, db = sum_t dz_t. Cost: 2 N D V flops, and as many again for each of h and weight. Not differentiable.

    Args:
        grad_logp: upstream gradients of the log-probabilities, (N) in the accumulation dtype.
        grad_lse: upstream gradients of the log-sum-exp, (N) in the accumulation dtype.
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        lse: second output of :func:`linear_logprob`, (N) in the accumulation dtype.
        bias: head biases, (V), or None.
        softcap: finite, >= 0.
        need_h: whether to compute the gradient in h.
        need_weight: whether to compute the gradients in weight and bias.

    Returns:
        Gradients in h (N, D) in its dtype, and in weight (V, D) and bias (V) in the accumulation dtype (float32, or
        float64 for float64 arguments). A gradient that is not needed has length 0 along its first axis.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    op = "linear_logprob_backward"
    shapes = Shapes(op)
    _bind_head(shapes, h, weight, target, bias, softcap)
    check_dtypes(op, [("h", h), ("weight", weight), ("bias", bias)])
    accumulation = torch.float64 if h.dtype == torch.float64 else torch.float32
    for name, x in (("grad_logp", grad_logp), ("grad_lse", grad_lse), ("lse", lse)):
        shapes.bind(name, x, "N")
        if x.dtype != accumulation:
            raise TypeError(f"[{op}] expected {name} of dtype {accumulation} (for h of {h.dtype}), got {x.dtype}")
    return torch.ops.u2a_fast.linear_logprob_backward(
        grad_logp, grad_lse, h, weight, target, lse, bias, softcap, need_h, need_weight
    )


def linear_logprob_jvp(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    dh: Tensor | None = None,
    dweight: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, their log-sum-exp and K directional derivatives of them in one pass over the vocabulary.

    dlog p_kt = dc_kt[target_t] - sum_v p_tv dc_kt[v] with dc_k = c'(z) (W dh_k + dW_k h + db_k). Not differentiable.
    Cost: 2 N D V flops, and 2 K N D V for each of dh and dweight.

    Args:
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        dh: tangents of h, (K, N, D), or None for zero; at least one of dh and dweight is given.
        dweight: tangents of weight, (K, V, D), or None for zero.
        bias: head biases, (V), or None.
        dbias: tangents of bias, (K, V), or None for zero.
        softcap: finite, >= 0.

    Returns:
        log p(target) (N), the log-sum-exp (N) and the derivatives of log p(target) (K, N); float32, or float64 for
        float64 arguments.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit, or neither dh nor dweight is given.
        TypeError: a dtype does not fit.
    """
    op = "linear_logprob_jvp"
    shapes = Shapes(op)
    _bind_head(shapes, h, weight, target, bias, softcap)
    if dh is None and dweight is None:
        raise ValueError(f"[{op}] expected dh or dweight to be given, got neither")
    for name, x, letters in (("dh", dh, "K N D"), ("dweight", dweight, "K V D"), ("dbias", dbias, "K V")):
        if x is not None:
            shapes.bind(name, x, letters)
    named = [("h", h), ("weight", weight), ("dh", dh), ("dweight", dweight), ("bias", bias), ("dbias", dbias)]
    check_dtypes(op, named)
    return torch.ops.u2a_fast.linear_logprob_jvp(h, weight, target, dh, dweight, bias, dbias, softcap)
