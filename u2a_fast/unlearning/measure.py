"""NLLs of examples at a model as it is, nothing differentiable; and which examples to measure."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Example, batched
from u2a_fast.influence.derivatives import resolve_token_budget
from u2a_fast.models.decoder import sequence_logprobs
from u2a_fast.unlearning.snapshot import ParameterSnapshot, without_dropout

__all__ = ["example_of", "nlls", "sample_positions"]


def example_of(row: Mapping[str, Any]) -> Example:
    """The token example of a row: its ``example`` where it has one (as positives do), else the row itself."""
    return row.get("example", row)


def nlls(
    model: nn.Module, examples: Sequence[Example], *, reduction: str, reference: ParameterSnapshot | None = None
) -> Tensor:
    """NLL of every example, (B) float64 on the CPU, in nats, without dropout; at ``reference`` where one is given."""
    out = torch.empty(len(examples), dtype=torch.float64)
    budget = resolve_token_budget(None, next(model.parameters()).device)
    swapped = nullcontext() if reference is None else reference.swapped_in(model)
    with swapped, without_dropout(model), torch.no_grad():
        for positions, batch in batched(examples, budget):
            out[positions] = -sequence_logprobs(model, batch, reduction=reduction).double().cpu()
    return out


def sample_positions(count: int, size: int, seed: int) -> list[int]:
    """At most ``size`` of ``count`` positions, drawn without replacement, in rising order."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:size].tolist())
