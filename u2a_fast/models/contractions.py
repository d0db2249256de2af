"""How each kind of module contracts its per-example gradients with directions, given its output's gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.models.decoder import segment_sum
from u2a_fast.models.kinds import Kind
from u2a_fast.models.low_rank import LowRank, Spectrum
from u2a_fast.models.projection import Projection, SecondMoments
from u2a_fast.models.stacks import readable

__all__ = ["Contraction", "Factors", "Site", "contraction"]

Contraction = Callable[[Tensor, Tensor], Tensor]  # (output gradient, cu_seqlens) -> (K, B), more rows for factors
Factors = LowRank | Spectrum | Projection | SecondMoments


@dataclass
class Site:
    """A module that holds parameters with a direction: name -> direction (K, *shape), or factors of a weight's."""

    path: str
    module: nn.Module
    kind: Kind
    directions: dict[str, Tensor]
    factors: Factors | None = None
    token_axis: int = 1
    cast_factors: dict[torch.dtype, Factors] = field(default_factory=dict)
    cast: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    affine: dict[torch.dtype, "_Affine | None"] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """What contracts this module's gradients, in words."""
        if isinstance(self.factors, LowRank):
            return f"ghost_dot_lowrank, rank {self.factors.rank}"
        if self.kind in (Kind.LINEAR, Kind.CONV1D):
            return "ghost_dot"
        return "its own tangent, dotted with its output's gradient"

    @property
    def looks_rows_up(self) -> bool:
        """Whether the module is an embedding whose output is the weight's rows as they are."""
        return type(self.module).forward is nn.Embedding.forward and getattr(self.module, "max_norm", None) is None

    def direction(self, name: str, dtype: torch.dtype) -> Tensor:
        """The direction as the contraction wants it; directions do not change, so each form is made once."""
        key = (name, dtype)
        if key not in self.cast:
            v = self.directions[name].to(dtype)
            weight = name == "weight" and self.kind in (Kind.LINEAR, Kind.CONV1D)
            v = v.transpose(1, 2) if weight and self.kind is Kind.CONV1D else v
            self.cast[key] = readable(v) if weight else v.contiguous()
        return self.cast[key]

    def factors_in(self, dtype: torch.dtype) -> Factors | None:
        """The weight's factors in the precision of the contraction."""
        if self.factors is not None and dtype not in self.cast_factors:
            self.cast_factors[dtype] = self.factors.to(dtype)
        return self.cast_factors.get(dtype)


def _contract_linear(site: Site, a: Tensor) -> Contraction:
    a = a.flatten(0, -2)
    version = a._version

    def contract(g: Tensor, cu_seqlens: Tensor) -> Tensor:
        if a._version != version:
            raise RuntimeError(f"[capture] the input of {site.path} was changed in place after its forward pass")
        g = g.reshape(a.shape[0], -1)
        parts = []
        if (factors := site.factors_in(g.dtype)) is not None:
            parts.append(factors.contract(a.to(g.dtype), g, cu_seqlens))
        if "weight" in site.directions:
            parts.append(ops.ghost_dot(a.to(g.dtype), g, cu_seqlens, site.direction("weight", g.dtype)))
        if "bias" in site.directions:
            ones = g.new_ones(g.shape[0], 1)
            parts.append(ops.ghost_dot(ones, g, cu_seqlens, site.direction("bias", g.dtype)[:, :, None]))
        out = parts[0]
        for part in parts[1:]:  # behind a bias's rows stand a low-rank weight's bounds
            out[: len(part)] += part
        return out

    return contract


