"""NLLs of examples at a model as it is, nothing differentiable; and which examples to measure."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Example, batched
from u2a_fast.influence.derivatives import as_budget
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.unlearning.snapshot import ParameterSnapshot, without_dropout

__all__ = ["example_of", "mean_of_fitting", "nlls", "sample_positions"]


def example_of(row: Mapping[str, Any]) -> Example:
    """The token example of a row: its ``example`` where it has one (as positives do), else the row itself."""
    return row.get("example", row)


def nlls(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    reduction: str,
    reference: ParameterSnapshot | None = None,
    token_budget: TokenBudget | None = None,
) -> Tensor:
    """NLL of every example, (B) float64 on the CPU, in nats, without dropout; at ``reference`` where one is given.

    NaN, with a warning, for an example that does not fit in memory even alone.
    """
    return _nlls(model, examples, reduction, reference, token_budget)[0]


def mean_of_fitting(
    model: nn.Module, examples: Sequence[Example], *, reduction: str, token_budget: TokenBudget | None = None
) -> float:
    """The mean of ``nlls`` over the examples that fit in memory, which are the same at every step of a run.

    Raises torch.OutOfMemoryError where none does.
    """
    found, fits = _nlls(model, examples, reduction, None, token_budget)
    if not fits.any():
        raise torch.OutOfMemoryError(f"[nlls] none of {len(examples)} examples fits in memory, each alone")
    return found[fits].mean().item()


def _nlls(
    model: nn.Module,
    examples: Sequence[Example],
    reduction: str,
    reference: ParameterSnapshot | None,
    token_budget: TokenBudget | None,
) -> tuple[Tensor, Tensor]:
    """NLLs, and which of the examples fit in memory, (B) bool."""
    budget = as_budget(token_budget, next(model.parameters()).device)

    def attempt(room: Room) -> tuple[Tensor, Tensor]:
        out = torch.full((len(examples),), torch.nan, dtype=torch.float64)
        fits = torch.zeros(len(examples), dtype=torch.bool)
        plan = batched(examples, room.tokens)
        for positions, found in room.each(
            plan, lambda _, batch: sequence_logprobs(model, batch, reduction=reduction).double().cpu()
        ):
            if found is not None:
                out[positions], fits[positions] = -found, True
        return out, fits

    swapped = nullcontext() if reference is None else reference.swapped_in(model)
    with swapped, without_dropout(model), torch.no_grad():
        return budget.fit("log-probabilities", attempt)


def sample_positions(count: int, size: int, seed: int) -> list[int]:
    """At most ``size`` of ``count`` positions, drawn without replacement, in rising order."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:size].tolist())
