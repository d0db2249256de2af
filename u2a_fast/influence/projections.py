"""A model's gradients, projected: which projection every linear weight has, and the passes that make and apply them.

A projection that is drawn is a function of its seed, made again wherever it is needed. One that is measured (``pca``)
hangs on the roundings of the machine that measured it: it lies beside the rows, written before the first of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import DerivativeBatch, DerivativePass, Direction, pass_kind
from u2a_fast.influence.lowrank import linear_weights
from u2a_fast.influence.routes import preflight, run_batches
from u2a_fast.models.capture import Capture
from u2a_fast.models.contractions import Factors
from u2a_fast.models.decoder import Decoder, reduce_tokens
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.models.parameters import parameter_names
from u2a_fast.models.projection import Projection, SecondMoments, Sketch, TwoSided, identity_block, two_sided
from u2a_fast.store.files import write_atomically

__all__ = ["BASES", "PROJECTIONS", "Projections", "Projector"]

PROJECTIONS = ("sketch", "random", "pca", "identity")
BASES = "bases.safetensors"  # of pca: p_in and p_out of every weight


class Projections:
    """How every linear weight of a model is projected, and where its entries stand in a row.

    A sketch's entries are sums over all layers; a two-sided projection's stand layer after layer.

    Args:
        decoder: the model.
        names: parameters that are selected; those that are not weights of linear layers are left out.
        kind: one of ``PROJECTIONS``; ``pca`` projects nothing before ``load``.
        dim: of the whole sketch, or of each layer's two-sided projection (k^2).
        seed: of what is drawn.

    Attributes:
        weights: name -> whether it is stored (I, O).
        by_name, slices: a weight's projection, and its entries in a row of ``width``.
    """

    def __init__(self, decoder: Decoder, names: Collection[str], kind: str, dim: int, seed: int) -> None:
        self.weights = {name: transposed for name, transposed in linear_weights(decoder).items() if name in names}
        self.kind, self.dim, self.k = kind, dim, isqrt(dim)
        self.by_name: dict[str, Projection] = {}
        self.slices: dict[str, slice] = {}
        self._named = dict(decoder.model.named_parameters())
        self._seeds = {name: (seed << 20) + i for i, name in enumerate(self.weights)}
        start = 0
        for name in self.weights:
            if kind != "pca":
                self.by_name[name] = self._draw(name)
            rows, columns = (self.k, self.k) if kind == "random" else (min(self.k, n) for n in self._shape(name))
            width = dim if kind == "sketch" else rows * columns
            self.slices[name] = slice(start, start + width)
            start += 0 if kind == "sketch" else width
        self.width = dim if kind == "sketch" else start

    def _shape(self, name: str) -> tuple[int, int]:
        """(O, I)."""
        shape = self._named[name].shape
        return (shape[1], shape[0]) if self.weights[name] else (shape[0], shape[1])

    def _draw(self, name: str) -> Projection:
        if self.kind == "sketch":
            return Sketch(self.dim, self._seeds[name])
        device = self._named[name].device
        if self.kind == "identity":
            return identity_block(*self._shape(name), self.k, device)
        return two_sided(*self._shape(name), self.k, self._seeds[name], device)

    def moments(self) -> dict[str, SecondMoments]:
        """What measures the projections of ``pca``."""
        return {
            name: SecondMoments(*self._shape(name), self.k, seed, self._named[name].device)
            for name, seed in self._seeds.items()
        }

    @property
    def orthonormal(self) -> bool:
        """Whether the matrices' columns are, so that a direction's norm in their span is that of its projection."""
        return self.kind in ("pca", "identity")

    def load(self, path: Path) -> None:
        """Read the matrices of ``pca``.

        Raises:
            FileNotFoundError: they are not there.
            ValueError: they are damaged, or not of these weights.
        """
        if not path.is_file():
            raise FileNotFoundError(f"[index] no such file: {path}, without which the rows beside it mean nothing")
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"[index] expected the projections of pca, got {path}: {error}") from error
        for name in self.weights:
            sides = [found.get(f"{side}/{name}") for side in ("out", "in")]
            wanted = [(size, min(self.k, size)) for size in self._shape(name)]
            got = [None if p is None else tuple(p.shape) for p in sides]
            if wanted != got:
                raise ValueError(f"[index] expected projections of {name} of shapes {wanted} in {path}, got {got}")
            p_out, p_in = (p.to(self._named[name].device) for p in sides if p is not None)
            self.by_name[name] = TwoSided(p_in, p_out)

    def project(self, direction: Direction) -> np.ndarray:
        """The direction's linear part, projected, (width) float64."""
        out = np.zeros(self.width, dtype=np.float64)
        for name, projection in self.by_name.items():
            if name in direction:
                v = direction[name].detach()
                v = v.to(torch.promote_types(v.dtype, torch.float32))
                found = projection.project(v.mT.contiguous() if self.weights[name] else v)
                out[self.slices[name]] += found.double().cpu().numpy()
        return out


