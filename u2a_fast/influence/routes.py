"""Which way to the derivatives: forward or reverse, by model and number of directions, with the reason."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import (
    DerivativeBatch,
    DerivativePass,
    Direction,
    is_out_of_memory,
    resolve_token_budget,
)
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.lowrank import check_rank, truncate
from u2a_fast.models.decoder import Decoder

__all__ = ["MODES", "Choice", "Pass", "directional_derivatives", "make_pass", "run_batches", "run_parts"]

MODES = ("auto", "forward", "reverse", "lowrank")


class BatchPass(Protocol):
    """Something prepared once for many batches of examples."""

    decoder: Decoder
    count: int
    double: bool

    def batches(self, examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]: ...

    def running(self) -> AbstractContextManager[None]: ...

    def __call__(self, examples: Sequence[Example]) -> DerivativeBatch: ...


class Pass(BatchPass, Protocol):
    """What every route offers: directions prepared once (``ForwardPass``, ``DerivativePass``)."""

    reduction: str

    def explain(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Choice:
    """The route taken and why."""

    mode: str
    reason: str


def make_pass(
    model: nn.Module,
    directions: Sequence[Direction],
    *,
    mode: str = "auto",
    rank: int = 16,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> tuple[Pass, Choice]:
    """Prepare directions for the route named, or for the cheapest exact one that the model allows.

    Raises:
        ValueError: an option is wrong.
        NotImplementedError: the model does not run the route named, or none of them.
    """
    if mode not in MODES:
        raise ValueError(f"[mode] expected one of {list(MODES)}, got {mode!r}")
    count = len(directions)
    if mode == "reverse":
        return DerivativePass(model, directions, reduction=reduction, dtype=dtype), Choice(mode, "asked for")
    if mode == "lowrank":
        approximate = partial(truncate, ranks=check_rank(rank))
        passes = DerivativePass(model, directions, reduction=reduction, dtype=dtype, approximate=approximate)
        return passes, Choice(mode, f"asked for: rank {rank}")
    if mode == "forward":
        return ForwardPass(model, directions, reduction=reduction, dtype=dtype), Choice(mode, "asked for")
    if count != 1:
        reason = f"{count} directions share one backward pass" if count else "no direction"
    else:
        try:
            forward = ForwardPass(model, directions, reduction=reduction, dtype=dtype)
            return forward, Choice("forward", "one direction: nothing is kept, shared prompts run once")
        except NotImplementedError as error:
            reason = str(error)
    return DerivativePass(model, directions, reduction=reduction, dtype=dtype), Choice("reverse", reason)


def run_batches(
    passes: BatchPass, examples: Sequence[Example], token_budget: int
) -> Iterator[tuple[list[int], DerivativeBatch]]:
    """Run every batch inside ``passes.running()``: (positions, result), the largest batch first.

    A batch that does not fit in memory is split, and the budget of all that follow is halved, with a warning.
    """
    pending = passes.batches(examples, token_budget)
    while pending:
        positions, batch = pending.pop(0)
        result = None
        try:
            result = passes(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        if result is not None:
            yield positions, result
            continue
        # here, not in the handler: the error would hold the failed batch's tensors
        token_budget = max(token_budget // 2, 1)
        warnings.warn(
            f"[token_budget] {len(batch)} examples do not fit in memory: going on with {token_budget} tokens a batch",
            stacklevel=2,
        )
        left = sorted(i for rest, _ in [(positions, batch), *pending] for i in rest)
        plan = passes.batches([examples[i] for i in left], token_budget)
        pending = [([left[i] for i in rest], again) for rest, again in plan]


def run_parts(passes: DerivativePass, examples: Sequence[Example], token_budget: int) -> dict[str, Tensor]:
    """Every module's share of the first direction's derivatives, (B) float64 by path, in the order of their calls."""
    found: dict[str, Tensor] = {}
    with passes.running():
        for positions, result in run_batches(passes, examples, token_budget):
            for path, part in result.parts.items():
                found.setdefault(path, part.new_zeros(len(examples)))[positions] = part[0]
    return found


def directional_derivatives(
    model: nn.Module,
    examples: Sequence[Example],
    direction: Direction | Sequence[Direction],
    *,
    reduction: str = "mean",
    mode: str = "auto",
    rank: int = 16,
    token_budget: int | None = None,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """<direction, grad NLL_i> for every example i, exactly by default, without forming a per-example gradient.

    Args:
        model: a transformers causal LM or a PEFT model around one. It is left as it was found.
        examples: B mappings with ``input_ids`` and ``labels`` of equal length (-100 where not scored; the model
            shifts, as in transformers).
        direction: a mapping from names of ``model.named_parameters()`` to tensors of the parameters' shapes, absent
            names meaning zero; or a list of K of them, which share the passes through the model.
        reduction: NLL_i in nats is the ``"mean"`` or the ``"sum"`` over example i's scored tokens.
        mode: ``"forward"`` (tangents beside values, nothing kept, shared prompts once), ``"reverse"`` (forward,
            activation-only backward, one contraction a layer), or ``"auto"``: forward for one direction where the model
            allows it, else reverse. ``"lowrank"`` is approximate: reverse, every matrix of the direction truncated.
        rank: singular vectors that ``"lowrank"`` keeps of a matrix.
        token_budget: most tokens a batch (an example longer than that goes alone); None: 2048 on CPU, 16384 on CUDA.
        dtype: precision of the model's passes; accumulation is float32 whatever it is. None: the model's own.
        batch_invariant: an example's derivative has the same bits whatever its companions, their order and the token
            budget, on one machine with one number of threads and one version of every library. Every example runs
            alone, shared prompts too: what that costs is measured in u2a_fast docs/benchmarks.md.

    Returns:
        (B), or (K, B) for a list of directions: float32 (float64 for a float64 model), on the model's device.

    Raises:
        ValueError: a name, a shape, an example or an option is wrong.
        NotImplementedError: a selected module, or the way the model mixes tokens, is not understood.
    """
    directions = [direction] if isinstance(direction, Mapping) else list(direction)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("[directional_derivatives] expected to be called outside of torch.inference_mode()")
    passes, _ = make_pass(model, directions, mode=mode, rank=rank, reduction=reduction, dtype=dtype)
    budget = resolve_token_budget(token_budget, passes.decoder.device, batch_invariant=batch_invariant)
    out_dtype = torch.float64 if passes.double else torch.float32
    out = torch.empty(passes.count, len(examples), dtype=out_dtype, device=passes.decoder.device)
    with passes.running():
        found = [(at, result.derivatives) for at, result in run_batches(passes, examples, budget)]
    for positions, derivatives in found:  # after the last batch: on a GPU an index waits for all that runs
        out[:, positions] = derivatives
    return out[0] if isinstance(direction, Mapping) else out
