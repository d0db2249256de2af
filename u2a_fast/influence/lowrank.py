"""Directions truncated to low rank: which matrices, by which decomposition, and what is lost.

Every weight of a linear layer whose factors are cheaper than itself, r (I + O) < I O, is truncated by a randomized
singular value decomposition (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) from a fixed seed, or by an
exact one where that is as cheap or where a bound of what is lost is to be tight. Norms, biases, embeddings (whose
contraction only looks up rows) and LoRA's factors stay exact. The LM head's weight is truncated for its use as a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from u2a_fast.models.decoder import Decoder
from u2a_fast.models.kinds import Kind, kind_of
from u2a_fast.models.low_rank import BoundedLowRank, LowRank, Spectrum
from u2a_fast.models.parameters import parameter_names

__all__ = ["Approximation", "check_rank", "linear_weights", "spectra", "spectral_norm_bound", "truncate"]

EXACT_SIDE = 1024  # cubic work beyond: a second for a square of this side on one CPU thread
FEW = 4  # times as many columns as the range that is looked for: from there on the randomized decomposition is cheaper
OVERSAMPLING = 8
POWER_ITERATIONS = 4  # the tail's singular values count by their ninth power in the range that is found
SQUARINGS = 4  # the Schatten-32 norm exceeds the spectral norm by at most the 32nd root of the rank, 1.3 for 4096


@dataclass(frozen=True)
class Approximation:
    """What stands for K directions.

    Attributes:
        kept: directions (K, *shape) by parameter name that modules other than the head contract as they are.
        factors: truncated weights of linear layers.
        head: the truncated weight of the LM head; in ``kept`` too where it is tied to an embedding.
        energy: ||v_r||^2 / ||v||^2 of every truncated parameter, over all K.
        total_energy: the same of all parameters.
        bounded: the factors come with bounds of what was left out, and the head is exact.
    """

    kept: dict[str, Tensor]
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    head: LowRank | None = None
    energy: Mapping[str, float] = field(default_factory=dict)
    total_energy: float = 1.0
    bounded: bool = False


def check_rank(rank: int) -> int:
    """The rank; ValueError for one below 1."""
    if rank < 1:
        raise ValueError(f"[rank] expected a rank of at least 1, got {rank}")
    return rank


def linear_weights(decoder: Decoder) -> dict[str, bool]:
    """Names of weights that are used by linear layers alone, the LM head apart -> whether they are stored (I, O)."""
    name_of = parameter_names(decoder.model)
    uses: dict[str, set[Kind | None]] = {}
    for module in decoder.model.modules():
        is_head = module is decoder.head_module and decoder.head is not None
        for own, p in module.named_parameters(recurse=False):
            kind = kind_of(module) if own == "weight" and not is_head else None
            uses.setdefault(name_of[id(p)], set()).add(kind)
    return {name: found == {Kind.CONV1D} for name, found in uses.items() if found in ({Kind.LINEAR}, {Kind.CONV1D})}


def truncate(
    decoder: Decoder, directions: Mapping[str, Tensor], *, ranks: int | Mapping[str, int], bounded: bool = False
) -> Approximation:
    """Truncate directions (K, *shape).

    Args:
        decoder: the model.
        directions: by parameter name.
        ranks: of every matrix, or by parameter name; a matrix without one, or not finite, stays exact.
        bounded: prepare the bounds of ``models.low_rank`` and keep the head exact.
    """
    kept, factors, head = dict(directions), {}, None
    energy: dict[str, float] = {}
    lost = 0.0
    for name, transposed in linear_weights(decoder).items():
        if name not in directions:
            continue
        v = directions[name].mT if transposed else directions[name]
        if (rank := _worthwhile(v, _rank(ranks, name))) is not None:
            factors[name] = _decompose(v, rank, bounded)
            del kept[name]
            lost += _record(energy, name, v, factors[name])
    head_name = _head_name(decoder)
    if not bounded and head_name in directions:
        v = directions[head_name]
        rank = _rank(ranks, head_name)
        # two products with r columns more, against one whole product
        if rank is not None and 2 * rank < v.shape[2] and v.isfinite().all():
            head = _decompose(v, rank, bounded=False)
            lost += _record(energy, head_name, v, head)
    whole = sum(_squared(v) for v in directions.values())
    return Approximation(kept, factors, head, energy, 1 - lost / whole if whole > 0 else 1.0, bounded)


def spectra(decoder: Decoder, directions: Mapping[str, Tensor], grid: tuple[int, ...]) -> dict[str, Spectrum]:
    """The leading singular vectors of one direction (1, *shape), for as many ranks of ``grid`` as are worthwhile."""
    found = {}
    for name, transposed in linear_weights(decoder).items():
        if name in directions:
            v = directions[name].mT if transposed else directions[name]
            ranks = tuple(r for r in grid if _worthwhile(v, r) is not None)
            if ranks:
                left, singular, right = _svd(v[0], ranks[-1] + 1, exact=True)
                found[name] = Spectrum(left[:, : ranks[-1]], right[:, : ranks[-1]], singular, ranks)
    return found


def spectral_norm_bound(e: Tensor) -> float:
    """A number that ||e||_2 does not exceed, rounding included.

    Exact for small matrices; for others the Schatten norm (tr (e^T e)^16)^(1/32), by squaring the Gram matrix, in
    float64: it exceeds the spectral norm by the 32nd root of the rank at most.
    """
    e = e.double()
    margin = 1 + 1e-6  # over max(e.shape) * 2^-53, the relative rounding of the products, by far
    if min(e.shape) <= EXACT_SIDE:
        return float(torch.linalg.matrix_norm(e, 2)) * margin
    gram = e.mT @ e if e.shape[0] >= e.shape[1] else e @ e.mT
    scale, power = 1.0, 2
    for _ in range(SQUARINGS - 1):
        size = float(gram.norm())
        if size == 0:
            return 0.0
        scale *= size ** (1 / power)
        gram = (gram / size) @ (gram / size)
        power *= 2
    return scale * float(gram.norm()) ** (1 / power) * margin


def _rank(ranks: int | Mapping[str, int], name: str) -> int | None:
    return ranks if isinstance(ranks, int) else ranks.get(name)


def _worthwhile(v: Tensor, rank: int | None) -> int | None:
    rows, columns = v.shape[1:]
    if rank is None or rank * (rows + columns) >= rows * columns or not v.isfinite().all():
        return None
    return rank


def _head_name(decoder: Decoder) -> str:
    return parameter_names(decoder.model)[id(decoder.head.weight)] if decoder.head else ""


def _squared(v: Tensor) -> float:
    return float(v.double().square().sum())


def _record(energy: dict[str, float], name: str, v: Tensor, factors: LowRank) -> float:
    """Note what the factors hold of ``v``; returns the squared norm that they lack."""
    whole = _squared(v)
    held = float(factors.singular.double().square().sum())  # ||P V||_F^2 with P the projection on the left factor
    energy[name] = held / whole if whole > 0 else 1.0
    return max(whole - held, 0.0)


def _decompose(v: Tensor, rank: int, bounded: bool) -> LowRank:
    found = [_svd(each, rank, exact=bounded) for each in v]
    left, singular, right = (torch.stack(parts) for parts in zip(*found, strict=True))
    if not bounded:
        return LowRank(left, right, singular)
    residuals = [_residual(*parts) for parts in zip(v, left, singular, right, strict=True)]
    tail, leak, norm, defect = (v.new_tensor(parts) for parts in zip(*residuals, strict=True))
    return BoundedLowRank(left, right, singular, tail, leak, norm, defect)


def _residual(v: Tensor, left: Tensor, singular: Tensor, right: Tensor) -> tuple[float, float, float, float]:
    """``BoundedLowRank``'s tail, leak, norm and defect, of the factors as they are."""
    v, left, singular, right = v.double(), left.double(), singular.double(), right.double()
    tail = v - left @ (left.mT @ v)
    tail = tail - (tail @ right) @ right.mT
    eye = torch.eye(left.shape[1], dtype=v.dtype, device=v.device)
    defect = torch.maximum((left.mT @ left - eye).norm(), (right.mT @ right - eye).norm())
    # P P = P and Q Q = Q up to the defect
    leak = (v - (left * singular) @ right.mT - tail).norm() + 3 * defect * v.norm()
    up = 1 + 1e-6  # over the roundings of this function and of the cast to float32
    return spectral_norm_bound(tail) * up, float(leak) * up, float(v.norm()) * up, float(defect) * up


def _svd(v: Tensor, rank: int, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: (O, r), (r), (I, r); ``exact`` up to ``EXACT_SIDE``."""
    if min(v.shape) <= EXACT_SIDE and (exact or min(v.shape) <= FEW * (rank + OVERSAMPLING)):
        left, singular, right = torch.linalg.svd(v, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        columns = min(rank + OVERSAMPLING, *v.shape)
        probe = torch.randn(v.shape[1], columns, generator=generator, dtype=v.dtype).to(v.device)
        basis = torch.linalg.qr(v @ probe)[0]
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(v @ torch.linalg.qr(v.mT @ basis)[0])[0]
        inner, singular, right = torch.linalg.svd(basis.mT @ v, full_matrices=False)
        left = basis @ inner
    return left[:, :rank].contiguous(), singular[:rank], right[:rank].mT.contiguous()
