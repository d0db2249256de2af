"""The case table of all ops, their inputs, their cost and the error each is allowed.

Tests of every backend and the benchmarks iterate over this one table. An entry is a :class:`Case`; ``inputs`` builds
its arguments from a seed that follows from the case's name, ``expected`` runs the reference in float64 on them, and
``budget`` bounds the error of every output entry.

The budget is ``c * eps * scale``: ``eps`` of the accumulation dtype, ``scale`` the same sum with every term replaced by
its magnitude. Rounding errors of a sum behave as independent with zero mean (Higham and Mary 2019,
doi:10.1137/18M1226312): n terms of random sign and size x, as all inputs here are, have partial sums of size sqrt(n) x,
so n of their roundings add up to eps n x, which is ``eps * scale``. A sum of terms of one sign, whose partial sums
grow as n x, gets a further sqrt(n). ``CONSTANTS`` gives one ``c`` per op, and why.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _attention_cases, _elementwise_cases, _gradient_cases, _sketch_cases, reference

__all__ = ["CASES", "CONSTANTS", "DTYPES", "TIMING_CASES", "Case", "budget", "cost", "expected", "inputs", "violations"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# 4 standard deviations of one rounded sum cover every entry of every case; an op whose result passes through more than
# one such sum takes the number of sums times that.
CONSTANTS: dict[str, float] = {
    "attention": 12.0,  # logits, the sum of exponentials, the sum over the values
    "attention_backward": 16.0,  # logits, their log-sum-exp, dp, then the product with q, k or grad
    "attention_jvp": 16.0,  # logits, tangents, the sum of exponentials, the sum over the values
    "ghost_dot": 4.0,  # one sum over o, i and t
    "ghost_dot_lowrank": 12.0,  # products of two sums, then the sum over the rank and t
    "ghost_norm": 8.0,  # products of two sums
    "glu_jvp": 4.0,  # no sum, but half a dozen roundings of each factor
    "grad_project": 12.0,  # products of two sums, then the sum over t
    "grad_sketch": 4.0,  # one sum over an entry's coordinates and t
    "linear_logprob": 8.0,  # logits, then the sum of exponentials
    "linear_logprob_backward": 12.0,  # logits, probabilities, then the product with weight or h
    "linear_logprob_jvp": 12.0,  # logits and tangents, probabilities, then the sum over the vocabulary
    "rms_norm_jvp": 4.0,  # the sum of squares; the scale counts the other sum
    "rotary": 2.0,  # two products and their sum
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: name of the op.
        sizes: shape letters to lengths, N and B following from ``lengths``.
        dtype: dtype of the floating arguments.
        lengths: tokens of each example, for ops that take ``cu_seqlens``.
        bias: whether the head has a bias (and, for the JVP, a bias tangent).
        softcap: logit cap of the head, 0 for none.
        tangents: which of "h" and "weight" have tangents (JVP) or get gradients (backward); for a norm,
            x and scale; for a gated unit, gate and up.
        scale: standard deviation of the logits, of the head or of attention, or of what a norm or gate takes in.
        parent: for attention, the segment that each segment continues, -1 for none; None: all -1.
        window: for attention, most keys that a query sees, 0 for all.
        gelu: for a gated unit, GELU instead of SiLU.
    """

    op: str
    sizes: dict[str, int] = field(hash=False)
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = ()
    bias: bool = False
    softcap: float = 0.0
    tangents: tuple[str, ...] = ("h", "weight")
    scale: float = 1.0
    parent: tuple[int, ...] | None = None
    window: int = 0
    gelu: bool = False

    @property
    def id(self) -> str:
        """A name that holds everything that distinguishes the case, e.g. ``ghost_dot-N7-I3-O4-K1-2,0,5-float32``."""
        parts = [self.op, *(f"{c}{n}" for c, n in self.sizes.items() if c != "B")]
        parts += [_shorten(self.lengths)] if self.op.startswith(("attention", "ghost", "grad")) else []
        parts += [f"parent{_shorten(self.parent)}"] if self.parent else []
        parts += [f"window{self.window}"] if self.window else []
        parts += ["bias"] if self.bias else []
        parts += ["gelu"] if self.gelu else []
        parts += ["backward"] if self.op == "glu_jvp" and "weight" not in self.tangents else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [f"scale{self.scale:g}"] if self.scale != 1.0 else []
        if self.op in ("linear_logprob_backward", "linear_logprob_jvp", "rms_norm_jvp"):
            parts.append("+".join(self.tangents))
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])


