"""Projected gradients of every example, kept on disk: a later direction costs one matrix product.

Weights of linear layers are projected, the LM head among them unless it is tied to the embedding. Norms, biases and
embeddings are left out, so scores are those of the direction's linear part (``coverage`` says how much of it that is),
up to the projection's error. They choose candidates; what counts is rescored exactly, with all parameters.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from u2a_fast._check import check_sketch
from u2a_fast.data.packing import Example, longest_examples
from u2a_fast.influence.derivatives import DerivativeBatch, DerivativePass, Direction, as_budget, kind_of
from u2a_fast.influence.lowrank import linear_weights
from u2a_fast.influence.routes import directional_derivatives, preflight, run_batches
from u2a_fast.models.capture import Capture
from u2a_fast.models.decoder import Decoder, reduce_tokens
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.models.parameters import parameter_names, selected_parameters
from u2a_fast.models.projection import Projection, Sketch, two_sided
from u2a_fast.store.budget import read_budget, write_budget
from u2a_fast.store.fingerprint import hash_examples, hash_model
from u2a_fast.store.gradients import GradientShards

__all__ = ["PROJECTIONS", "GradientIndex", "check_options"]

PROJECTIONS = ("sketch", "random")
_VERSION = 1


class _Projections:
    """How every linear weight of a model is projected, and where its entries stand in a row.

    A sketch's entries are sums over all layers; a two-sided projection's stand layer after layer.
    """

    def __init__(self, decoder: Decoder, names: Collection[str], kind: str, dim: int, seed: int) -> None:
        self.weights = {name: transposed for name, transposed in linear_weights(decoder).items() if name in names}
        self.by_name: dict[str, Projection] = {}
        self.slices: dict[str, slice] = {}
        named = dict(decoder.model.named_parameters())
        start = 0
        for i, (name, transposed) in enumerate(self.weights.items()):
            shape = named[name].shape[::-1] if transposed else named[name].shape
            own = (seed << 20) + i
            if kind == "sketch":
                self.by_name[name] = Sketch(dim, own)
            else:
                self.by_name[name] = two_sided(shape[0], shape[1], isqrt(dim), own, named[name].device)
            self.slices[name] = slice(start, start + dim)
            start += dim if kind == "random" else 0
        self.width = start if kind == "random" else dim

    def project(self, direction: Direction) -> np.ndarray:
        """The direction's linear part, projected, (width) float32."""
        out = np.zeros(self.width, dtype=np.float64)
        for name, projection in self.by_name.items():
            if name in direction:
                v = direction[name].detach().float()
                found = projection.project(v.mT.contiguous() if self.weights[name] else v)
                out[self.slices[name]] += found.double().cpu().numpy()
        return out.astype(np.float32)


class _ProjectionPass:
    """A ``Pass`` whose directions are the rows of the projection: derivatives (width, B)."""

    def __init__(
        self, model: nn.Module, names: Collection[str], kind: str, dim: int, seed: int, reduction: str, dtype: Any
    ) -> None:
        self._passes = DerivativePass(model, [], reduction=reduction, dtype=dtype)
        self.kind = kind_of("projection", dtype)
        self.decoder, self.double = self._passes.decoder, self._passes.double
        self.decoder.materialize_head()
        self.projections = _Projections(self.decoder, names, kind, dim, seed)
        self.count = self.projections.width
        with self.running():
            self._capture = Capture(self.decoder, {}, self.projections.by_name)
        name_of = parameter_names(model)
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
                out[self.projections.slices[self._name_of[path]]] += part
        return DerivativeBatch(out, nll, torch.tensor(packed.scored))


