"""A Hugging Face causal LM as two parts, the decoder and the LM head, run over packed examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from u2a_fast import ops
from u2a_fast.data.packing import IGNORE_INDEX, Example, Packed, pack
from u2a_fast.data.sharing import pack_shared
from u2a_fast.models.attention import packed_layout
from u2a_fast.models.parameters import floating_parameters, replaced_forwards
from u2a_fast.models.quantized import compute_dtypes, dequantized_forwards

__all__ = ["Decoder", "Head", "check_packing", "segment_sum", "sequence_logprobs"]


def segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum rows (K, M) over each example's own positions -> (K, B), in a fixed order.

    It is ``ghost_dot`` of a layer whose input is the constant 1, so it inherits that op's reproducible bits.
    """
    ones = rows.new_ones(rows.shape[1], 1)
    eye = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
    return ops.ghost_dot(ones, rows.T.contiguous(), cu_seqlens, eye[:, :, None])


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * h W^T + b), cap(z) = softcap tanh(z / softcap), for a head that is one linear layer."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: float
    softcap: float

    def inputs(self, h: Tensor, packed: Packed) -> Tensor:
        """What W^T multiplies: the scored tokens' rows of hidden states (N, D), scaled, (M, D)."""
        rows = h[packed.rows]
        return rows * self.scale if self.scale != 1.0 else rows


class Decoder:
    """The decoder and the head of a causal LM; the LM itself stays as it is.

    Attributes:
        model: the model that was given, whose parameter names count.
        lm: the transformers causal LM inside (inside a PEFT model, say).
        body: its decoder, from token ids to the last hidden states.
        head_module: its LM head.
        config: its text configuration.
        head: the head's parts where it is one plain linear layer, else None (LoRA on the head, say): then the logits of
            the scored tokens are materialized.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        wrapper: Any = model
        lm: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
        self.lm = lm
        missing = [name for name in ("base_model", "get_output_embeddings", "config") if not hasattr(lm, name)]
        if missing:
            raise TypeError(
                "[model] expected a transformers causal LM (or a PEFT model around one), "
                f"got {type(model).__name__} without {missing}"
            )
        self.body = lm.base_model
        self.head_module = lm.get_output_embeddings()
        if self.head_module is None or self.body is self.lm:
            raise TypeError(f"[model] {type(self.lm).__name__} has no LM head over a base model")
        self.config = lm.config.get_text_config()
        self.softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0.0)
        divisor = getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides logits, Cohere multiplies them
        self.scale = float(getattr(self.config, "logit_scale", None) or 1 / divisor)
        self.head = self._plain_head()

    def _plain_head(self) -> Head | None:
        module = self.head_module
        if type(module).forward is not nn.Linear.forward:
            return None
        return Head(module.weight, module.bias, self.scale, self.softcap)

    def materialize_head(self) -> None:
        """Take the head as one module among others: the logits of the scored tokens are materialized."""
        self.head = None

    @property
    def head_path(self) -> str:
        """The LM head's name among ``model.named_modules()``."""
        return next(path for path, module in self.model.named_modules() if module is self.head_module)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.head_module.weight.device if self.head else next(self.model.parameters()).device

    def pack(self, examples: Sequence[Example], *, shared: bool = False) -> Packed:
        """``packing.pack`` (``pack_shared``) on the model's device, ids held against its vocabulary (ValueError)."""
        packed = pack_shared(examples) if shared else pack(examples)
        rows = self.lm.get_input_embeddings().weight.shape[0]
        for what, ids, size in (
            ("input_ids", packed.input_ids, rows),
            ("labels", packed.target, self.config.vocab_size),
        ):
            if len(ids) and not (ids.min() >= 0 and ids.max() < size):
                raise ValueError(f"[examples] expected {what} in 0..{size - 1}, got {int(ids.min())}..{int(ids.max())}")
        return packed.to(self.device)

    def _refuse_what_packing_breaks(self, packed: Packed) -> None:
        trains = torch.is_grad_enabled() and self.lm.training
        if trains and any(getattr(module, "gradient_checkpointing", False) for module in self.lm.modules()):
            raise NotImplementedError(
                "[model] expected gradient checkpointing off (model.gradient_checkpointing_disable()): it would repeat "
                "the forward pass without the packed layout"
            )
        limit = _length_dependent_rope(self.config)
        if limit is not None and packed.longest >= limit:
            raise NotImplementedError(
                f"[model] expected examples of at most {limit} tokens, got {packed.longest + 1}: beyond them the "
                f"rotary embedding of {type(self.lm).__name__} depends on the longest example in sight"
            )

    def hidden(self, packed: Packed) -> Tensor:
        """Last hidden states (N, D); example i sees its own tokens only."""
        self._refuse_what_packing_breaks(packed)
        with packed_layout(self.lm, packed), replaced_forwards(dequantized_forwards(self.body)):
            out = self.body(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                use_cache=False,
                return_dict=True,
            )
        return out.last_hidden_state[0]

    def logits(self, h: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D) through the head module itself, float32 or float64."""
        with replaced_forwards(dequantized_forwards(self.head_module)):
            z = self.head_module(h[None])[0] * self.scale
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def materialized_logprobs(self, h: Tensor, target: Tensor) -> Tensor:
        """log p(target) (M) of hidden states (M, D), all logits at once."""
        return self.logits(h).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    def token_logprobs(self, packed: Packed) -> Tensor:
        """log p of every scored token, (M), differentiable; float64 for a float64 model, else float32."""
        h = self.hidden(packed)
        if self.head is None:
            return self.materialized_logprobs(h[packed.rows], packed.target)
        rows = self.head.inputs(h, packed)
        return ops.linear_logprob(rows, self.head.weight, packed.target, self.head.bias, self.softcap)[0]


def _length_dependent_rope(config: Any) -> int | None:
    """Tokens from which on rotary frequencies depend on the longest example in sight, None where they never do."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return None