def _shorten(lengths: tuple[int, ...]) -> str:
    return ",".join(map(str, lengths)) if len(lengths) <= 6 else f"B{len(lengths)}x{lengths[0]}"


def _head_rows() -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    # N, D, V, options: a vocabulary that no tile divides, one token, none, a bias, a cap, large logits.
    rows: list[tuple[int, int, int, dict[str, Any]]] = [
        (5, 8, 11, {}),
        (17, 33, 257, {"bias": True}),
        (32, 64, 128, {"softcap": 3.0}),
        (9, 40, 515, {"bias": True, "softcap": 30.0, "scale": 10.0}),
        (3, 16, 100, {"scale": 30.0}),
        (1, 5, 1, {}),
        (0, 8, 11, {"bias": True}),
        (67, 96, 1031, {}),
    ]
    for n, d, v, options in rows:
        sizes = {"N": n, "D": d, "V": v}
        yield "linear_logprob", sizes, options
        yield "linear_logprob_backward", sizes, options
        yield "linear_logprob_jvp", {**sizes, "K": 1}, options
    for tangents in (("h",), ("weight",)):
        yield "linear_logprob_backward", {"N": 13, "D": 24, "V": 70}, {"tangents": tangents, "bias": True}
        yield "linear_logprob_jvp", {"N": 13, "D": 24, "V": 70, "K": 3}, {"tangents": tangents, "bias": True}
    yield "linear_logprob_jvp", {"N": 6, "D": 8, "V": 40, "K": 0}, {}


def _timing_rows() -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    yield from _gradient_cases.timing_rows()
    for d, v in ((384, 8192), (512, 32000)):
        sizes = {"N": 512, "D": d, "V": v}
        yield "linear_logprob", sizes, {}
        yield "linear_logprob_backward", sizes, {"tangents": ("h",)}
        yield "linear_logprob_backward", sizes, {}
        yield "linear_logprob_jvp", {**sizes, "K": 1}, {}
    yield from _attention_cases.timing_rows()
    yield from _elementwise_cases.timing_rows()
    yield from _sketch_cases.timing_rows()


CASES: tuple[Case, ...] = tuple(
    Case(op, sizes, dtype, **options)
    for rows in (
        _gradient_cases.rows,
        _sketch_cases.rows,
        _head_rows,
        _attention_cases.rows,
        _elementwise_cases.rows,
    )
    for op, sizes, options in rows()
    for dtype in DTYPES
)
TIMING_CASES: tuple[Case, ...] = tuple(
    Case(op, sizes, dtype, **options)
    for op, sizes, options in _timing_rows()
    for dtype in (torch.float32, torch.bfloat16)
)


def inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of ``case`` by name, the same at every call; built on the CPU, then moved to ``device``."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(case.dtype)

    if case.op.startswith("attention"):
        arguments = _attention_cases.inputs(case, normal)
    elif case.op in _elementwise_cases.OPS:
        arguments = _elementwise_cases.inputs(case, normal)
    elif case.op == "grad_sketch":
        arguments = _sketch_cases.inputs(case, normal, generator)
    elif case.op.startswith(_gradient_cases.PREFIXES):
        arguments = _gradient_cases.inputs(case, normal)
    else:
        arguments = _head_inputs(case, normal, generator)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _head_inputs(case: Case, normal: Any, generator: torch.Generator) -> dict[str, Any]:
    n, d, v = (case.sizes[c] for c in "NDV")
    std = math.sqrt(case.scale / math.sqrt(d))
    target = torch.randint(v, (n,), generator=generator)
    target[:1], target[-1:] = 0, v - 1
    arguments = {"h": normal(n, d, std=std), "weight": normal(v, d, std=std), "target": target}
    bias = normal(v, std=case.scale) if case.bias else None
    arguments |= {"bias": bias, "softcap": case.softcap}
    if case.op == "linear_logprob_jvp":
        k = case.sizes["K"]
        arguments["dh"] = normal(k, n, d, std=std) if "h" in case.tangents else None
        arguments["dweight"] = normal(k, v, d, std=std) if "weight" in case.tangents else None
        arguments["dbias"] = normal(k, v) if case.bias else None
    if case.op == "linear_logprob_backward":
        acc = torch.float64 if case.dtype == torch.float64 else torch.float32
        for name in ("grad_logp", "grad_lse"):
            arguments[name] = torch.randn(n, generator=generator, dtype=torch.float64).to(acc)
        wide = {
            name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()
        }
        head: dict[str, Any] = {name: wide[name] for name in ("h", "weight", "target", "bias", "softcap")}
        arguments["lse"] = reference.linear_logprob(**head)[1].to(acc)
        arguments |= {"need_h": "h" in case.tangents, "need_weight": "weight" in case.tangents}
    return arguments


