"""<direction, grad NLL_i> for every example i: the one quantity that all scores are made of.

Reverse route (u2a_fast docs/design.md, cost model): one forward pass, one backward pass through activations alone,
and one ``ghost_dot`` a layer; K directions cost K contractions and share both passes. No per-example gradient exists
at any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.data.packing import Example, Packed, batched
from u2a_fast.models.capture import Capture
from u2a_fast.models.decoder import Decoder, check_packing, check_reduction, reduce_tokens
from u2a_fast.models.norms import short_rms_norms
from u2a_fast.models.parameters import evaluation_mode

__all__ = ["DerivativeBatch", "DerivativePass", "Direction", "cast_parameters", "stack_directions"]

Direction = Mapping[str, Tensor]


def resolve_token_budget(given: int | None, device: torch.device) -> int:
    """Tokens a batch; by default enough for matrix products at full rate, few enough to fit beside the weights."""
    if given is not None:
        return given
    return 16384 if device.type == "cuda" else 2048


def stack_directions(model: nn.Module, directions: Sequence[Direction]) -> dict[str, Tensor]:
    """Directions by parameter name, (K, *shape), absent names zero."""
    parameters = dict(model.named_parameters())
    stacked = {}
    for name in sorted({name for direction in directions for name in direction}):
        if name not in parameters:
            raise ValueError(f"[direction] expected names of model.named_parameters(), got {name!r}")
        p = parameters[name]
        dtype = torch.promote_types(p.dtype, torch.float32)
        rows = []
        for direction in directions:
            v = direction.get(name)
            if v is not None and v.shape != p.shape:
                raise ValueError(f"[direction] expected {name} of shape {tuple(p.shape)}, got {tuple(v.shape)}")
            rows.append(torch.zeros_like(p, dtype=dtype) if v is None else v.detach().to(p.device, dtype))
        stacked[name] = torch.stack(rows)
    return stacked


@contextmanager
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Floating-point parameters in ``dtype`` for the duration of the block; the originals come back untouched."""
    originals = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
    try:
        for p, data in originals:
            p.data = data.to(dtype)
        yield
    finally:
        for p, data in originals:
            p.data = data


@dataclass(frozen=True)
class DerivativeBatch:
    """derivatives (K, B), nll (B) and scored tokens (B) of B examples; both in nats (per token for ``"mean"``)."""

    derivatives: Tensor
    nll: Tensor
    tokens: Tensor


class DerivativePass:
    """K directions prepared once for many batches of examples.

    Args:
        model: a transformers causal LM or a PEFT model around one; parameters of every kind in ``models.kinds``.
        directions: K mappings from parameter names to tensors of the parameters' shapes, absent names meaning zero.
        reduction: NLL_i is the ``"sum"`` or the ``"mean"`` over example i's scored tokens.
        dtype: run the model and the contractions in this precision (accumulation stays float32); None: as the model is.

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
    ) -> None:
        check_reduction(reduction)
        self.model, self.reduction, self.dtype = model, reduction, dtype
        self.decoder = Decoder(model)
        stacked = stack_directions(model, directions)
        self.count = len(directions)
        self.double = all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point())
        names = {id(p): name for name, p in model.named_parameters()}
        head = self.decoder.head
        self._dweight = stacked.get(names[id(head.weight)]) if head else None
        self._dbias = stacked.get(names[id(head.bias)]) if head and head.bias is not None else None
        with evaluation_mode(model):
            check_packing(self.decoder)
            self.capture = Capture(self.decoder, stacked)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model frozen, in evaluation mode and in ``dtype``: run batches inside this block."""
        cast = cast_parameters(self.model, self.dtype) if self.dtype is not None else nullcontext()
        with cast, evaluation_mode(self.model), short_rms_norms(self.model):
            yield

    def batches(self, examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
        """(positions, examples) of every batch."""
        return batched(examples, token_budget)

    def __call__(self, examples: Sequence[Example]) -> DerivativeBatch:
        """One batch, which must fit in memory; call inside ``running``."""
        packed = self.decoder.pack(examples)
        counts = torch.tensor(packed.scored, dtype=torch.float64).repeat_interleave(torch.tensor(packed.scored))
        weights = (-torch.ones_like(counts) if self.reduction == "sum" else -1 / counts).to(self.decoder.device)
        with self.capture.hooked(packed):
            h = self.decoder.hidden(packed)
            if self.decoder.head is None:
                logp, head_rows = self._through_module(h, packed, weights)
            else:
                logp, head_rows = self._through_head(h, packed, weights)
        with torch.no_grad():
            nll = -reduce_tokens(logp.detach()[None], packed, self.reduction)[0]
            total = self.capture.result()
            out_dtype = torch.float64 if self.double else torch.float32
            zero = torch.zeros(self.count, len(examples), dtype=torch.float64, device=nll.device)
            total = zero if total is None else total
            if head_rows is not None:
                total = total - reduce_tokens(head_rows, packed, self.reduction)
            return DerivativeBatch(total.to(out_dtype), nll, torch.tensor(packed.scored))

    def _through_module(self, h: Tensor, packed: Packed, weights: Tensor) -> tuple[Tensor, None]:
        with self.capture.over(packed.cu_targets):
            logp = self.decoder.materialized_logprobs(h[packed.rows], packed.target)
        if logp.requires_grad:
            logp.backward(weights.to(logp.dtype))
        return logp, None

    def _through_head(self, h: Tensor, packed: Packed, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M) and the head's own part of d logp / d direction (K, M); backward into the decoder."""
        head = self.decoder.head
        assert head is not None
        with torch.no_grad():
            rows = h[packed.rows] * head.scale if head.scale != 1.0 else h[packed.rows]
            own, jvp = (rows, head.weight, packed.target), None
            if self._dweight is None and self._dbias is None:
                logp, lse = ops.linear_logprob(*own, head.bias, head.softcap)
            else:
                dweight = self._dweight.to(rows.dtype) if self._dweight is not None else self._zero_dweight(head.weight)
                dbias = self._dbias.to(rows.dtype) if self._dbias is not None else None
                logp, lse, jvp = ops.linear_logprob_jvp(*own, None, dweight, head.bias, dbias, head.softcap)
            if h.requires_grad:
                upstream = weights.to(logp.dtype)
                dh, _, _ = torch.ops.u2a_fast.linear_logprob_backward(
                    upstream, torch.zeros_like(upstream), *own, lse, head.bias, head.softcap, True, False
                )
                grad = torch.zeros_like(h).index_copy_(0, packed.rows, (dh * head.scale).to(h.dtype))
        if h.requires_grad:
            h.backward(grad)
        return logp, jvp

    def _zero_dweight(self, weight: Tensor) -> Tensor:
        return torch.zeros(self.count, *weight.shape, dtype=weight.dtype, device=weight.device)
