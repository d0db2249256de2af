"""Which way to the derivatives: forward or reverse, by model and number of directions, with the reason."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import IGNORE_INDEX, Example
from u2a_fast.influence.derivatives import (
    DerivativeBatch,
    DerivativePass,
    Direction,
    as_budget,
)
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.lowrank import check_rank, truncate
from u2a_fast.models.decoder import Decoder
from u2a_fast.models.memory import Room, TokenBudget

__all__ = [
    "MODES",
    "Choice",
    "DirectionalDerivatives",
    "Pass",
    "directional_derivatives",
    "make_pass",
    "preflight",
    "run_batches",
    "run_parts",
]

MODES = ("auto", "forward", "reverse", "lowrank")


class BatchPass(Protocol):
    """Something prepared once for many batches of examples."""

    decoder: Decoder
    count: int
    double: bool
    kind: str

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
    names = [name for direction in directions for name in direction]
    low_rank = bool(names) and all("lora_" in name for name in names)
    adapter = "; LoRA's own directions: about 2 units by either route" if low_rank else ""
    routes: dict[str, Callable[..., Pass]] = {
        "forward": partial(ForwardPass, model, directions, reduction=reduction, dtype=dtype),
        "reverse": partial(DerivativePass, model, directions, reduction=reduction, dtype=dtype),
    }
    if mode == "lowrank":
        approximate = partial(truncate, ranks=check_rank(rank))
        return routes["reverse"](approximate=approximate), Choice(mode, f"asked for: rank {rank}")
    if mode in routes:
        return routes[mode](), Choice(mode, "asked for")
    if count == 1:
        first, other = "forward", "reverse"
        reason = f"one direction: no activations kept, shared prompts run once{adapter}"
    else:
        first, other = "reverse", "forward"
        reason = f"{count} directions share one backward pass{adapter}" if count else "no direction"
    try:
        return routes[first](), Choice(first, reason)
    except NotImplementedError as error:
        refused = str(error)
    try:
        return routes[other](), Choice(other, refused)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error} ({first} route: {refused})") from None


def run_batches(
    passes: BatchPass, examples: Sequence[Example], room: Room
) -> Iterator[tuple[list[int], DerivativeBatch]]:
    """Run every batch inside ``passes.running()``: (positions, result), the largest batch first.

    ``room``: most tokens a batch, as ``TokenBudget.fit`` hands it out. An example that does not fit in memory even
    alone gives a result of NaN (``fits``). Raises OutOfRoom for a batch of several that does not fit.
    """
    for positions, result in room.each(passes.batches(examples, room.tokens), lambda _, batch: passes(batch)):
        yield positions, _unfit(passes, examples[positions[0]]) if result is None else result


def preflight(passes: BatchPass, longest: Sequence[Example], budget: TokenBudget) -> None:
    """Inside ``passes.running()``: halve the budget until the largest batch fits, lone examples that never do apart."""

    def attempt(room: Room) -> None:
        next((True for _, out in run_batches(passes, longest, room) if out.fits), None)
        room.unfit.clear()  # the run proper names them

    budget.fit(passes.kind, attempt)


def _unfit(passes: BatchPass, example: Example) -> DerivativeBatch:
    """What stands for one example that does not fit in memory."""
    scored = sum(int(label) != IGNORE_INDEX for label in example["labels"][1:])
    dtype, device = torch.float64 if passes.double else torch.float32, passes.decoder.device
    nan = torch.full((1, 1), torch.nan, dtype=dtype, device=device)  # one entry: there is no memory for more
    derivatives, by_token = nan.expand(passes.count, 1), nan.expand(passes.count, scored)
    return DerivativeBatch(derivatives, nan[0], torch.tensor([scored]), by_token=by_token, fits=False)


def run_parts(
    passes: DerivativePass, examples: Sequence[Example], budget: TokenBudget, kind: str | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """Every module's share of the first direction's derivatives, (B) float64 by path, in the order of their calls.

    Also the positions of the examples that do not fit in memory, whose shares are NaN. ``kind``: of loop, in
    ``budget``; None: that of all such passes.
    """

    def attempt(room: Room) -> tuple[dict[str, Tensor], list[int]]:
        found: dict[str, Tensor] = {}
        unfit: list[int] = []
        for positions, result in run_batches(passes, examples, room):
            unfit += [] if result.fits else positions
            for path, part in result.parts.items():
                found.setdefault(path, part.new_zeros(len(examples)))[positions] = part[0]
        for part in found.values():
            part[unfit] = torch.nan
        return found, unfit

    with passes.running():
        return budget.fit(kind or passes.kind, attempt)


def directional_derivatives(
    model: nn.Module,
    examples: Sequence[Example],
    direction: Direction | Sequence[Direction],
    *,
    reduction: str = "mean",
    mode: str = "auto",
    rank: int = 16,
    token_budget: int | TokenBudget | None = None,
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
            activation-only backward, one contraction a layer), or ``"auto"``: forward for one direction, reverse for
            more, and the other where the model does not allow that. ``"lowrank"`` is approximate: reverse, every
            matrix of the direction truncated.
        rank: singular vectors that ``"lowrank"`` keeps of a matrix.
        token_budget: most tokens a batch (an example longer than that goes alone); None: 2048 on CPU, 16384 on CUDA.
            Where batches of that size do not fit in memory it is halved until they do, with a warning; a
            ``TokenBudget`` keeps what was found for further calls.
        dtype: precision of the model's passes; accumulation is float32 whatever it is. None: the model's own.
        batch_invariant: an example's derivative has the same bits whatever its companions, their order and the token
            budget, on one machine with one number of threads and one version of every library. Every example runs
            alone, shared prompts too: what that costs is measured in u2a_fast docs/benchmarks.md.

    Returns:
        (B), or (K, B) for a list of directions: float32 (float64 for a float64 model), on the model's device. NaN, with
        a warning, for an example that does not fit in memory even alone.

    Raises:
        ValueError: a name, a shape, an example or an option is wrong.
        NotImplementedError: a selected module, or the way the model mixes tokens, is not understood.
    """
    return DirectionalDerivatives(
        model,
        direction,
        reduction=reduction,
        mode=mode,
        rank=rank,
        token_budget=token_budget,
        dtype=dtype,
        batch_invariant=batch_invariant,
    )(examples)


