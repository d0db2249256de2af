"""What benchmarks share: the public U2A procedure, re-expressed, the forward pass that is the unit, gates."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from u2a_fast.data.packing import IGNORE_INDEX, Example
from u2a_fast.models.decoder import Decoder

__all__ = [
    "GateError",
    "PublicProcedure",
    "attempt",
    "float64_scores",
    "forward_answer_head",
    "forward_full_head",
    "norm_error",
    "score_error",
]


Result = TypeVar("Result")


class GateError(RuntimeError):
    """Scores are wrong, so their speed is no result."""


class PublicProcedure:
    """<direction, grad NLL_i> as the release does it: one example at a time, padded, a full gradient, flattened.

    Its loss is the model's own mean cross-entropy over the labels; its arithmetic is autograd's, so it is also the
    check of every exact score.

    Args:
        model: a transformers causal LM, all of whose parameters have gradients.
        direction: a tensor for every parameter name.
        padded: tokens that every example is padded to on the right, under an attention mask; None: its own length.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor], padded: int | None = None) -> None:
        self.model = model.requires_grad_(True)
        self.parameters = dict(model.named_parameters())
        self.flat = torch.cat([direction[name].flatten() for name in self.parameters])
        self.padded = padded

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Scores (B) float32."""
        return torch.stack([self._one(example) for example in examples])

    def _one(self, example: Example) -> Tensor:
        loss = self.model(**self._batch(example), use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return torch.cat([gradient.flatten() for gradient in gradients]) @ self.flat

    def _batch(self, example: Example) -> dict[str, Tensor]:
        ids, labels = (torch.as_tensor(example[key], device=self.flat.device)[None] for key in ("input_ids", "labels"))
        missing = (self.padded or ids.shape[1]) - ids.shape[1]
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(ids), (0, missing))
        return {
            "input_ids": pad(ids, (0, missing)),
            "attention_mask": mask,
            "labels": pad(labels, (0, missing), value=IGNORE_INDEX),
        }


def forward_full_head(decoder: Decoder, examples: Sequence[Example]) -> Any:
    """One forward pass over the packed tokens, logits of every token included: the unit of cost."""
    with torch.no_grad():
        return decoder.head_module(decoder.hidden(decoder.pack(examples)))


def forward_answer_head(decoder: Decoder, examples: Sequence[Example]) -> Tensor:
    """The same with the head on the scored tokens only, by ``linear_logprob``."""
    with torch.no_grad():
        return decoder.token_logprobs(decoder.pack(examples))


def attempt(name: str, measure: Callable[[], Result]) -> Result | None:
    """What ``measure`` returns; None where it raised, which is printed: one case takes no other's turn away."""
    try:
        return measure()
    except Exception as error:
        print(f"{name}: NOT TIMED: {type(error).__name__}: {str(error)[:300]}", flush=True)
    torch.cuda.empty_cache()  # only now: the exception held the frames, and they their tensors
    return None


def float64_scores(model: nn.Module, direction: Mapping[str, Tensor], examples: Sequence[Example]) -> Tensor:
    """Scores (B) by per-example autograd on a float64 copy of the model: what float32 scores are judged against."""
    in_double = {name: v.double() for name, v in direction.items()}
    return PublicProcedure(copy.deepcopy(model).double(), in_double)(examples)


def norm_error(scores: Tensor, exact: Tensor) -> float:
    """||scores - exact|| / ||exact||."""
    return float((scores.double() - exact).norm() / exact.norm())


def score_error(scores: Tensor, exact: Tensor) -> float:
    """Largest error relative to the score, or to the median magnitude where a score is smaller."""
    return float(((scores.double() - exact).abs() / exact.abs().clamp(min=exact.abs().median())).max())
