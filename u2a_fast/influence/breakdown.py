"""What a directional derivative is made of: the tokens that an example scores, the modules that hold the parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import DerivativePass, Direction, as_budget
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.routes import run_batches, run_parts
from u2a_fast.models.memory import Room

__all__ = ["module_derivatives", "token_derivatives"]


def token_derivatives(
    model: nn.Module,
    examples: Sequence[Example],
    direction: Direction,
    *,
    token_budget: int | None = None,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> list[Tensor]:
    """<direction, grad of -log p_t> for every scored token t of every example, exactly, by the forward route.

    An example's sum is its ``directional_derivatives`` for the reduction ``"sum"``, its mean that for ``"mean"``. It
    costs no more than they do: forward mode carries every token's tangent anyway.

    Args:
        model: a transformers causal LM or a PEFT model around one, whose operations have forward-mode derivatives.
        examples: B mappings with ``input_ids`` and ``labels``.
        direction: parameter names to tensors of the parameters' shapes, absent names meaning zero.
        token_budget, dtype, batch_invariant: as ``directional_derivatives`` takes them.

    Returns:
        B tensors, one entry a scored token in the order of the example's labels: float32 (float64 for a float64
        model), on the model's device.

    Raises:
        ValueError: a name, a shape, an example or an option is wrong.
        NotImplementedError: the model does not run in forward mode, or the way it mixes tokens is not understood.
    """
    passes = ForwardPass(model, [direction], reduction="sum", dtype=dtype)
    budget = as_budget(token_budget, passes.decoder.device, batch_invariant=batch_invariant)
    out_dtype = torch.float64 if passes.double else torch.float32

    def attempt(room: Room) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        for positions, result in run_batches(passes, examples, room):
            assert result.by_token is not None
            rows = result.by_token[0].to(out_dtype).split(result.tokens.tolist())
            out |= {i: row.clone() for i, row in zip(positions, rows, strict=True)}
        return out

    with passes.running():
        out = budget.fit(passes.kind, attempt)
    return [out[i] for i in range(len(examples))]


def module_derivatives(
    model: nn.Module,
    examples: Sequence[Example],
    direction: Direction,
    *,
    reduction: str = "mean",
    token_budget: int | None = None,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> dict[str, Tensor]:
    """Every module's share of <direction, grad NLL_i>, exactly, by the reverse route; they sum to the derivative.

    A module's share is the inner product over the parameters that it holds itself. A tied embedding has two: what its
    use as an embedding contributes and what the LM head's does.

    Args:
        model: a transformers causal LM or a PEFT model around one; parameters of every kind in ``models.kinds``.
        examples: B mappings with ``input_ids`` and ``labels``.
        direction: parameter names to tensors of the parameters' shapes, absent names meaning zero.
        reduction, token_budget, dtype, batch_invariant: as ``directional_derivatives`` takes them.

    Returns:
        (B) float64 by module path, for every module that holds a parameter of the direction, the LM head last.

    Raises:
        ValueError: a name, a shape, an example or an option is wrong.
        NotImplementedError: a selected module, or the way the model mixes tokens, is not understood.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("[module_derivatives] expected to be called outside of torch.inference_mode()")
    passes = DerivativePass(model, [direction], reduction=reduction, dtype=dtype)
    decoder = passes.decoder
    budget = as_budget(token_budget, decoder.device, batch_invariant=batch_invariant)
    found, unfit = run_parts(passes, examples, budget)
    silent = torch.zeros(len(examples), dtype=torch.float64, device=decoder.device)
    silent[unfit] = torch.nan
    return {path: found[path] if path in found else silent.clone() for path in passes.module_paths}
