"""What every contestant gets: a model folder, tokenized negatives and the direction, written once and read by each.

Examples are sorted by length and padded on the right, which a causal model needs no mask for: padding costs time, and
changes no score.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

__all__ = ["BATCH", "Batch", "Example", "Scorer", "Task", "batches", "linears", "mean_nll", "ordered"]

BATCH = 8
IGNORE_INDEX = -100

Example = dict[str, list[int]]
Scorer = Callable[[Sequence[Example]], Tensor]  # scores (N) in the order of the examples


class Batch(NamedTuple):
    """Positions of its B examples in the list, and their ids and labels (B, T), padded."""

    positions: list[int]
    input_ids: Tensor
    labels: Tensor


@dataclass
class Task:
    """<direction, grad NLL_i> of every example i, NLL_i the mean over its answer tokens.

    The direction is the gradient of the mean NLL of ``others``, so that a method that takes examples for its query
    computes the same scores as one that takes a direction.
    """

    model: nn.Module
    examples: list[Example]
    others: list[Example]
    direction: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write it below ``folder``."""
        self.model.save_pretrained(folder / "model")
        save_file({name: v.contiguous() for name, v in self.direction.items()}, folder / "direction.safetensors")
        for what, examples in (("examples", self.examples), ("others", self.others)):
            save_file(_flat(examples), folder / f"{what}.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """The same in another process, in float32 and evaluation mode."""
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        found = load_file(folder / "direction.safetensors")
        direction = {name: found[name] for name, _ in model.named_parameters()}
        lists = {what: _split(load_file(folder / f"{what}.safetensors")) for what in ("examples", "others")}
        return cls(model, direction=direction, **lists)


def _flat(examples: Sequence[Example]) -> dict[str, Tensor]:
    flat = {key: torch.tensor([i for e in examples for i in e[key]]) for key in ("input_ids", "labels")}
    return flat | {"lengths": torch.tensor([len(e["input_ids"]) for e in examples])}


def _split(flat: dict[str, Tensor]) -> list[Example]:
    lengths = flat["lengths"].tolist()
    ids, labels = (flat[key].split(lengths) for key in ("input_ids", "labels"))
    return [{"input_ids": i.tolist(), "labels": n.tolist()} for i, n in zip(ids, labels, strict=True)]


def batches(examples: Sequence[Example], size: int = BATCH) -> Iterator[Batch]:
    """Longest first, ``size`` examples at a time."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        ids, labels = ([torch.tensor(examples[i][key]) for i in positions] for key in ("input_ids", "labels"))
        padded = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        yield Batch(positions, pad_sequence(ids, batch_first=True), padded)


def ordered(examples: Sequence[Example], score: Callable[[Tensor, Tensor], Tensor], size: int = BATCH) -> Tensor:
    """``score(input_ids, labels)`` (B) of every batch, in the order of the examples."""
    out = torch.empty(len(examples), dtype=torch.float64)
    for positions, ids, labels in batches(examples, size):
        out[positions] = score(ids, labels).detach().double()
    return out


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood (B) of the labels (B, T) that are not -100 under logits (B, T, V)."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).sum(1) / (targets != IGNORE_INDEX).sum(1)


def linears(model: Any) -> dict[str, nn.Linear]:
    """Linear layers below the head, by name in the whole model: what the peers that hook layers track."""
    inside = {id(module) for module in model.base_model.modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