def _map_floats(arguments: dict[str, Any], f: Any) -> dict[str, Any]:
    return {k: f(x) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def expected(case: Case, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the reference gives in float64 on exactly these arguments, moved to the CPU; always a tuple."""
    arguments = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    out = getattr(reference, case.op)(**_map_floats(arguments, Tensor.double))
    return out if isinstance(out, tuple) else (out,)


def budget(case: Case, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Largest allowed error of each entry of each output, in float64 on the CPU, shaped like ``expected``."""
    arguments = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    wide = _map_floats(arguments, Tensor.double)
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    scales = _scales(case, wide, eps)
    return tuple(CONSTANTS[case.op] * eps * scale + _least(_output_dtype(case, j)) for j, scale in enumerate(scales))


def _least(dtype: torch.dtype) -> float:
    """Error allowed at 0: below the smallest normal number precision is absolute, and flushing to zero is allowed."""
    least = torch.finfo(torch.float32).tiny
    return max(least, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def violations(case: Case, arguments: dict[str, Any], outputs: tuple[Tensor, ...] | Tensor) -> list[str]:
    """What is wrong with ``outputs``: shapes, dtypes, entries not finite or beyond the budget; empty if nothing."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = expected(case, arguments)
    found = []
    for j, (got, want, bound) in enumerate(zip(outputs, wanted, budget(case, arguments), strict=True)):
        wanted_dtype = _output_dtype(case, j)
        if got.shape != want.shape or got.dtype != wanted_dtype:
            found.append(f"output {j}: expected {tuple(want.shape)} {wanted_dtype}, got {tuple(got.shape)} {got.dtype}")
            continue
        error = (got.detach().cpu().double() - want).abs()
        ratio = torch.where(error.isfinite(), error / bound, torch.inf)
        if ratio.numel() and ratio.max() > 1:
            found.append(
                f"output {j}: error {float(ratio.max()):.3g} times its budget at flat index {int(ratio.argmax())}"
            )
    return found


def _output_dtype(case: Case, index: int) -> torch.dtype:
    in_inputs_dtype = {"attention": (0,), "attention_backward": (0, 1, 2), "attention_jvp": (0, 2)}
    in_inputs_dtype |= dict.fromkeys(_elementwise_cases.OPS, (0, 1)) | {"linear_logprob_backward": (0,)}
    if index in in_inputs_dtype.get(case.op, ()):
        return case.dtype
    return torch.float64 if case.dtype == torch.float64 else torch.float32


def _scales(case: Case, wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    if case.op.startswith("attention"):
        return _attention_cases.scales(case, wide)
    if case.op in _elementwise_cases.OPS:
        return _elementwise_cases.scales(case, wide, CONSTANTS[case.op])
    if case.op == "grad_sketch":
        return _sketch_cases.scales(wide)
    if case.op.startswith(_gradient_cases.PREFIXES):
        return _gradient_cases.scales(case, wide)
    by_op = {
        "linear_logprob": _logprob_scale,
        "linear_logprob_backward": _backward_scale,
        "linear_logprob_jvp": _jvp_scale,
    }
    return by_op[case.op](case, wide, eps)


@dataclass
class _Head:
    """Per-token quantities of the head's error analysis; errors are in units of eps."""

    p: Tensor  # softmax (N, V)
    c: Tensor  # capped logits (N, V)
    slope: Tensor  # c'(z) (N, V)
    logit_error: Tensor  # largest error of a row's capped logits (N)
    lse_error: Tensor  # (N)


def _head(case: Case, wide: dict[str, Any]) -> _Head:
    h, weight, bias, cap = wide["h"], wide["weight"], wide["bias"], case.softcap
    c, slope = reference._logits(h, weight, bias, cap)
    magnitude = h.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    # A cap contracts (slope <= 1) and adds the rounding of tanh and of the division.
    logit_error = magnitude.amax(-1) + 2 * c.abs().amax(-1)
    lse = torch.logsumexp(c, -1)
    # exp turns the absolute error of c - max into a relative one; the sum of V terms adds sqrt(V), the logarithm its
    # own rounding.
    lse_error = logit_error + math.sqrt(case.sizes["V"]) + lse.abs()
    return _Head(torch.exp(c - lse[:, None]), c, slope, logit_error, lse_error)


def _logprob_scale(case: Case, wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    head = _head(case, wide)
    return head.logit_error + head.lse_error, head.lse_error


def _slope_error(case: Case, head: _Head) -> Tensor:
    """Error of c'(z) = 1 - tanh^2 relative to 1; |c''| <= 0.77 / cap."""
    return 0.77 * head.logit_error / case.softcap + 2 if case.softcap else torch.zeros_like(head.logit_error)


def _backward_scale(case: Case, wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    head, h, weight = _head(case, wide), wide["h"], wide["weight"]
    softmax_part = (wide["grad_lse"] - wide["grad_logp"]).abs()[:, None] * head.p
    # A capped slope near 0 keeps dz small while its error does not, so the terms stand before the slope there.
    dz = softmax_part.scatter_add(-1, wide["target"][:, None], wide["grad_logp"].abs()[:, None])
    dz_error = softmax_part * (head.logit_error + head.lse_error)[:, None] * head.slope
    dz_error = dz_error + dz * (_slope_error(case, head)[:, None] + 2)
    # Kernels may round dz to the inputs' dtype before the second product, and round the gradient in h to it.
    rounding = torch.finfo(case.dtype).eps / eps
    empty_h, empty_v = weight.new_zeros(0, case.sizes["D"]), weight.new_zeros(0)
    grad_h = (dz_error + (1 + rounding) * dz) @ weight.abs() if "h" in case.tangents else empty_h
    total = dz_error + (1 + rounding) * dz
    if "weight" not in case.tangents:
        return grad_h, empty_h, empty_v
    return grad_h, total.T @ h.abs(), total.sum(0)


def _jvp_scale(case: Case, wide: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    head = _head(case, wide)
    h, weight, dh, dweight, dbias = (wide[name] for name in ("h", "weight", "dh", "dweight", "dbias"))
    rows = []
    for j in range(case.sizes["K"]):
        magnitude = torch.zeros_like(head.c)
        if dh is not None:
            magnitude = magnitude + dh[j].abs() @ weight.abs().T
        if dweight is not None:
            magnitude = magnitude + h.abs() @ dweight[j].abs().T
        if dbias is not None:
            magnitude = magnitude + dbias[j].abs()
        tangent_error = (1 + _slope_error(case, head)[:, None]) * magnitude
        mean = (head.p * magnitude).sum(-1)
        at_target = tangent_error.gather(-1, wide["target"][:, None])[:, 0]
        rows.append(at_target + (head.p * tangent_error).sum(-1) + (head.logit_error + head.lse_error) * mean)
    jvp = torch.stack(rows) if rows else head.p.new_zeros(0, case.sizes["N"])
    return head.logit_error + head.lse_error, head.lse_error, jvp


def cost(case: Case) -> tuple[int, int]:
    """Floating-point operations of the algorithm and the fewest bytes it can move (each argument and result once)."""
    if case.op.startswith("attention"):
        return _attention_cases.cost(case)
    if case.op in _elementwise_cases.OPS:
        return _elementwise_cases.cost(case)
    if case.op == "grad_sketch":
        return _sketch_cases.cost(case)
    if case.op.startswith(_gradient_cases.PREFIXES):
        return _gradient_cases.cost(case)
    s = case.sizes
    arguments = _argument_elements(case)
    element = torch.finfo(case.dtype).bits // 8
    moved = sum(arguments.values()) * element
    product = 2 * s["N"] * s["D"] * s["V"]
    passes = {
        "linear_logprob": 1,
        "linear_logprob_backward": 1 + len(case.tangents),
        "linear_logprob_jvp": 1 + s.get("K", 0) * len(case.tangents),
    }[case.op]
    gradients = sum(arguments[name] for name in case.tangents) if case.op == "linear_logprob_backward" else 0
    return passes * product, moved + element * gradients + 8 * s["N"]


def _argument_elements(case: Case) -> dict[str, int]:
    s = case.sizes
    elements = {"h": s["N"] * s["D"], "weight": s["V"] * s["D"]}
    if "K" in s:
        elements |= {f"d{name}": s["K"] * elements[name] for name in case.tangents}
    return elements