class _Bare(nn.Module):
    """A module's own function, without hooks and replacements, ours among them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return type(self.module).forward(self.module, *args, **kwargs)


def _tangent(
    forward: Callable[[dict[str, Tensor]], Tensor], primal: dict[str, Tensor], tangent: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    out: Any = torch.func.jvp(forward, (primal,), (tangent,))
    return out[0], out[1]


def _token_dots(site: Site, dy: Tensor, g: Tensor) -> Tensor:
    """dy . g of every token, (N) in the accumulation dtype."""
    return (dy * g).movedim(site.token_axis, 0).flatten(1).sum(1, dtype=torch.promote_types(g.dtype, torch.float32))


def _contract_by_tangent(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Contraction:
    """Any module whose output at a token depends on its input at that token: its own tangent, dotted with g."""
    bare = _Bare(site.module)

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(bare, parameters, args, kwargs)

    def contract(g: Tensor, cu_seqlens: Tensor) -> Tensor:
        rows = []
        parameters = site.module.named_parameters(recurse=False)
        own = {f"module.{name}": p.detach() for name, p in parameters if name in site.directions}
        for k in range(next(iter(site.directions.values())).shape[0]):
            tangents = {name: site.direction(name.removeprefix("module."), p.dtype)[k] for name, p in own.items()}
            dy = _tangent(forward, own, tangents)[1]
            rows.append(_token_dots(site, dy, g))
        return segment_sum(torch.stack(rows), cu_seqlens)

    return contract


def _contract_rows(site: Site, ids: Tensor) -> Contraction:
    """An embedding: the direction's own rows, dotted with g."""

    def contract(g: Tensor, cu_seqlens: Tensor) -> Tensor:
        rows = []
        for v in site.direction("weight", g.dtype):
            rows.append(_token_dots(site, nn.functional.embedding(ids, v), g))
        return segment_sum(torch.stack(rows), cu_seqlens)

    return contract


@dataclass(frozen=True)
class _Affine:
    """dy = y * ratio + offset for every input: a norm's tangent, read off its output."""

    ratio: Tensor  # (K, O) v / s where y = x_hat * s + b
    offset: Tensor  # (K, O) v_b - b * ratio


def _affine_tangent(site: Site) -> _Affine | None:
    """The tangent of a norm as a multiple of its output, None where two random inputs do not confirm that it is one.

    A multiplication is as exact as its factors, relative to its result, so this loses no more than the tangent itself;
    but float64 models may hold norms that round to float32, whose tangent it would not repeat to the last bit.
    """
    weight = site.module.get_parameter("weight")
    if set(site.directions) - {"weight", "bias"} or weight.dim() != 1 or weight.dtype == torch.float64:
        return None
    bias = getattr(site.module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *weight.shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)
    bare = _Bare(site.module)
    own = {f"module.{name}": p.detach() for name, p in site.module.named_parameters(recurse=False)}
    ratios, offsets = [], []
    for k in range(next(iter(site.directions.values())).shape[0]):
        v = {f"module.{name}": site.direction(name, weight.dtype)[k] for name in site.directions}
        zero = {name: torch.zeros_like(p) for name, p in own.items()}
        y, dy = _tangent(lambda p: torch.func.functional_call(bare, p, (x,)), own, zero | v)
        dbias = v.get("module.bias", torch.zeros_like(weight))
        ratio = (dy[0] - dbias) / (y[0] - bias)
        error = (ratio * (y[1] - bias) + dbias - dy[1]).abs().max()
        if not error <= 16 * torch.finfo(weight.dtype).eps * dy.abs().max():
            return None
        ratios.append(ratio)
        offsets.append(dbias - bias * ratio)
    return _Affine(torch.stack(ratios), torch.stack(offsets))


def _contract_affine(site: Site, affine: _Affine, y: Tensor) -> Contraction:
    version = y._version

    def contract(g: Tensor, cu_seqlens: Tensor) -> Tensor:
        if y._version != version:
            raise RuntimeError(f"[capture] the output of {site.path} was changed in place after its forward pass")
        rows = (g * y) @ affine.ratio.T
        if "bias" in site.directions or getattr(site.module, "bias", None) is not None:
            rows = rows + g @ affine.offset.T
        rows = rows.movedim(site.token_axis, 0)
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1]).sum(1)
        return segment_sum(rows.T.to(torch.promote_types(g.dtype, torch.float32)), cu_seqlens)

    return contract


def contraction(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Contraction:
    """What to do with the gradient of ``out``, the output of one call of the site's module."""
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    own_input = args[0] if args else next(iter(kwargs.values())).detach()
    if site.kind in (Kind.LINEAR, Kind.CONV1D):
        return _contract_linear(site, own_input)
    if site.kind is Kind.NORM:
        dtype = site.module.get_parameter("weight").dtype
        if dtype not in site.affine:
            site.affine[dtype] = _affine_tangent(site)
        if (affine := site.affine[dtype]) is not None:
            return _contract_affine(site, affine, out.detach())
    if site.looks_rows_up:
        return _contract_rows(site, own_input)
    return _contract_by_tangent(site, args, kwargs)