class _FactorPass:
    """A ``BatchPass`` that contracts every gradient with its weight's factors, each into its slice: (width, B)."""

    def __init__(
        self, passes: DerivativePass, kind: str, factors: Mapping[str, Factors], slices: Mapping[str, slice], width: int
    ) -> None:
        self._passes, self.kind, self._slices = passes, kind, slices
        self.decoder, self.double, self.count = passes.decoder, passes.double, width
        with self.running():
            self._capture = Capture(self.decoder, {}, factors)
        name_of = parameter_names(self.decoder.model)
        self._name_of = {site.path: name_of[id(site.module.weight)] for site in self._capture.sites}

    def batches(self, examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
        return self._passes.batches(examples, token_budget)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._passes.running():
            yield

    def __call__(self, examples: Sequence[Example]) -> DerivativeBatch:
        packed = self.decoder.pack(examples)
        logp, _ = self._passes.propagate(packed, self._capture)
        with torch.no_grad():
            nll = -reduce_tokens(logp.detach()[None], packed, self._passes.reduction)[0]
            out = torch.zeros(self.count, len(examples), dtype=torch.float64, device=nll.device)
            for path, part in self._capture.parts().items():
                out[self._slices[self._name_of[path]]] += part
        return DerivativeBatch(out, nll, torch.tensor(packed.scored))


class Projector:
    """A model's passes over examples: to measure projections of ``pca``, and to project gradients.

    Args:
        passes: over no direction.
        projections: of the same model.
        budget: tokens a batch; shared with whoever wants to know what was found to fit.
        dtype: of the passes, None: the model's own.

    Raises:
        NotImplementedError: a layer is not understood.
    """

    def __init__(
        self, passes: DerivativePass, projections: Projections, budget: TokenBudget, dtype: torch.dtype | None
    ) -> None:
        self.passes, self.projections, self.budget = passes, projections, budget
        self._kind, self._measuring_kind = pass_kind("projection", dtype), pass_kind("projection's sample", dtype)
        if projections.kind == "pca":
            self._measuring(projections.moments())  # refuses a model that is not understood before anything is written
        else:
            self._projecting = self._over_projections()

    def _over_projections(self) -> _FactorPass:
        p = self.projections
        return _FactorPass(self.passes, self._kind, p.by_name, p.slices, p.width)

    def _measuring(self, moments: Mapping[str, SecondMoments]) -> _FactorPass:
        return _FactorPass(self.passes, self._measuring_kind, moments, dict.fromkeys(moments, slice(0)), 0)

    def settle(self, folder: Path, sample: Sequence[Example]) -> None:
        """Have the projections of ``pca``: those of the run that goes on, else measured on ``sample`` and written.

        Call it where the folder is locked and known to hold this index.
        """
        if self.projections.kind != "pca":
            return
        path = folder / BASES
        if not path.exists():
            if written := sorted(folder.glob("shard-*.npy")):
                raise FileNotFoundError(f"[index] no such file: {path}, by which {written[0].name} was projected")
            moments = self.budget.fit(
                self._measuring_kind, lambda room: self._measure(sample, room), unfit="are left out of the sample"
            )
            kind = torch.float64 if self.passes.double else torch.float32
            bases = {name: moment.basis(kind) for name, moment in moments.items()}
            write_atomically(path, partial(_save_bases, bases))
        self.projections.load(path)
        self._projecting = self._over_projections()

    def _measure(self, sample: Sequence[Example], room: Room) -> dict[str, SecondMoments]:
        moments = self.projections.moments()
        measuring = self._measuring(moments)
        with measuring.running():
            for _ in run_batches(measuring, sample, room):
                pass
        if len(room.unfit) == len(sample):
            raise torch.OutOfMemoryError("[index] none of the examples that pca is measured on fits in memory")
        return moments

    def preflight(self, longest: Sequence[Example]) -> None:
        """Find the budget that fits the longest examples of all, unless it is known."""
        if self._kind not in self.budget.found:
            with self._projecting.running():
                preflight(self._projecting, longest, self.budget)

    def rows(self, examples: Sequence[Example]) -> np.ndarray:
        """Projected gradients, (B, width); float32, or float64 for a model of float64.

        NaN, with a warning, for an example that does not fit in memory even alone.
        """
        kind = np.float64 if self.passes.double else np.float32
        out = np.empty((len(examples), self.projections.width), dtype=kind)

        def attempt(room: Room) -> None:
            for positions, result in run_batches(self._projecting, examples, room):
                out[positions] = result.derivatives.T.cpu().numpy()

        with self._projecting.running():
            self.budget.fit(self._kind, attempt)
        return out


def _save_bases(bases: Mapping[str, TwoSided], path: Path) -> None:
    sides = {f"in/{name}": basis.p_in for name, basis in bases.items()}
    sides |= {f"out/{name}": basis.p_out for name, basis in bases.items()}
    save_file({key: p.cpu().contiguous() for key, p in sides.items()}, path)
