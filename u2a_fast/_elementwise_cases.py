"""The case table's rows of norms, gated units and rotary embeddings, for :mod:`u2a_fast.testing`.

The error of a result is that of the float arithmetic, in units of its eps, and a unit in the last place of the result's
own dtype: these ops round once (Triton's interpreter cuts bfloat16 off where GPUs round it).
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .testing import Case

__all__ = ["OPS", "cost", "inputs", "rows", "scales", "timing_rows"]

OPS = ("glu_jvp", "rms_norm_jvp", "rotary")

Row = tuple[str, dict[str, int], dict[str, Any]]

# Elements of each matrix read or written, and arithmetic per element with a function counted as one.
_MATRICES = {"glu_jvp": 6, "rms_norm_jvp": 4, "rotary": 2}
_FLOPS = {"glu_jvp": 13, "rms_norm_jvp": 14, "rotary": 3}


def rows() -> Iterator[Row]:
    """Parity rows: no token, one column, and widths on both sides of every vector and block."""
    for n, width in ((0, 8), (1, 1), (5, 7), (3, 16), (7, 33), (33, 257), (2, 1100)):
        for gelu in (False, True):
            yield "glu_jvp", {"N": n, "I": width}, {"gelu": gelu}
        yield "glu_jvp", {"N": n, "I": width}, {"tangents": ("h",)}
        for tangents in (("h", "weight"), ("h",)):
            yield "rms_norm_jvp", {"N": n, "D": width}, {"tangents": tangents}
    for gelu in (False, True):  # to where the sigmoid is 0 or 1
        yield "glu_jvp", {"N": 9, "I": 130}, {"gelu": gelu, "scale": 30.0}
    yield "rms_norm_jvp", {"N": 9, "D": 130}, {"scale": 1e-3}  # its eps decides
    for n, heads, e in ((0, 2, 8), (1, 1, 2), (7, 3, 14), (5, 1, 66), (33, 4, 64), (257, 2, 34), (3, 2, 514)):
        yield "rotary", {"N": n, "H": heads, "E": e}, {}


def timing_rows() -> Iterator[Row]:
    """Timing rows: the layers of small models at a batch of tokens, in cache and beyond it."""
    for n, d, width in ((1024, 256, 704), (2048, 1024, 2816)):
        yield "glu_jvp", {"N": n, "I": width}, {}
        yield "glu_jvp", {"N": n, "I": width}, {"tangents": ("h",)}  # as a backward pass
        yield "rms_norm_jvp", {"N": n, "D": d}, {}
        yield "rotary", {"N": n, "H": d // 64, "E": 64}, {}
    yield "glu_jvp", {"N": 2048, "I": 2816}, {"gelu": True}


def _accumulate_dtype(case: "Case") -> torch.dtype:
    return torch.float64 if case.dtype == torch.float64 else torch.float32


def inputs(case: "Case", normal: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments of ``case``; ``normal(*shape, std)`` draws from a normal distribution in the case's dtype."""
    shape = [case.sizes[c] for c in case.sizes]
    if case.op == "glu_jvp":
        gate, up, dgate = normal(*shape, std=case.scale), normal(*shape), normal(*shape)
        dup = normal(*shape) if "weight" in case.tangents else None
        return {"gate": gate, "up": up, "dgate": dgate, "dup": dup, "gelu": case.gelu}
    if case.op == "rotary":
        n, _, e = shape
        return {"x": normal(*shape), "cosine": normal(n, e), "sine": normal(n, e)}
    accumulate = _accumulate_dtype(case)
    x, dx = (normal(*shape, std=case.scale) for _ in range(2))
    scale, dscale = (normal(shape[1]).to(accumulate) for _ in range(2))
    return {"x": x, "dx": dx, "scale": scale, "dscale": dscale if "weight" in case.tangents else None, "eps": 1e-6}


def scales(case: "Case", wide: dict[str, Any], constant: float) -> tuple[Tensor, ...]:
    """Error scale of every output entry, which ``constant`` will multiply, from float64 arguments."""
    eps = torch.finfo(_accumulate_dtype(case)).eps
    out = getattr(reference, case.op)(**wide)
    outputs = out if isinstance(out, tuple) else (out,)
    errors = {"glu_jvp": _glu_scales, "rms_norm_jvp": _rms_norm_scales, "rotary": _rotary_scales}[case.op](wide, eps)
    unit = torch.finfo(case.dtype).eps / (constant * eps)
    return tuple(error + unit * y.abs() for error, y in zip(errors, outputs, strict=True))


def _glu_scales(wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    x, up, dgate, dup = (wide[name] for name in ("gate", "up", "dgate", "dup"))
    inner, dinner = x, torch.ones_like(x)
    relative = torch.ones_like(x)
    if wide["gelu"]:
        root = 2 * math.sqrt(2 / math.pi)
        inner, dinner = root * x * (1 + 0.044715 * x * x), root * (1 + 3 * 0.044715 * x * x)
        # the sigmoid's argument is rounded: s'(z) z / s(z) = (1 - s(z)) z
        relative = 1 + inner.abs()
    there, back = torch.sigmoid(inner), torch.sigmoid(-inner)
    # kernels flush sigmoids below the smallest normal number to 0
    flushed = torch.finfo(torch.float32).tiny / eps
    value = x.abs() * (there * (1 + relative * back) + flushed)
    slope = there * (1 + relative * back + x.abs() * back * dinner * (1 + relative)) + flushed * (1 + x.abs() * dinner)
    tangent = slope * (dgate * up).abs()
    return value * up.abs(), tangent if dup is None else tangent + value * dup.abs()


def _rms_norm_scales(wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    x, dx, scale, dscale = (wide[name] for name in ("x", "dx", "scale", "dscale"))
    d = max(x.shape[-1], 1)
    inverse = (x.square().sum(-1, keepdim=True) / d + wide["eps"]).rsqrt()
    # the squares are of one sign, and their sum reaches the result through a square root
    relative = 1 + math.sqrt(d) / 2
    along = (x * dx).abs().sum(-1, keepdim=True) * inverse.square() / d
    normal = (x * inverse).abs()
    tangent = relative * (dx.abs() * inverse + 3 * normal * along) * scale.abs()
    if dscale is not None:
        tangent = tangent + relative * normal * dscale.abs()
    return relative * normal * scale.abs(), tangent


def _rotary_scales(wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    low, high = wide["x"].abs().chunk(2, -1)
    cosine, sine = (wide[name].abs()[:, None] for name in ("cosine", "sine"))
    return (torch.cat([low, high], -1) * cosine + torch.cat([high, low], -1) * sine,)


def cost(case: "Case") -> tuple[int, int]:
    """Arithmetic, and bytes of every argument and result once."""
    elements = math.prod(case.sizes.values())
    element, accumulator = torch.finfo(case.dtype).bits // 8, torch.finfo(_accumulate_dtype(case)).bits // 8
    fewer = case.op == "glu_jvp" and "weight" not in case.tangents
    moved = (_MATRICES[case.op] - fewer) * elements * element
    if case.op == "rotary":
        moved += 2 * case.sizes["N"] * case.sizes["E"] * element
    if case.op == "rms_norm_jvp":
        moved += (1 + ("weight" in case.tangents)) * case.sizes["D"] * accumulator
    return _FLOPS[case.op] * elements, moved
