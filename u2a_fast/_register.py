"""Operator registration: one schema an op, inferred from its reference, and up to three implementations behind it.

``torch.ops.u2a_fast.<op>`` dispatches to the C++ kernel for CPU tensors, to the Triton launcher for CUDA tensors and to
the reference everywhere else: on meta and fake tensors (where it is the shape inference) and on machines where a
kernel could not be built. The reference, the C++ function and the launcher of an op share one name.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

__all__ = ["OPS", "extension_error", "implementations"]

OPS: tuple[str, ...] = tuple(reference.__all__)

_NAMESPACE = "u2a_fast"
_KERNELS = {"cpu": "CPU", "cuda": "CUDA"}


def _load_extension() -> str | None:
    """Import the C++ kernels; return why they are not there, or None."""
    if importlib.util.find_spec("u2a_fast._C") is None:
        return "the extension u2a_fast._C was not built"
    try:
        importlib.import_module("u2a_fast._C")
    except ImportError as error:
        message = f"the extension u2a_fast._C was built but does not load: {error}"
        warnings.warn(f"[u2a_fast] {message}; the references serve instead", stacklevel=2)
        return message
    return None


def _triton_launcher(name: str) -> Callable[..., Any]:
    """A launcher that imports its Triton kernel at the first call, so that CPU users never pay for it."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        kernel = getattr(importlib.import_module(f"u2a_fast.kernels.{name}"), name)
        return kernel(*args, **kwargs)

    return launch


def _define_ops() -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    has_triton = importlib.util.find_spec("triton") is not None
    for name in OPS:
        function = getattr(reference, name)
        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        if has_triton and importlib.util.find_spec(f"u2a_fast.kernels.{name}") is not None:
            library.impl(name, _triton_launcher(name), "CUDA")
    return library


def implementations(op: str) -> tuple[str, ...]:
    """Backends that serve ``op`` here: "reference", and "cpu" (C++) and "cuda" (Triton) where registered."""
    qualified = f"{_NAMESPACE}::{op}"
    kernels = [name for name, key in _KERNELS.items() if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)]
    return ("reference", *kernels)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, parent, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, parent)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    grads = torch.ops.u2a_fast.attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.window, ctx.softcap
    )
    return (*grads, None, None, None, None, None)


def _ghost_dot_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ghost_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """Gradients of sum_kt r_kt g_t^T V_k a_t, linear in a, g and v, with r_kt the gradient at token t's example."""
    a, g, cu_seqlens, v = ctx.saved_tensors
    acc = grad.dtype
    rows = torch.repeat_interleave(grad, cu_seqlens.diff(), dim=1, output_size=a.shape[0])
    need_a, need_g, _, need_v = ctx.needs_input_grad
    grad_a = torch.einsum("kn,no,koi->ni", rows, g.to(acc), v.to(acc)).to(a.dtype) if need_a else None
    grad_g = torch.einsum("kn,ni,koi->no", rows, a.to(acc), v.to(acc)).to(g.dtype) if need_g else None
    grad_v = torch.einsum("kn,no,ni->koi", rows, g.to(acc), a.to(acc)).to(v.dtype) if need_v else None
    return grad_a, grad_g, None, grad_v


def _linear_logprob_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]
) -> None:
    h, weight, target, bias, softcap = inputs
    ctx.save_for_backward(h, weight, target, output[1], bias)
    ctx.softcap = softcap


def _linear_logprob_backward(
    ctx: Any, grad_logp: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
    h, weight, target, lse, bias = ctx.saved_tensors
    # trailing arguments left at their defaults are missing from needs_input_grad
    need_h, need_weight, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:])
    grad_h, grad_weight, grad_bias = torch.ops.u2a_fast.linear_logprob_backward(
        grad_logp, grad_lse, h, weight, target, lse, bias, ctx.softcap, need_h, need_weight or need_bias
    )
    return (
        grad_h if need_h else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        None,
        grad_bias.to(bias.dtype) if need_bias else None,
        None,
    )


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"[{name}] has no backward; detach its inputs or call u2a_fast.reference.{name}")

    return backward


_BACKWARDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention_backward, _attention_setup),
    "ghost_dot": (_ghost_dot_backward, _ghost_dot_setup),
    "linear_logprob": (_linear_logprob_backward, _linear_logprob_setup),
}


def _register_autograd(library: torch.library.Library) -> None:
    for name in OPS:
        backward, setup = _BACKWARDS.get(name, (_no_backward(name), None))
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup, lib=library)


# The extension registers its kernels when it is imported and must be there before the schemas: the dispatcher then
# checks every C++ signature against the schema as it is defined.
extension_error: str | None = _load_extension()
_library = _define_ops()
_register_autograd(_library)
