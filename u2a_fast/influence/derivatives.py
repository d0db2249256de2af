"""<direction, grad NLL_i> for every example i: the one quantity that all scores are made of.

Reverse route (u2a_fast docs/design.md, cost model): one forward pass, one backward pass through activations alone,
and one ``ghost_dot`` a layer; K directions cost K contractions and share both passes. No per-example gradient exists
at any time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.data.packing import Example, Packed, batched
from u2a_fast.influence.lowrank import Approximation
from u2a_fast.models.capture import Capture
from u2a_fast.models.decoder import Decoder, Head, check_packing, check_reduction, reduce_tokens
from u2a_fast.models.gated import short_gated_units
from u2a_fast.models.heap import kept_heap
from u2a_fast.models.lora import short_lora
from u2a_fast.models.low_rank import LowRankHead
from u2a_fast.models.memory import TokenBudget
from u2a_fast.models.norms import short_rms_norms
from u2a_fast.models.parameters import evaluation_mode, floating_parameters, parameter_names
from u2a_fast.models.rotary import short_rotaries
from u2a_fast.models.stacks import stack
from u2a_fast.models.tiled_head import TiledHead, tiled_head_is_cheaper

__all__ = ["Approximate", "DerivativeBatch", "DerivativePass", "Direction", "cast_parameters", "stack_directions"]

Direction = Mapping[str, Tensor]
Approximate = Callable[[Decoder, dict[str, Tensor]], Approximation]


def resolve_token_budget(given: int | None, device: torch.device, *, batch_invariant: bool = False) -> int:
    """Tokens a batch; by default enough for matrix products at full rate, few enough to fit beside the weights.

    ``batch_invariant``: one, so that every example goes alone. Then libraries, which choose their kernels by shape, and
    with them the order of their sums, see nothing of its companions.
    """
    if batch_invariant:
        return 1
    if given is not None:
        return given
    return 16384 if device.type == "cuda" else 2048


def as_budget(given: int | TokenBudget | None, device: torch.device, *, batch_invariant: bool = False) -> TokenBudget:
    """The budget that calls share, where one was given; else, and where every example goes alone, a new one."""
    if isinstance(given, TokenBudget):
        return TokenBudget(1) if batch_invariant else given
    return TokenBudget(resolve_token_budget(given, device, batch_invariant=batch_invariant))


def pass_kind(route: str, dtype: torch.dtype | None) -> str:
    """The name of a route's passes in a ``TokenBudget``: passes of another precision have a budget of their own."""
    return f"{route} pass" if dtype is None else f"{route} pass in {str(dtype).removeprefix('torch.')}"


def check_whole(model: nn.Module) -> None:
    """Raise NotImplementedError for a model whose parameters are shards (FSDP, tensor parallelism)."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if wrapped or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise NotImplementedError(
            "[model] expected whole parameters, got shards (FSDP or tensor parallelism): a direction would have to be "
            "sharded and gathered with every one of them. Scores do not depend on each other: give every process a "
            "whole model, quantized if need be, and its share of the negatives"
        )


def stack_directions(
    model: nn.Module, directions: Sequence[Direction], dtype: torch.dtype | None = None, *, wide: bool = False
) -> dict[str, Tensor]:
    """Directions by parameter name, (K, *shape), absent names zero.

    Each is in ``dtype``, or its parameter's own where that is None: what the contractions take, so that no second copy
    is kept. ``wide``: in float32 at least, for a decomposition.
    """
    check_whole(model)
    parameters = dict(model.named_parameters())
    stacked = {}
    for name in sorted({name for direction in directions for name in direction}):
        if name not in parameters:
            raise ValueError(f"[direction] expected names of model.named_parameters(), got {name!r}")
        p = parameters[name]
        if not p.is_floating_point():
            raise ValueError(f"[direction] expected parameters of floating-point numbers, got {name} of {p.dtype}")
        kind = torch.promote_types(p.dtype, torch.float32) if wide else dtype or p.dtype
        rows = []
        for direction in directions:
            v = direction.get(name)
            if v is not None and v.shape != p.shape:
                raise ValueError(f"[direction] expected {name} of shape {tuple(p.shape)}, got {tuple(v.shape)}")
            rows.append(torch.zeros_like(p, dtype=kind) if v is None else v.detach().to(p.device, kind))
        stacked[name] = stack(rows)
    return stacked


@contextmanager
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Floating-point parameters in ``dtype`` for the duration of the block; the originals come back untouched."""
    originals = [(p, p.data) for p in floating_parameters(model).values() if p.dtype != dtype]
    try:
        for p, data in originals:
            p.data = data.to(dtype)
        yield
    finally:
        for p, data in originals:
            p.data = data