def reduce_tokens(values: Tensor, packed: Packed, reduction: str) -> Tensor:
    """Sum or mean of values (K, M) over each example's scored tokens -> (K, B)."""
    total = segment_sum(values, packed.cu_targets)
    if reduction == "sum":
        return total
    return total / packed.cu_targets.diff()


def check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f'[reduction] expected "sum" or "mean", got {reduction!r}')


def sequence_logprobs(model: nn.Module, examples: Sequence[Example], *, reduction: str = "sum") -> Tensor:
    """Log-probability of each example's scored tokens, differentiable in the model's parameters.

    Args:
        model: a transformers causal LM or a PEFT model around one; runs in its current mode (dropout included).
        examples: B mappings with ``input_ids`` and ``labels`` (-100 where not scored; the model shifts).
        reduction: ``"sum"`` or ``"mean"`` over an example's scored tokens.

    Returns:
        (B) log-probabilities in nats (per token for ``"mean"``): float32, or float64 for a float64 model.
    """
    check_reduction(reduction)
    decoder = Decoder(model)
    packed = decoder.pack(examples)
    return reduce_tokens(decoder.token_logprobs(packed)[None], packed, reduction)[0]


def check_packing(decoder: Decoder) -> None:
    """Compare packed log-probabilities with the model's own, one example at a time, on two short random examples.

    It catches what no list of model families can: tokens that mix outside of the attention, position schemes and heads
    that are not understood.

    Raises:
        NotImplementedError: the model, as we run it, is not the model.
    """
    examples = probe_examples(decoder)
    with torch.no_grad():
        ours = decoder.token_logprobs(decoder.pack(examples))
        alone = [_own_logprobs(decoder, example["input_ids"]) for example in examples]
    expected = torch.cat(alone).to(ours.dtype)
    # half of the digits of what rounds most: float32 even for float64 models, many of which compute norms and softmax
    # in float32; quantized layers may round to a dtype of their own
    floating = next(iter(floating_parameters(decoder.body).values())).dtype
    eps = max(torch.finfo(dtype).eps for dtype in {floating, torch.float32} | compute_dtypes(decoder.model))
    # a model whose weights hold NaN is still understood: its scores will say NaN
    both_nan = ours.isnan() & expected.isnan()
    error = ((ours - expected) / expected.abs().clamp(min=1)).masked_fill(both_nan, 0).abs().max()
    if not error < eps**0.5:
        raise NotImplementedError(
            f"[model] {type(decoder.lm).__name__} is not understood: packed log-probabilities differ from its own by "
            f"{error:.1e} (relative), so its tokens mix outside of the attention or its head is not a linear layer"
        )


def probe_examples(decoder: Decoder) -> list[Example]:
    """Two short random examples, all scored, whose packed tokens are as many as no parameter's size: the axis shows."""
    sizes = {size for p in decoder.model.parameters() for size in p.shape}
    sizes |= {value for value in vars(decoder.config).values() if isinstance(value, int)}
    n = next(n for n in range(13, 10_000) if n not in sizes)
    generator = torch.Generator().manual_seed(0)
    examples: list[Example] = []
    for length in (n // 2 + 3, n - n // 2 - 1):  # packing drops the last token of each
        ids = torch.randint(decoder.config.vocab_size, (length,), generator=generator)
        examples.append({"input_ids": ids, "labels": torch.cat([torch.tensor([IGNORE_INDEX]), ids[1:]])})
    return examples


def _own_logprobs(decoder: Decoder, ids: Tensor) -> Tensor:
    ids = ids.to(decoder.device)
    logits = decoder.lm(input_ids=ids[None], use_cache=False).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
