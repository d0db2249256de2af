"""The retain term: what must stay as it is while negatives are unlearned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from u2a_fast.data.packing import Example, Packed
from u2a_fast.models.decoder import Decoder, reduce_tokens, sequence_logprobs
from u2a_fast.unlearning.snapshot import ParameterSnapshot, without_dropout

__all__ = ["RetainSampler", "retain_losses"]

_LOGITS = 2**24  # logits held at once by the KL term, 64 MiB in float32


class RetainSampler:
    """Which positives an optimizer step sees: a function of the step alone, so that a resumed run draws the same.

    Positives are taken in the order of seeded permutations laid end to end.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def __call__(self, step: int) -> list[int]:
        """Positions of the positives of optimizer step ``step`` (from 0)."""
        start = step * self.batch_size
        draws = range(start, start + self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {i // self.count for i in draws}}
        return [orders[i // self.count][i % self.count] for i in draws]

    def _order(self, epoch: int) -> list[int]:
        # seeds of different runs stay apart for more epochs than any run has
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator).tolist()


def _divergence(decoder: Decoder, reference: ParameterSnapshot, h: Tensor, h_reference: Tensor) -> Tensor:
    """KL(reference || model) of the next-token distributions at hidden states (M, D), (M)."""
    with torch.no_grad(), without_dropout(decoder.model), reference.swapped_in(decoder.model):
        expected = decoder.logits(h_reference).log_softmax(-1)
    return (expected.exp() * (expected - decoder.logits(h).log_softmax(-1))).sum(-1)


def _kl_tokens(decoder: Decoder, reference: ParameterSnapshot, packed: Packed) -> Tensor:
    """KL(reference || model) at every scored token, (M); at most ``_LOGITS`` logits of each exist at a time."""
    with torch.no_grad(), without_dropout(decoder.model), reference.swapped_in(decoder.model):
        h_reference = decoder.hidden(packed)[packed.rows]
    h = decoder.hidden(packed)[packed.rows]
    size = max(1, _LOGITS // decoder.config.vocab_size)
    # recomputed in the backward pass, so that one chunk's logits are freed before the next one's are made
    chunks = [
        checkpoint(_divergence, decoder, reference, part, part_reference, use_reentrant=False)
        for part, part_reference in zip(h.split(size), h_reference.split(size), strict=True)
    ]
    return torch.cat(chunks)


def retain_losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    loss: str,
    reduction: str,
    reference: ParameterSnapshot | None,
) -> Tensor:
    """Retain loss of every positive, (B), differentiable, in nats.

    Args:
        model: a transformers causal LM or a PEFT model around one.
        examples: B token examples.
        loss: ``"nll"``, or ``"kl"``: KL(reference || model) at the scored tokens.
        reduction: ``"mean"`` or ``"sum"`` over an example's scored tokens.
        reference: theta_0, for ``"kl"``.
    """
    if loss == "nll":
        return -sequence_logprobs(model, examples, reduction=reduction)
    assert reference is not None, "the trainer takes a snapshot where the retain loss is a KL divergence"
    decoder = Decoder(model)
    packed = decoder.pack(examples)
    return reduce_tokens(_kl_tokens(decoder, reference, packed)[None], packed, reduction)[0]
