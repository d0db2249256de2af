"""Projected gradients of every example, kept on disk: a later direction costs one matrix product.

Weights of linear layers are projected, the LM head among them unless it is tied to the embedding. Norms, biases and
embeddings are left out, so scores are those of the direction's linear part (``coverage`` says how much of it that is),
up to the projection's error. They choose candidates; what counts is rescored exactly, with all parameters.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from u2a_fast._check import check_sketch
from u2a_fast.data.packing import Example, longest_examples
from u2a_fast.influence.derivatives import DerivativePass, Direction, as_budget
from u2a_fast.influence.lowrank import linear_weights
from u2a_fast.influence.projections import BASES, PROJECTIONS, Projections, Projector
from u2a_fast.influence.routes import directional_derivatives
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.memory import TokenBudget
from u2a_fast.models.parameters import selected_parameters
from u2a_fast.store.budget import read_budget, write_budget
from u2a_fast.store.fingerprint import hash_examples, hash_model
from u2a_fast.store.gradients import GradientShards

__all__ = ["PROJECTIONS", "GradientIndex", "check_options", "indexed_weights"]

_VERSION = 1


class GradientIndex:
    """Approximate directional derivatives of many examples along directions that come later.

    Args:
        model: the model that the index was built with, unchanged.
        folder: what ``build`` wrote.

    Raises:
        FileNotFoundError: there is no index, an unfinished one, or one of ``pca`` without its projections.
        ValueError: it was built with another model, or by another version, or its projections are damaged.
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
        self._projections = Projections(decoder, m["weights"], m["projection"], m["dim"], m["seed"])
        if m["projection"] == "pca":
            self._projections.load(self.shards.folder / BASES)

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
        pca_sample: int = 256,
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
                The others are two-sided (``grad_project``), cheaper to make, and keep Q x P entries of every layer
                (O, I), with k^2 = ``dim``. ``"random"``: Q = P = k, Var <= (4/k + 4/k^2) |x|^2 |y|^2 in each.
                ``"pca"``: the Q = min(k, O) principal axes of the layer's output gradients and the P = min(k, I) of its
                inputs, over the tokens of a sample (``models.projection.SecondMoments``). ``"identity"``: its first
                min(k, O) outputs and min(k, I) inputs. The last two are not unbiased: what is outside their span is
                left out, of gradients and directions alike; where k reaches O and I they are exact.
            dim: 32 to 8192 for a sketch, else a square number.
            seed: of a random projection and of the sample of ``"pca"``, from 0 to 2^31 - 1.
            pca_sample: examples that the axes are measured on, a forward and a backward pass each; all, where there are
                not more. Without effect on other projections.
            parameters: which linear weights, as ``models.selected_parameters`` takes it.
            reduction: NLL_i is the ``"mean"`` or the ``"sum"`` over example i's scored tokens.
            token_budget, dtype: as ``directional_derivatives`` takes them.
            shard_rows: examples a file, and between two points from which a run goes on.
            on_progress: called with (examples done, of how many) at the start and after every shard.

        Raises:
            ValueError: an option or an example is wrong, no linear layer is selected, or ``"pca"`` has no example.
            FileExistsError: the folder holds an index of another model, other examples or options.
            FileNotFoundError: the folder holds rows of ``"pca"`` without their projections.
        """
        check_options(projection, dim, seed, shard_rows, pca_sample)
        names = indexed_weights(model, parameters)
        passes = DerivativePass(model, [], reduction=reduction, dtype=dtype)
        passes.decoder.materialize_head()
        projections = Projections(passes.decoder, names, projection, dim, seed)
        if projection == "pca" and not examples:
            raise ValueError("[index] expected examples to measure the projections of pca on, got none")
        budget = as_budget(token_budget, passes.decoder.device)
        budget.found |= read_budget(Path(folder))  # of a run that was broken off: the same batches, the same bits
        projector = Projector(passes, projections, budget, dtype)
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
            "width": projections.width,
            "shard_rows": shard_rows,
            "weights": list(projections.weights),
        } | ({"pca_sample": pca_sample} if projection == "pca" else {})

        @cache
        def settle() -> None:
            projector.settle(Path(folder), [examples[i] for i in _sample(len(examples), pca_sample, seed)])
            if len(examples) > shard_rows:
                projector.preflight(longest_examples(examples))

        def compute(rows: range) -> np.ndarray:
            settle()
            found = projector.rows([examples[i] for i in rows])
            write_budget(Path(folder), budget.found)
            return found

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
        """Estimates of <direction, grad NLL_i> over the linear weights, (B) float32: one matrix product.

        Unbiased for ``"sketch"`` and ``"random"``; for ``"pca"`` and ``"identity"`` the derivative along that part of
        the direction which is in their span.
        """
        return self.shards.product(self._projections.project(direction))

    def coverage(self, direction: Direction) -> float:
        """Share of ||direction||^2 that the index sees; NaN for a direction of zero.

        That in the weights it holds, and of ``"pca"`` and ``"identity"`` that in the span of their axes.
        """
        whole = sum(float(v.double().square().sum()) for v in direction.values())
        if not whole:
            return float("nan")
        if self._projections.orthonormal:
            return float(np.square(self._projections.project(direction)).sum()) / whole
        held = (direction[name] for name in self._projections.weights if name in direction)
        return sum(float(v.double().square().sum()) for v in held) / whole

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


def indexed_weights(model: nn.Module, parameters: str | Sequence[str] = "trainable") -> list[str]:
    """Names of the linear weights that an index of ``parameters`` holds; ValueError where there are none."""
    decoder = Decoder(model)
    decoder.materialize_head()
    chosen = selected_parameters(model, parameters)
    names = [name for name in linear_weights(decoder) if name in chosen]
    if not names:
        raise ValueError(f"[index] {type(decoder.lm).__name__} has no selected linear layer")
    return names


def check_options(projection: str, dim: int, seed: int, shard_rows: int, pca_sample: int) -> None:
    """Raise ValueError for an option of ``GradientIndex.build`` that is out of its range."""
    if projection not in PROJECTIONS:
        raise ValueError(f"[index] expected a projection out of {list(PROJECTIONS)}, got {projection!r}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"[index] expected a seed from 0 to 2^31 - 1, got {seed}")
    for name, value in (("shard_rows", shard_rows), ("pca_sample", pca_sample)):
        if value < 1:
            raise ValueError(f"[index] expected {name} of at least 1, got {value}")
    if projection == "sketch":
        check_sketch("index", dim, seed)
    elif dim < 1 or isqrt(dim) ** 2 != dim:
        raise ValueError(f"[index] expected a square number as dim of the projection {projection!r}, got {dim}")


def _sample(total: int, count: int, seed: int) -> list[int]:
    """Positions of ``count`` examples drawn from ``seed``, all where there are not more, in their order."""
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return sorted(chosen.tolist())