@dataclass(frozen=True)
class DerivativeBatch:
    """K derivatives of B examples; all in nats (per token for ``"mean"``).

    Attributes:
        derivatives: (K, B).
        nll: (B), tokens: (B) scored tokens.
        parts: every module's share of the derivatives, (K, B) float64 by its path, in the order of their calls (of the
            reverse route).
        bound: (K, B), how far the exact derivatives may be from these at most; None where nothing was bounded.
        by_token: (K, M), the derivatives of every scored token's own NLL, example after example (of the forward route).
        fits: False where a lone example did not fit in memory: then every number is NaN, ``tokens`` apart.
    """

    derivatives: Tensor
    nll: Tensor
    tokens: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    bound: Tensor | None = None
    by_token: Tensor | None = None
    fits: bool = True


class DerivativePass:
    """K directions prepared once for many batches of examples.

    Args:
        model: a transformers causal LM or a PEFT model around one; parameters of every kind in ``models.kinds``.
        directions: K mappings from parameter names to tensors of the parameters' shapes, absent names meaning zero.
        reduction: NLL_i is the ``"sum"`` or the ``"mean"`` over example i's scored tokens.
        dtype: run the model and the contractions in this precision (accumulation stays float32); None: as the model is.
        approximate: what stands for the directions (K, *shape) by name (``lowrank.truncate``, ``layers.keep_layers``);
            None: they themselves.

    Raises:
        NotImplementedError: a module that holds a selected parameter, or the way the model mixes tokens, is not
            understood.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Sequence[Direction],
        *,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        approximate: Approximate | None = None,
    ) -> None:
        check_reduction(reduction)
        self.model, self.reduction, self.dtype = model, reduction, dtype
        self.kind = pass_kind("reverse", dtype)
        self.decoder = Decoder(model)
        stacked = stack_directions(model, directions, dtype, wide=approximate is not None)
        self.count = len(directions)
        self.double = all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point())
        names = parameter_names(model)
        head = self.decoder.head
        self._dweight = stacked.get(names[id(head.weight)]) if head else None
        self._dbias = stacked.get(names[id(head.bias)]) if head and head.bias is not None else None
        self.approximation = approximate(self.decoder, stacked) if approximate else Approximation(stacked)
        self._head: LowRankHead | TiledHead | None = None
        if head and self.approximation.head:
            self._head = LowRankHead(head, self.approximation.head, self._dbias)
        elif head and self._takes_tiles(head):
            self._head = TiledHead(head, self._dweight, self._dbias)
        with evaluation_mode(model):
            check_packing(self.decoder)
            self.capture = Capture(self.decoder, self.approximation.kept, self.approximation.factors)

    def _takes_tiles(self, head: Head) -> bool:
        if self._dweight is None:
            return self._dbias is not None
        return tiled_head_is_cheaper(head, self.count, self.dtype or head.weight.dtype)

    @property
    def module_paths(self) -> list[str]:
        """The modules that hold parameters of the directions, the LM head last."""
        paths = [site.path for site in self.capture.sites]
        head = self._dweight is not None or self._dbias is not None
        return [*paths, self.decoder.head_path] if head else paths

    def explain(self) -> dict[str, str]:
        """What is done for every module that holds a parameter of the directions, by its path."""
        rules = {site.path: site.rule for site in self.capture.sites}
        head = self._head.rule if self._head else "linear_logprob_jvp"
        return {path: rules.get(path, head) for path in self.module_paths}

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model frozen, in evaluation mode and in ``dtype``: run batches inside this block."""
        with ExitStack() as stack:
            if self.dtype is not None:
                stack.enter_context(cast_parameters(self.model, self.dtype))
            for context in (evaluation_mode, short_lora, short_rms_norms, short_gated_units, short_rotaries):
                stack.enter_context(context(self.model))
            stack.enter_context(kept_heap())
            yield

    def batches(self, examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
        """(positions, examples) of every batch."""
        return batched(examples, token_budget)

    def __call__(self, examples: Sequence[Example]) -> DerivativeBatch:
        """One batch, which must fit in memory; call inside ``running``."""
        packed = self.decoder.pack(examples)
        logp, head_part = self.propagate(packed, self.capture)
        with torch.no_grad():
            nll = -reduce_tokens(logp.detach()[None], packed, self.reduction)[0]
            parts = self.capture.parts()
            if head_part is not None:
                parts[self.decoder.head_path] = head_part.double()
            total = torch.zeros(2 * self.count, len(examples), dtype=torch.float64, device=nll.device)
            for part in parts.values():
                total[: len(part)] += part
            out_dtype = torch.float64 if self.double else torch.float32
            return DerivativeBatch(
                total[: self.count].to(out_dtype),
                nll,
                torch.tensor(packed.scored),
                {path: part[: self.count] for path, part in parts.items()},
                total[self.count :] if self.approximation.bounded else None,
            )

    def propagate(self, packed: Packed, capture: Capture) -> tuple[Tensor, Tensor | None]:
        """Forward and backward of one batch, seen by ``capture``: log-probabilities (M), the head's own part (K, B)."""
        counts = torch.tensor(packed.scored, dtype=torch.float64).repeat_interleave(torch.tensor(packed.scored))
        weights = (-torch.ones_like(counts) if self.reduction == "sum" else -1 / counts).to(self.decoder.device)
        with capture.hooked(packed):
            h = self.decoder.hidden(packed)
            if self.decoder.head is None:
                return self._through_module(h, packed, weights, capture), None
            return self._through_head(h, packed, weights)

    def _through_module(self, h: Tensor, packed: Packed, weights: Tensor, capture: Capture) -> Tensor:
        with capture.over(packed.cu_targets):
            logp = self.decoder.materialized_logprobs(h[packed.rows], packed.target)
        if logp.requires_grad:
            logp.backward(weights.to(logp.dtype))
        return logp

    def _through_head(self, h: Tensor, packed: Packed, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M) and the head's own part of d NLL / d direction (K, B); backward into the decoder."""
        head = self.decoder.head
        assert head is not None
        part, dh = None, None
        with torch.no_grad():
            rows = head.inputs(h, packed)
            own = (rows, head.weight, packed.target)
            upstream = weights.to(torch.promote_types(rows.dtype, torch.float32))
            if self._head:
                logp, dh, part = self._head.propagate(upstream, rows, packed.target, packed.cu_targets)
            elif self._dweight is None:
                logp, lse = ops.linear_logprob(*own, head.bias, head.softcap)
            else:
                dbias = self._dbias.to(rows.dtype) if self._dbias is not None else None
                dweight = self._dweight.to(rows.dtype)
                logp, lse, jvp = ops.linear_logprob_jvp(*own, None, dweight, head.bias, dbias, head.softcap)
                part = -reduce_tokens(jvp, packed, self.reduction)
            if dh is None and h.requires_grad:
                dh, _, _ = torch.ops.u2a_fast.linear_logprob_backward(
                    upstream, torch.zeros_like(upstream), *own, lse, head.bias, head.softcap, True, False
                )
            if dh is not None and h.requires_grad:
                grad = torch.zeros_like(h).index_copy_(0, packed.rows, (dh * head.scale).to(h.dtype))
        if h.requires_grad:
            h.backward(grad)
        return logp, part
