"""The forward route: directional derivatives carried through the model beside its values.

One pass of three products a layer (y = W a, V a and W da) where the reverse route has three passes of one; nothing is
kept for a backward pass, so memory is two live layers, and a prompt that several examples share runs once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.data.packing import Example, Packed, batched
from u2a_fast.data.sharing import shared_batches
from u2a_fast.influence.derivatives import (
    DerivativeBatch,
    Direction,
    cast_parameters,
    pass_kind,
    stack_directions,
)
from u2a_fast.models.decoder import Decoder, check_packing, check_reduction, probe_examples, reduce_tokens
from u2a_fast.models.fused import fused_op, fused_tangents
from u2a_fast.models.heap import kept_heap
from u2a_fast.models.lora import short_lora
from u2a_fast.models.memory import is_out_of_memory
from u2a_fast.models.parameters import evaluation_mode, parameter_names
from u2a_fast.models.tangents import DualParameters, split_dual

__all__ = ["ForwardPass"]


class ForwardPass:
    """``DerivativePass`` in forward mode; K directions run one after the other, at 3 units each.

    Args:
        model: a transformers causal LM or a PEFT model around one, of operations that PyTorch differentiates forward.
        directions: K mappings from parameter names to tensors of the parameters' shapes, absent names meaning zero.
        reduction: NLL_i is the ``"sum"`` or the ``"mean"`` over example i's scored tokens.
        dtype: run the model and its tangents in this precision; None: as the model is.
        share_prompts: run a prompt that several examples of a batch begin with once.

    Raises:
        NotImplementedError: an operation of the model has no forward-mode derivative, or the way the model mixes tokens
            is not understood.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Sequence[Direction],
        *,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        share_prompts: bool = True,
    ) -> None:
        check_reduction(reduction)
        self.model, self.reduction, self.dtype, self.share_prompts = model, reduction, dtype, share_prompts
        self.kind = pass_kind("forward", dtype)
        self.decoder = Decoder(model)
        self.count = len(directions)
        self.double = all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point())
        self._duals = []
        for direction in directions:  # each in memory of its own: PyTorch copies tangents that are views of more
            tangents = {name: v[0] for name, v in stack_directions(model, [direction], dtype).items()}
            self._duals.append(DualParameters(model, tangents))
        names = parameter_names(model)
        head = self.decoder.head
        self._head_names = (names[id(head.weight)], names.get(id(head.bias))) if head else (None, None)
        with evaluation_mode(model):
            check_packing(self.decoder)
        self._check_operations()

    def _check_operations(self) -> None:
        try:
            with self.running():
                self(probe_examples(self.decoder))
        except (NotImplementedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise NotImplementedError(
                f'[forward] {type(self.decoder.lm).__name__} does not run in forward mode, use mode="reverse": {error}'
            ) from error

    def batches(self, examples: Sequence[Example], token_budget: int) -> list[tuple[list[int], list[Example]]]:
        """(positions, examples) of every batch; a shared prompt counts once."""
        return (shared_batches if self.share_prompts else batched)(examples, token_budget)

    def explain(self) -> dict[str, str]:
        """What carries the tangent of every module that holds a parameter of the directions, by its path."""
        holders = {module for duals in self._duals for module in duals.modules}
        head = self.decoder.head_module if self.decoder.head else None
        found = {}
        with self.running():
            for path, module in self.model.named_modules():
                op = "linear_logprob_jvp" if module is head else fused_op(module)
                if module in holders or op == "glu_jvp":
                    found[path] = op or "its own forward-mode rules"
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model frozen, in evaluation mode and in ``dtype``: run batches inside this block."""
        cast = cast_parameters(self.model, self.dtype) if self.dtype is not None else nullcontext()
        with cast, evaluation_mode(self.model), short_lora(self.model), fused_tangents(self.model), kept_heap():
            yield

    def __call__(self, examples: Sequence[Example]) -> DerivativeBatch:
        """One batch, which must fit in memory; call inside ``running``."""
        packed = self.decoder.pack(examples, shared=self.share_prompts)
        out_dtype = torch.float64 if self.double else torch.float32
        with torch.no_grad():
            rows = []
            for duals in self._duals:
                logp, jvp = self._one(packed, duals)
                rows.append(jvp)
            if not rows:
                logp, _ = self._one(packed, DualParameters(self.model, {}))
            by_token = -torch.stack(rows) if rows else logp.new_zeros(0, len(logp))
            derivatives = reduce_tokens(by_token, packed, self.reduction)
            nll = -reduce_tokens(logp[None], packed, self.reduction)[0]
        return DerivativeBatch(derivatives.to(out_dtype), nll, torch.tensor(packed.scored), by_token=by_token)

    def _one(self, packed: Packed, duals: DualParameters) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the scored tokens and their tangents, (M) and (M)."""
        with duals.active():
            hidden = self.decoder.hidden(packed)
            if self.decoder.head is None:
                logp, jvp = split_dual(self.decoder.materialized_logprobs(hidden[packed.rows], packed.target))
                return logp, torch.zeros_like(logp) if jvp is None else jvp
            h, dh = split_dual(hidden)
        return self._head(h, dh, packed, duals.direction)

    def _head(self, h: Tensor, dh: Tensor | None, packed: Packed, direction: Direction) -> tuple[Tensor, Tensor]:
        head = self.decoder.head
        assert head is not None
        weight_name, bias_name = self._head_names
        rows = head.inputs(h, packed)
        drows = None if dh is None else head.inputs(dh, packed)[None]
        dweight = direction.get(weight_name or "")
        dbias = direction.get(bias_name or "")
        if drows is None and dweight is None:
            drows = torch.zeros_like(rows)[None]
        logp, _, jvp = ops.linear_logprob_jvp(
            rows,
            head.weight,
            packed.target,
            drows,
            None if dweight is None else dweight[None],
            head.bias,
            None if dbias is None else dbias[None],
            head.softcap,
        )
        return logp, jvp[0]