class DirectionalDerivatives:
    """``directional_derivatives`` of one model along one direction or K, set up once for many calls.

    Setting up tries the model on short examples, casts the directions and, for ``"lowrank"``, decomposes them: as long
    as scoring some tens of examples. The model's parameters must stay as they are from then on.

    Args:
        model, direction, reduction, mode, rank, token_budget, dtype, batch_invariant: as the function takes them.

    Attributes:
        choice: the route taken and why.

    Raises:
        ValueError, NotImplementedError: as the function does, from here on or for the examples of a call.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Direction | Sequence[Direction],
        *,
        reduction: str = "mean",
        mode: str = "auto",
        rank: int = 16,
        token_budget: int | TokenBudget | None = None,
        dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
    ) -> None:
        _refuse_inference_mode()
        self._single = isinstance(direction, Mapping)
        directions = [direction] if isinstance(direction, Mapping) else list(direction)
        self._passes, self.choice = make_pass(model, directions, mode=mode, rank=rank, reduction=reduction, dtype=dtype)
        self._budget = as_budget(token_budget, self._passes.decoder.device, batch_invariant=batch_invariant)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """(B), or (K, B) for a list of directions, as ``directional_derivatives`` returns them."""
        _refuse_inference_mode()
        passes = self._passes
        out_dtype = torch.float64 if passes.double else torch.float32
        out = torch.empty(passes.count, len(examples), dtype=out_dtype, device=passes.decoder.device)
        with passes.running():
            found = self._budget.fit(
                passes.kind, lambda room: [(at, out.derivatives) for at, out in run_batches(passes, examples, room)]
            )
        for positions, derivatives in found:  # after the last batch: on a GPU an index waits for all that runs
            out[:, positions] = derivatives
        return out[0] if self._single else out


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("[directional_derivatives] expected to be called outside of torch.inference_mode()")
