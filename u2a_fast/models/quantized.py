"""Quantized linear layers of bitsandbytes, run as what they stand for: y = W x + b with W dequantized.

Maths: y = x W^T + b, dy = dx W^T, dx = g W, with W the stored integers times their scales.
Numerics: W is dequantized anew for every product, in the layer's own compute dtype (float64 stays float64, from W in
    float32), so values, tangents and gradients are those of one function and exact up to rounding.
Cost: W once a product, beside the 2 N I O of the product itself; one layer's dequantized weight exists at a time.

How this differs from bitsandbytes' own forward (0.50):
1. 4 bits on a CPU with AVX-512 BF16: a layer in evaluation mode packs its weight at the first input without gradient
   (``Linear4bit.forward``): scales are rounded to bfloat16, products too, and no gradient flows any more.
2. 8 bits (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339): inputs are rounded to 8 bits, so the output is a step
   function of the input, and columns with outliers, which are not, depend on all tokens of the batch. Its own backward
   pass is g W (the rounding taken for the identity), and so is ours, at values without that rounding; while training
   on a CPU it leaves the rounding out as well (``MatMul8bitFp``).
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compute_dtypes", "dequantize", "dequantized_forwards", "is_dequantizable", "is_quantized", "weight_of"]

_FORWARDS = ("Linear4bit.forward", "Linear8bitLt.forward")


def is_dequantizable(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, ``forward`` its own, whose weight is quantized by now."""
    forward = type(module).forward
    if getattr(forward, "__module__", None) != "bitsandbytes.nn.modules" or forward.__qualname__ not in _FORWARDS:
        return False
    weight: Any = module.weight
    # 4 bits may be stored in a floating-point dtype (quant_storage); with has_fp16_weights, 8 bits are not stored
    return weight.dtype == torch.int8 if forward.__qualname__ == "Linear8bitLt.forward" else _state(module) is not None


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer, of any library, whose weight is stored as something else than its entries."""
    weight = module._parameters.get("weight", module._buffers.get("weight"))  # its own: a LoRA layer shows its base's
    sized = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    integers = sized and isinstance(weight, Tensor) and not weight.is_floating_point()
    return integers or is_dequantizable(module)


def _state(module: Any) -> Any:
    """The scales of a 4-bit weight; on the layer where FSDP took them off the weight, None before quantization."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def weight_of(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (O, I) of a layer that ``is_dequantizable``, in ``dtype``; float64 holds the float32 numbers."""
    scaled = torch.float32 if dtype == torch.float64 else dtype
    if module.weight.dtype == torch.int8:
        scales = getattr(module.weight, "SCB", None)  # there until the layer's first own forward pass
        scales = module.state.SCB if scales is None else scales
        return (module.weight.data * (scales / 127)[:, None]).to(scaled).to(dtype)
    # An optional library, loaded already by whoever made the layer.
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(_state(module))
    state.dtype = scaled  # what the layer's own forward does; its backward rounds to the dtype that was quantized
    return dequantize_4bit(module.weight.data, state).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T with a fixed W; the graph keeps the layer, not the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, weight_of(module, x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ weight_of(ctx.module, g.dtype), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        return nn.functional.linear(dx, weight_of(ctx.module, dx.dtype))


def _forward(module: Any, x: Tensor) -> Tensor:
    own = getattr(module, "compute_dtype", None)
    dtype = x.dtype if own is None or x.dtype == torch.float64 else own
    y = _Product.apply(x.to(dtype), module)
    return (y if module.bias is None else y + module.bias.to(dtype)).to(x.dtype)


def dequantized_forwards(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """(layer, the forward to put in its place) for every quantized layer of bitsandbytes.

    A layer whose forward somebody has replaced (this package further out, accelerate's hooks) is left alone.

    Raises:
        NotImplementedError: a 4-bit weight has been packed for inference on the CPU, which rounded its scales.
    """
    found: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    for path, module in model.named_modules():
        if not is_dequantizable(module):
            continue
        if getattr(_state(module), "packing_format_for_cpu", False):
            raise NotImplementedError(
                f"[quantized] expected the 4-bit weights as they were loaded, got {path} packed for inference on the "
                "CPU: bitsandbytes does so when a model in evaluation mode runs without gradients (generate, say), "
                "rounds the scales to bfloat16, and has no gradient from then on. Load the model again, and before "
                "anything runs set support_avx512bf16_for_cpu = False on every Linear4bit, or run this first"
            )
        if "forward" not in vars(module):
            found.append((module, partial(_forward, module)))
    return found


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Precisions that quantized layers compute in whatever their inputs', float64 aside."""
    found = {getattr(module, "compute_dtype", None) for module in model.modules() if is_dequantizable(module)}
    return {dtype for dtype in found if dtype is not None}


def dequantize(model: nn.Module) -> nn.Module:
    """``model`` itself with plain linear layers of float32 weights in place of its quantized ones."""
    for path, module in list(model.named_modules()):
        if is_dequantizable(module):
            layer: Any = module
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device=layer.weight.device)
            plain.weight = nn.Parameter(weight_of(layer), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(path, plain)
    return model