class GradientIndex:
    """Approximate directional derivatives of many examples along directions that come later.

    Args:
        model: the model that the index was built with, unchanged.
        folder: what ``build`` wrote.

    Raises:
        FileNotFoundError: there is no index, or an unfinished one.
        ValueError: it was built with another model, or by another version.
    """

    def __init__(self, model: nn.Module, folder: Path | str) -> None:
        self.model, self.shards = model, GradientShards(folder)
        m = self.shards.manifest
        if m.get("version") != _VERSION:
            raise ValueError(f"[index] expected an index of version {_VERSION}, got {m.get('version')}: build it anew")
        if missing := sorted({"weights", "model", "examples", "projection", "dim", "seed", "reduction"} - set(m)):
            raise ValueError(f"[index] expected the manifest of an index, got {self.shards.folder} without {missing}")
        if m["model"] != hash_model(model):
            raise ValueError(
                f"[index] {self.shards.folder} was built with another model, or this one has changed since"
            )
        decoder = Decoder(model)
        decoder.materialize_head()
        self._projections = _Projections(decoder, m["weights"], m["projection"], m["dim"], m["seed"])

    def __len__(self) -> int:
        return len(self.shards)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        examples: Sequence[Example],
        folder: Path | str,
        *,
        projection: str = "sketch",
        dim: int = 4096,
        seed: int = 0,
        parameters: str | Sequence[str] = "trainable",
        reduction: str = "mean",
        token_budget: int | TokenBudget | None = None,
        dtype: torch.dtype | None = None,
        shard_rows: int = 1024,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "GradientIndex":
        """Project the gradients of all examples into ``folder``; a run that was broken off goes on at its last shard.

        An example that does not fit in memory even alone gets a row of NaN, with a warning.

        Costs a forward and a backward pass, the projection of every layer and the logits of the scored tokens.

        Args:
            model: a transformers causal LM or a PEFT model around one; left as it was found.
            examples: B mappings with ``input_ids`` and ``labels``.
            folder: gets ``manifest.json`` and B x width float32 in shards.
            projection: ``"sketch"``: width ``dim``, summed over layers, Var <= 2 |x|^2 |y|^2 / dim (``grad_sketch``).
                ``"random"``: two-sided, ``dim`` = k^2 for every layer, Var <= (4/k + 4/k^2) |x|^2 |y|^2 in each
                (``grad_project``), cheaper to make.
            dim: 32 to 8192 for a sketch, a square number for ``"random"``.
            seed: of the projection, from 0 to 2^31 - 1.
            parameters: which linear weights, as ``models.selected_parameters`` takes it.
            reduction: NLL_i is the ``"mean"`` or the ``"sum"`` over example i's scored tokens.
            token_budget, dtype: as ``directional_derivatives`` takes them.
            shard_rows: examples a file, and between two points from which a run goes on.
            on_progress: called with (examples done, of how many) at the start and after every shard.

        Raises:
            ValueError: an option or an example is wrong, or no linear layer is selected.
            FileExistsError: the folder holds an index of another model, other examples or options.
        """
        check_options(projection, dim, seed, shard_rows)
        names = selected_parameters(model, parameters)
        passes = _ProjectionPass(model, names, projection, dim, seed, reduction, dtype)
        if not passes.projections.weights:
            raise ValueError(f"[index] {type(passes.decoder.lm).__name__} has no selected linear layer")
        budget = as_budget(token_budget, passes.decoder.device)
        budget.found |= read_budget(Path(folder))  # of a run that was broken off: the same batches, the same bits
        manifest = {
            "version": _VERSION,
            "model": hash_model(model),
            "examples": hash_examples(examples),
            "projection": projection,
            "dim": dim,
            "seed": seed,
            "reduction": reduction,
            "dtype": str(dtype),
            "rows": len(examples),
            "width": passes.count,
            "shard_rows": shard_rows,
            "weights": list(passes.projections.weights),
        }

        def compute(rows: range) -> np.ndarray:
            out = np.empty((len(rows), passes.count), dtype=np.float32)

            def attempt(room: Room) -> None:
                for positions, result in run_batches(passes, [examples[i] for i in rows], room):
                    out[positions] = result.derivatives.T.cpu().numpy()

            with passes.running():
                if passes.kind not in budget.found and len(examples) > shard_rows:
                    preflight(passes, longest_examples(examples), budget)
                budget.fit(passes.kind, attempt)
            write_budget(Path(folder), budget.found)
            return out

        GradientShards.fill(folder, manifest, compute, on_progress)
        return cls(model, folder)

    def check(self, examples: Sequence[Example], reduction: str) -> None:
        """Raise ValueError unless the index was built from these examples and with this reduction."""
        m = self.shards.manifest
        if hash_examples(examples) != m["examples"]:
            raise ValueError(
                f"[index] {self.shards.folder} was built from other examples than these: expected {m['rows']} rows in "
                f"their order, tokenized as then, got {len(examples)} that differ"
            )
        if reduction != m["reduction"]:
            raise ValueError(f"[index] expected the reduction {m['reduction']!r} of the index, got {reduction!r}")

    def scores(self, direction: Direction) -> np.ndarray:
        """Estimates of <direction, grad NLL_i> over the linear weights, unbiased, (B) float32: one matrix product."""
        return self.shards.product(self._projections.project(direction))

    def coverage(self, direction: Direction) -> float:
        """Share of ||direction||^2 in the weights that the index holds; NaN for a direction of zero."""
        squared = {name: float(v.double().square().sum()) for name, v in direction.items()}
        whole = sum(squared.values())
        return sum(squared.get(name, 0.0) for name in self._projections.weights) / whole if whole else float("nan")

    def candidates(self, direction: Direction, k: int) -> np.ndarray:
        """Positions of the k largest estimates (all, where there are not more), best first."""
        if k < 1:
            raise ValueError(f"[index] expected k of at least 1, got {k}")
        return np.argsort(-self.scores(direction), kind="stable")[:k]

    def topk(
        self,
        examples: Sequence[Example],
        direction: Direction,
        k: int,
        *,
        candidates: int | None = None,
        **options: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k largest exact derivatives among the best candidates by estimate.

        Args:
            examples: those that the index was built from.
            direction: parameter names to tensors; parameters that the index leaves out count here.
            k: how many.
            candidates: how many to rescore exactly; None: 4 k.
            options: for ``directional_derivatives``.

        Returns:
            Positions, best first, and exact derivatives, (min(k, B)) each.
        """
        self.check(examples, self.shards.manifest["reduction"])
        options = {"reduction": self.shards.manifest["reduction"]} | options
        chosen = self.candidates(direction, max(candidates or 4 * k, k))
        exact = directional_derivatives(self.model, [examples[int(i)] for i in chosen], direction, **options)
        values = exact.double().cpu().numpy()
        best = np.argsort(-values, kind="stable")[:k]
        return chosen[best], values[best]


def check_options(projection: str, dim: int, seed: int, shard_rows: int) -> None:
    """Raise ValueError for an option of ``GradientIndex.build`` that is out of its range."""
    if projection not in PROJECTIONS:
        raise ValueError(f"[index] expected a projection out of {list(PROJECTIONS)}, got {projection!r}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"[index] expected a seed from 0 to 2^31 - 1, got {seed}")
    if shard_rows < 1:
        raise ValueError(f"[index] expected shard_rows of at least 1, got {shard_rows}")
    if projection == "sketch":
        check_sketch("index", dim, seed)
    elif dim < 1 or isqrt(dim) ** 2 != dim:
        raise ValueError(f"[index] expected a square number as dim of random projections, got {dim}")
